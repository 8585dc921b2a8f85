"""`hpclr train`: from a run file to a finished run, or on from where it stopped."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from hpclr.checkpoint import CheckpointStore, Loaded, OpenCheckpoint
from hpclr.config import RunFile, differences, load_run_file, parse_run_file
from hpclr.data import Order
from hpclr.errors import RetryableError, UsageError
from hpclr.output import say
from hpclr.parallel.meeting.layout import ALONE, Layout
from hpclr.parallel.watch.attempt import attempts, launch_directory
from hpclr.track.sinks import require_packages, tracked
from hpclr.training.assembly import Assembly, assemble
from hpclr.training.evaluation import malformed_named
from hpclr.training.job import assembled
from hpclr.training.lengths import check_steps, decided_alone
from hpclr.training.lock import locked
from hpclr.training.loop import Trainer, warn_of_changed_threads
from hpclr.training.metrics import MetricsFile, read_metrics
from hpclr.training.progress import Display, Nothing, display
from hpclr.training.run_directory import RunDirectory, writing
from hpclr.training.shards import damage, without_shares
from hpclr.training.state import Position, from_tree, position_of, restore
from hpclr.training.stopping import StopRequests, deadline_of


def train(
    run: RunFile, runs: Path, *, fresh: bool = False, break_lock: bool = False, layout: Layout = ALONE
) -> RunDirectory:
    """Trains a run, or continues it, in `runs/NAME`; one process, or one of many that all call this.

    Args:
        run: the run file.
        runs: the directory that holds runs.
        fresh: start over; a run that is there already is set aside, not overwritten.
        break_lock: take the directory from a job of which nothing is known, if its heartbeat stands still.
        layout: which process of how many this is.

    Raises:
        UsageError: for anything wrong with the run file, the data or the directory; nothing has been written then.
        HpclrError: as `Trainer.train`; and if another process has failed.
    """
    require_packages(run.track)
    directory = RunDirectory(runs / run.name)
    stop = _stop_requests(run, directory, layout)
    if fresh:
        directory.check_place()
    else:
        directory.check(run)
    with assembled(run, directory, layout) as job:
        continuing = job.group.on_first(lambda: not fresh and bool(CheckpointStore(directory.checkpoints).steps()))
        parts = assemble(run, job, continuing=continuing)
        with parts.dataset, ExitStack() as held:
            job.group.on_first(lambda: _take(held, directory, run, fresh, break_lock, stop))
            _train_locked(parts, directory, continuing, stop)
            parts.replica.renew()  # what it holds of the other processes goes before they part
    return directory


def _stop_requests(run: RunFile, directory: RunDirectory, layout: Layout) -> StopRequests:
    """What asks this process to stop; the file and the clock are for the first one."""
    deadline = deadline_of(os.environ)  # on every process: if it is nonsense, none of them waits for the others
    if layout.rank:
        return StopRequests()
    return StopRequests(directory.stop_file, deadline, run.slurm.margin, _earlier_request(directory))


def _earlier_request(directory: RunDirectory) -> Path:
    """Where the request is that was there before this start: a batch script, which starts sooner, has kept it."""
    launch = launch_directory()
    of_script = launch is not None and launch.resolve().parent == (directory.path / "logs").resolve()
    return launch / directory.stop_file.name if launch is not None and of_script else directory.stop_file


def _take(
    held: ExitStack, directory: RunDirectory, run: RunFile, fresh: bool, break_lock: bool, stop: StopRequests
) -> None:
    """Locks the directory, for as long as `held` lasts."""
    if fresh and directory.exists:
        with locked(directory.path, break_lock=break_lock):  # not from under a process that is training in it
            old = directory.set_aside()
        say(f"the run that was in {directory.path} is now in {old}")
    directory.lock = held.enter_context(locked(directory.path, break_lock=break_lock))
    directory.check(run)  # once more: another process may have been here while the parts were made
    with writing(directory.path):
        stop.forget_earlier()  # whoever was to stop has done so


def _train_locked(parts: Assembly, directory: RunDirectory, continuing: bool, stop: StopRequests) -> None:
    store, group = CheckpointStore(directory.checkpoints, keep=parts.run.checkpoint.keep), parts.job.group
    first = _FirstLook(parts, directory, store)
    finished, step = _agreed(parts, store, first)
    if finished:
        with _tracked(parts, directory, finished=True):  # what was not told when the run ended
            return
    if continuing and step is None:
        raise RetryableError(f"{store.directory}: the checkpoints that were there at the start are gone; start again")
    with parts.job.attempt(directory, parts.run.parallel.timeout):
        position = Position()
        if step is not None:
            parts.job.doing("loading a checkpoint", step)
            position = _loaded(parts, store, first, step)
        group.on_first(lambda: _begin_records(parts, directory, position))
        with _display(parts, directory, position) as shown, _tracked(parts, directory):
            if step is not None:
                shown.note(f"continuing from step {position.step} ({store.path(step).name})")
            decided = decided_alone(parts.run.method, parts.total_steps)
            if decided is not None:
                shown.note(decided)
            Trainer(parts, position, directory, store, shown, stop).train()


def _agreed(parts: Assembly, store: CheckpointStore, first: "_FirstLook") -> tuple[bool, int | None]:
    """As the first process has looked; where weights are shared out, all have looked at the parts of the checkpoint."""
    group, bad = parts.job.group, set[int]()
    while True:
        finished, step = group.on_first(first.look)
        if finished or step is None or parts.sharded is None:
            return finished, step
        found = group.together(partial(damage, store, step, group))
        reason = next(filter(None, group.gather(found)), None)
        if reason is None:
            return finished, step
        if step in bad:
            raise RetryableError(f"{store.path(step)} is damaged and cannot be set aside: {reason}")
        bad.add(step)
        group.on_first(partial(store.set_aside, step, reason))


def _loaded(parts: Assembly, store: CheckpointStore, first: "_FirstLook", step: int) -> Position:
    """All processes take the checkpoint's state; what fails on one, before they need one another, fails on all."""
    group, saved = parts.job.group, first.saved
    first.saved = None  # its memory is wanted
    if parts.sharded is None:
        return group.together(lambda: _resume(parts, saved or store.load(step)))
    with group.together(lambda: store.open(step)) as opened:
        rest = group.together(lambda: saved or without_shares(opened))
        return group.together(lambda: _resume(parts, rest, opened))


