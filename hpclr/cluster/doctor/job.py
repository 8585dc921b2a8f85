"""`hpclr doctor --job`: in each process of a job; they check their nodes, meet, measure, and one of them speaks."""

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from hpclr.cluster.doctor import disk, judging, page, slurm
from hpclr.cluster.doctor.circumstances import Circumstances
from hpclr.cluster.doctor.collecting import Check, collect
from hpclr.cluster.doctor.judging import Report
from hpclr.cluster.doctor.notes import Board, Note
from hpclr.parallel.meeting.consultation import first_line
from hpclr.parallel.meeting.layout import Layout, check_gpus
from hpclr.parallel.meeting.rendezvous import meet

if TYPE_CHECKING:
    import torch

    from hpclr.parallel.group import Group

_GRACE = 15.0  # seconds by which processes notice later than others that something failed
_DISK = 60.0  # seconds for the disks of a node


def examine(here: Circumstances, timeout: float) -> Report | None:
    """Checks, meets, measures.

    Args:
        here: where and as what this process runs.
        timeout: seconds to wait for the other processes, when they meet and in each thing that they do together.

    Returns:
        What to say; None in all processes but one.
    """
    findings = [finding for checks in (_checks(here), _disks(here)) for found in collect(checks) for finding in found]
    layout = here.layout
    cores = tuple(sorted(os.sched_getaffinity(0)))
    note = Note(layout.rank, platform.node(), layout.local_size, cores, tuple(findings))
    board = Board(here.directory, layout)
    board.put(note)
    others_give_up = time.monotonic() + timeout
    try:
        return _measured(here, note, board, timeout)
    except Exception as error:  # whatever it is, the page is about it
        failed = msgspec.structs.replace(note, state="failed", error=_words(error))
        board.put(failed)
        return _left_over(here, failed, board.wait(max(others_give_up, time.monotonic()) + _GRACE))


def _checks(here: Circumstances) -> list[Check]:
    """What every process looks at, what one a node, and what one in all."""
    checks = [page.of_devices(here), page.of_mpi(here)]
    if here.layout.local_rank == 0:
        checks += [*page.of_node(here), page.of_containers()]
    return [*checks, page.of_slurm(here)] if here.layout.rank == 0 else checks


def _disks(here: Circumstances) -> list[Check]:
    """Measured when the other checks no longer take the node's time, by one process of it."""
    check = Check("disks", lambda: disk.examine(here.directory), _DISK, remedy="A file system does not answer.")
    return [check] if here.layout.local_rank == 0 else []


def _measured(here: Circumstances, note: Note, board: Board, timeout: float) -> Report | None:
    """The normal end: all measure together, and the first process hears everything."""
    with _together(here, timeout) as (group, device):
        from hpclr.cluster.doctor.measuring import measure
        from hpclr.training.environment import use_threads

        notes = _gathered(group, note)
        use_threads("auto", sum((one.host, one.cores) == (note.host, note.cores) for one in notes))
        measured, faults = measure(group, device, [one.host for one in notes])
        note = msgspec.structs.replace(note, state="finished", measured=measured, findings=(*note.findings, *faults))
        notes = _gathered(group, note)
        seen = {one.rank for one in board.notes()}
        group.barrier()
    board.remove(note.rank)
    return judging.report(notes, judging.not_shared(here.directory, notes, seen)) if group.is_first else None


def _gathered(group: "Group", note: Note) -> list[Note]:
    return [msgspec.convert(one, Note) for one in group.gather(msgspec.to_builtins(note))]


@contextmanager
def _together(here: Circumstances, timeout: float) -> Iterator[tuple["Group", "torch.device"]]:
    """All processes, connected as those of a run are, and this one's device."""
    import torch
    import torch.distributed as dist

    from hpclr.parallel.group import Group, join

    layout = here.layout
    index = check_gpus(layout, torch.cuda.device_count(), task_gpus=here.gpus, wanted="auto")
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    if layout.world_size == 1:
        yield Group(), device
        return
    store = meet(
        _without_mpi(layout),
        directory=here.directory,
        timeout=timeout,
        interface=here.settings.interface,
        host_suffix=here.settings.host_suffix,
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    yield join(store, layout.rank, layout.world_size, backend=backend, timeout=timeout, device=device), device
    dist.destroy_process_group()


def _without_mpi(layout: Layout) -> Layout:
    """They meet by a file, where that is possible: an MPI that does not work is a line of the page, not its end."""
    return layout._replace(launcher="files") if layout.key is not None else layout


def _words(error: Exception) -> str:
    return (first_line(error) or repr(error)).replace("(parallel.timeout)", "(--timeout)")


def _left_over(here: Circumstances, note: Note, notes: Sequence[Note]) -> Report | None:
    """The other end: the first of those that have failed speaks, of what is known of all."""
    others = [one for one in notes if one.rank != note.rank]
    notes = sorted([note, *others], key=lambda one: one.rank)
    if note.rank != min(one.rank for one in notes if one.state == "failed"):
        return None
    absent = judging.absent(notes, here.layout.world_size, slurm.nodes_of(here.layout, here.job))
    reasons = judging.failed(notes)
    return judging.report(notes, [*absent, *(reasons[:1] if absent else reasons)])
