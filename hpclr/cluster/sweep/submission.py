"""The runs of a sweep as one job array: checked first, then submitted, all of them or none."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpclr.cluster.checks import partitions_here
from hpclr.cluster.record import note_jobs
from hpclr.cluster.resources import Resources
from hpclr.cluster.snapshot import placed
from hpclr.cluster.submit import Prepared, prepare
from hpclr.cluster.submitting import UnknownOutcomeError, hand_over, withdraw
from hpclr.cluster.sweep.files import Point
from hpclr.cluster.sweep.points import Sweep
from hpclr.cluster.sweep.standing import directory_of, remember
from hpclr.errors import UsageError
from hpclr.slurm import client
from hpclr.slurm.array import array_script, most_elements
from hpclr.training.run_directory import writing


@dataclass(frozen=True)
class PreparedArray:
    """Runs that can be submitted together.

    Attributes:
        runs: each with its own batch script.
        directory: of the sweep, absolute.
        text: the array's batch script.
    """

    runs: tuple[Prepared, ...]
    directory: Path
    text: str


def prepare_array(
    sweep: Sweep,
    points: Sequence[Point],
    runs: Path,
    resources: Resources,
    command: Sequence[str],
    at_once: int | None = None,
) -> PreparedArray:
    """Checks whether runs can be trained as a job array, and makes its batch script; writes nothing.

    Args:
        sweep: the sweep.
        points: those of its runs that are to be trained; at least one.
        runs: the directory that holds runs.
        resources: what each of them is to have.
        command: the words of the command line, for the record.
        at_once: how many may run at a time; None: as many as there is room for.

    Raises:
        UsageError: with everything that is found wrong.
    """
    _check_number(len(points))
    partitions = partitions_here()
    prepared: list[Prepared] = []
    faults: dict[str, list[str]] = {}
    for point in points:
        try:
            prepared.append(prepare(point.run, runs, resources, command, partitions=partitions))
        except UsageError as error:
            faults.setdefault(str(error), []).append(point.name)
    if faults:
        raise UsageError("\n".join(f"{', '.join(names)}: {fault}" for fault, names in faults.items()))
    directory = Path(os.path.abspath(directory_of(sweep, runs)))
    text = array_script(sweep.name, directory, [run.script for run in prepared], at_once)
    return PreparedArray(tuple(prepared), directory, text)


def submit_array(array: PreparedArray, sweep: Sweep, runs: Path) -> str:
    """Writes all that the jobs need, and submits them; returns the number of the array.

    Raises:
        SlurmError: if Slurm does not take it; all is then as it was before.
        UsageError: likewise, if there is no Slurm here, or a directory cannot be written to.
        UnknownOutcomeError: if nobody can tell now whether Slurm took it; what the runs would need is then there.
    """
    with ExitStack() as undo:
        for run in array.runs:
            undo.enter_context(placed(run.directory, run.snapshot))
        script = undo.enter_context(_written(array))
        jobs: list[str] = []
        try:
            _hand_over(sweep, script, jobs)
            _note(array, jobs[0], script, sweep.command)
            remember(sweep, runs)
            script.rename(array.directory / "logs" / f"{jobs[0]}_submission.sh")  # where slurm-tools look for it
        except UnknownOutcomeError:
            raise
        except BaseException as error:
            withdraw(jobs, error)
            raise
    return jobs[0]


def _hand_over(sweep: Sweep, script: Path, jobs: list[str]) -> None:
    """Submits the array, and puts its number into `jobs`, also if sbatch was cut short."""
    try:
        hand_over(script, (), (), jobs)
    except UnknownOutcomeError as error:
        raise UnknownOutcomeError(
            "Whether the array was submitted is not known, as Slurm does not answer. Once it does, "
            f"`squeue --me --name={sweep.name}` shows it if there is one: end it with `scancel`. Then submit "
            f"the {sweep.kind} again."
        ) from error
    finally:
        jobs[:] = sorted(jobs, key=int)[:1]  # the number of the array is the first; elements that run have others


def _note(array: PreparedArray, job: str, script: Path, by: Literal["sweep", "compare"]) -> None:
    for number, run in enumerate(array.runs):
        with writing(run.directory):
            (run.directory / "logs").mkdir(exist_ok=True)
            note_jobs(run.directory, (f"{job}_{number}",), by, script)


@contextmanager
def _written(array: PreparedArray) -> Iterator[Path]:
    """The array's script as a file, and a place for its logs; directories that stay empty do not stay."""
    logs = array.directory / "logs"
    with ExitStack() as undo:
        with writing(array.directory):
            undo.callback(_remove_if_empty, array.directory)
            undo.callback(_remove_if_empty, logs)
            logs.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".tmp-array-", dir=array.directory)
            undo.callback(Path(name).unlink, missing_ok=True)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(array.text)
            os.chmod(name, 0o644)
        yield Path(name)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _check_number(count: int) -> None:
    most = most_elements() if client.is_installed() else None
    if most is not None and count > most:
        raise UsageError(
            f"{count} runs are to be started, but a job array has at most {most} elements on this cluster (MaxArraySize"
            " of `scontrol show config`). Take values or seeds out, and put them back when the rest is done."
        )