class _FirstLook:
    """What the first process finds in the run directory, by which all go on."""

    def __init__(self, parts: Assembly, directory: RunDirectory, store: CheckpointStore) -> None:
        self._parts, self._directory, self._store = parts, directory, store
        self.saved: Loaded | None = None

    def look(self) -> tuple[bool, int | None]:
        """Whether the run is finished, and the step of the checkpoint to continue from."""
        self._store.sweep()
        self.saved = self._newest()
        if self.saved is None:
            finished = _is_finished_without_checkpoints(self._parts.run, self._directory)
            what = ", but its checkpoints are gone"
        else:
            with malformed_named(self.saved.path):
                _check_run(self._parts.run, self.saved)
                finished = _is_finished(self.saved, self._parts) and self._directory.summary.exists()
                what = f" (step {self.saved.step})"
                if not finished:
                    _check_data(self._parts, self.saved, self._directory)
        if finished:
            say(f"{self._directory.path}: this run is finished{what}; --fresh starts it over")
        return finished, None if self.saved is None else self.saved.step

    def _newest(self) -> Loaded | None:
        if self._parts.sharded is None:
            return self._store.load_newest()
        opened = self._store.open_newest()
        if opened is None:
            return None
        with opened:
            return without_shares(opened)


def _begin_records(parts: Assembly, directory: RunDirectory, position: Position) -> None:
    directory.create(parts.run, parts.environment)
    metrics = MetricsFile(directory.metrics)
    metrics.rewind(position.step)
    metrics.append("attempt", position.step, **_facts(parts), attempt=max(attempts(directory.path)))
    metrics.settle()


