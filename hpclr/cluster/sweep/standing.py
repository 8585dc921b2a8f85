"""How far the runs of a sweep have come, and which runs it once had that it has no longer."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from hpclr.cluster.status import Status, runs_in, statuses
from hpclr.cluster.sweep.files import Point
from hpclr.cluster.sweep.points import Sweep
from hpclr.config import RunFile, differences, load_run_file
from hpclr.config.describe import show
from hpclr.errors import UsageError
from hpclr.files import open_regular, write_whole
from hpclr.output import on_one_line
from hpclr.training.run_directory import RunDirectory, writing

_RECORD = "sweep.json"


@dataclass(frozen=True)
class Standing:
    """How far a run has come.

    Attributes:
        words: what it does, for a person.
        waits: whether it is to be started: it is not finished, and nobody is at it.
        step: the last that is saved; of a finished run the last of all.
        summary: what a finished run has come to, also if it is to be longer now.
        unknown: whether it has a job of which nothing is known, so that it cannot be started.
    """

    words: str
    waits: bool
    step: int
    summary: Mapping[str, Any] | None = None
    unknown: bool = False

    @property
    def finished(self) -> bool:
        """Whether it has come to its end, and is not to be longer."""
        return self.summary is not None and not self.waits


def directory_of(sweep: Sweep, runs: Path) -> Path:
    """Where a sweep keeps what belongs to no run: `runs/NAME.sweep`; of a comparison `runs/NAME.compare`."""
    return runs / f"{sweep.name}.{sweep.command}"


def standings(points: Sequence[Point], runs: Path, kind: str = "sweep") -> dict[str, Standing]:
    """How far each run has come, by its name; Slurm is asked once.

    Raises:
        UsageError: if a run cannot be started, since its directory holds something else; names all of them.
    """
    _check_places(points, runs, kind)
    finished = {point.name: come_to_an_end(point, runs) for point in points}
    open_ = [runs / name for name, found in finished.items() if found is None or found.waits]
    others = _of_others(open_, set(runs_in(runs)))
    return {name: _together(found, others.get(runs / name)) for name, found in finished.items()}


def plan(sweep: Sweep, standing: Mapping[str, Standing], runs: Path) -> str:
    """What would be started, run by run, and what there is besides."""
    width = max(map(len, standing))
    lines = [
        f"{name:{width}}  {found.words}{'' if found.waits else ' (is left alone)'}" for name, found in standing.items()
    ]
    count = sum(found.waits for found in standing.values())
    lines.append(f"{sweep.name}: {len(standing)} runs in {runs}, of which {count} are to be started")
    if others := strangers(sweep, runs):
        lines.append(f"not asked for now, and left as they are: {', '.join(others)}")
    return "\n".join(lines)


def strangers(sweep: Sweep, runs: Path) -> list[str]:
    """The runs that the sweep had when it was started before, and does not have now, but that are still there."""
    mine = {point.name for point in sweep.points}
    return [name for name in _recorded(sweep, runs) if name not in mine and (runs / name).is_dir()]


def remember(sweep: Sweep, runs: Path) -> Path:
    """Writes down which runs the sweep has; returns the directory where that is.

    Raises:
        HpclrError: as `writing`.
    """
    directory = directory_of(sweep, runs)
    names = {**_recorded(sweep, runs), **{point.name: dict(point.values) for point in sweep.points}}
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / _RECORD, msgspec.json.format(msgspec.json.encode(names), indent=2) + b"\n")
    return directory


def _recorded(sweep: Sweep, runs: Path) -> dict[str, dict[str, Any]]:
    file = directory_of(sweep, runs) / _RECORD
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, dict[str, Any]])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {file}: {error}. It says which runs the {sweep.kind} has had; remove it, and runs that no "
            f"longer belong to the {sweep.kind} are not named any more."
        ) from None


def _check_places(points: Sequence[Point], runs: Path, kind: str) -> None:
    faults = [fault for point in points if (fault := fault_of(point, runs, kind))]
    if faults:
        how = "name=…" if kind == "comparison" else "`name:` in its file"
        raise UsageError("\n".join([*faults, f"Take the changes back, or give the {kind} another name, with {how}."]))


def fault_of(point: Point, runs: Path, kind: str) -> str | None:
    """Why a run cannot be started, or gone on with, in its directory; None if it can.

    Args:
        point: the run.
        runs: the directory that holds them.
        kind: what it belongs to. In a comparison a run is not made longer: it would have another schedule than those
            that have been as long from the first step.
    """
    directory = RunDirectory(runs / point.name)
    if directory.exists:
        return _difference(directory, point.run, kind)
    try:
        directory.check_place()
    except UsageError as error:
        return str(error).removesuffix("; choose another name (name=…)")
    return None


def _difference(directory: RunDirectory, asked: RunFile, kind: str) -> str | None:
    try:
        stored = load_run_file(directory.run_file)
    except UsageError as error:
        return str(error)
    longer = _growth(stored, asked) if kind == "comparison" else []
    listed = dict.fromkeys([*differences(stored, asked), *longer])
    return f"{directory.path} holds a run of another run file. What differs: {'; '.join(listed)}" if listed else None


def _growth(stored: RunFile, asked: RunFile) -> list[str]:
    """What `differences` allows."""
    pairs = {key: (getattr(stored.train, key), getattr(asked.train, key)) for key in ("steps", "epochs")}
    return [f"train.{key}: {show(old)} in the run, {show(new)} now" for key, (old, new) in pairs.items() if old != new]


def _of_others(unfinished: Sequence[Path], there: Container[Path]) -> dict[Path, Standing]:
    known = {status.run: status for status in statuses([run for run in unfinished if run in there])}
    return {run: _standing(known[run]) if run in known else Standing("new", waits=True, step=0) for run in unfinished}


def _standing(status: Status) -> Standing:
    progress = status.progress
    step = progress.saved_step or 0
    words = status.summary if status.complaint is None else f"{status.summary}: {on_one_line(status.complaint)}"
    return Standing(words, waits=status.live is False, step=step, unknown=status.live is None)


def _together(found: Standing | None, other: Standing | None) -> Standing:
    """What is known of a run by its results, and by what goes on in it."""
    if found is None or other is None:
        return found or other or Standing("new", waits=True, step=0)
    return replace(found if other.waits else other, summary=found.summary)


def come_to_an_end(point: Point, runs: Path) -> Standing | None:
    """What a run has come to, which waits if it is to be longer now; None if it is not finished."""
    directory = RunDirectory(runs / point.name)
    if not (directory.exists and directory.summary.exists()):
        return None
    try:
        with open_regular(directory.summary) as file:
            summary = msgspec.json.decode(file.read(), type=dict[str, Any])
        step = msgspec.convert(summary.get("steps"), int)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        return Standing(f"damaged: {directory.summary} cannot be read: {error}", waits=False, step=0)
    longer = _length(load_run_file(directory.run_file)) != _length(point.run)
    return Standing(f"stopped (at step {step})" if longer else "finished", waits=longer, step=step, summary=summary)


def _length(run: RunFile) -> tuple[int | None, int | None, int | None]:
    return run.train.steps, run.train.epochs, run.validation.patience