def _facts(parts: Assembly) -> Mapping[str, Any]:
    """What whoever reads the records of an attempt must know to say how far it is."""
    return {
        "world_size": parts.job.group.size,
        "device": parts.environment["device"],
        "steps": parts.total_steps,
        "checks": check_steps(parts.run.method, parts.total_steps),
        "save_every": parts.run.checkpoint.every,
        "save_minutes": parts.run.checkpoint.minutes,
    }


def _display(parts: Assembly, directory: RunDirectory, position: Position) -> Display:
    if not parts.job.group.is_first:
        return Nothing()
    return display(parts.run.name, parts.total_steps, position.step, directory.metrics)


def _tracked(parts: Assembly, directory: RunDirectory, *, finished: bool = False) -> AbstractContextManager[None]:
    """The first process tells of the run elsewhere."""
    if not parts.job.group.is_first:
        return nullcontext()
    return tracked(directory.path, directory.metrics, parts.run, finished=finished)


def _is_finished(saved: Loaded, parts: Assembly) -> bool:
    return position_of(saved.tree).ended(parts.total_steps, parts.run.validation.patience)


def _is_finished_without_checkpoints(asked: RunFile, directory: RunDirectory) -> bool:
    """Whether a run's records are all that is left of it, and all that is asked for.

    Raises:
        UsageError: if it was trained, but not to the end that is asked for; starting over would erase its records.
    """
    if directory.summary.exists() and _length(load_run_file(directory.run_file)) == _length(asked):
        return True
    last = max((record["step"] for record in read_metrics(directory.metrics)), default=0)
    if last > 0:
        raise UsageError(
            f"{directory.path} holds the records of a run that was trained to step {last}, but its checkpoints are "
            f"gone: none is in {directory.checkpoints}. Put one back, with its .sha256, or start over with --fresh "
            "(what is there is then set aside)."
        )
    return False


def _length(run: RunFile) -> tuple[int | None, int | None, int | None]:
    return run.train.steps, run.train.epochs, run.validation.patience


def _check_run(asked: RunFile, saved: Loaded) -> None:
    """A checkpoint of another run may have been put into the directory.

    Raises:
        UsageError: if its run file is another one.
    """
    stored = parse_run_file(from_tree(saved.tree["run"])["yaml"], f"{saved.path} (its run file)")
    listed = differences(stored, asked)
    if listed:
        raise UsageError(
            f"{saved.path} is of a run of another run file. What differs: {'; '.join(listed)}. Move it away to use the "
            "one before, or take the changes back."
        )


def _check_data(parts: Assembly, saved: Loaded, directory: RunDirectory) -> None:
    """A run goes on with the data that it began with, whatever the file is called by now.

    Raises:
        UsageError: if it is other data.
    """
    data = from_tree(saved.tree["data"])
    if data.get("stamp") != parts.dataset.stamp:
        parts.dataset.verify()  # copied or changed since: the digest that it names may no longer be its own
    if data["digest"] != parts.dataset.digest:
        raise UsageError(
            f"{directory.path} was trained on data with digest {data['digest'][:12]}…, but {parts.run.data.path} has "
            f"{parts.dataset.digest[:12]}…; give the run its data back, or start over with --fresh"
        )


def _resume(parts: Assembly, saved: Loaded, opened: OpenCheckpoint | None = None) -> Position:
    warn_of_changed_threads(from_tree(saved.tree["environment"])["threads"], parts.job.threads)
    parts.loader.order = Order(**from_tree(saved.tree["sampler"])["order"])
    try:
        return restore(parts, saved.tree, opened)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # code behind a `target:` may have changed
        raise UsageError(
            f"{saved.path} does not fit the model and the optimiser of this run, though its run file is the same: "
            f"{error}. Give the run the code back that it was started with, or start over with --fresh."
        ) from error
