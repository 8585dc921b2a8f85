"""What the files of a run directory tell, for a page: settings, summary, records, how it stands."""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from hpclr.cluster.progress import progress_of
from hpclr.config import RunFile, load_run_file
from hpclr.config.leaves import leaves
from hpclr.errors import UsageError
from hpclr.files import open_regular
from hpclr.report.records import Point, Records, Table, read_records
from hpclr.report.spectra import Spectra, spectra_of
from hpclr.training.run_directory import RunDirectory, reading
from hpclr.training.scores import METRICS, judged_by

_LARGEST = 64 << 20  # bytes of a summary
_KEYS_OF_SUMMARY = ("test", "best_validation", "sizes", "cost")


_Side = Annotated[int, msgspec.Meta(ge=1, le=2**53)]


class _Layer(msgspec.Struct):
    """An entry of a summary."""

    name: str
    shape: tuple[_Side, _Side]


@dataclass(frozen=True)
class Attempt:
    """A start of a run.

    Attributes:
        number: counted from 1.
        step: after which it went on.
        seconds: since the run began; NaN if not known.
    """

    number: float
    step: float
    seconds: float


class Lap(NamedTuple):
    """What a record of pace tells: up to this step, so many seconds for so many steps."""

    step: float
    seconds: float
    steps: float


@dataclass(frozen=True)
class Clock:
    """Seconds since a run began, for its records.

    Attributes:
        start: Unix time of its first record; None for records without times.
        anchors: where there are none: steps, and seconds of training until then, both growing.
    """

    start: float | None
    anchors: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def known(self) -> bool:
        """Whether it can tell anything."""
        return self.start is not None or len(self.anchors[0]) > 1

    def points(self, table: Table, y: str) -> list[Point]:
        """A column over the seconds."""
        if self.start is not None:
            return [(time - self.start, value) for time, value in table.points("time", y)]
        return [(self._at(step), value) for step, value in table.points("step", y)] if self.known else []

    def _at(self, step: float) -> float:
        """Between two anchors time goes on evenly."""
        steps, seconds = self.anchors
        right = min(max(1, bisect_left(steps, step)), len(steps) - 1)
        (a, b), (s, t) = steps[right - 1 : right + 1], seconds[right - 1 : right + 1]
        return s + (t - s) * (step - a) / (b - a)


@dataclass
class Run:
    """A run directory, as far as it can be read.

    Attributes:
        path: the directory.
        name: by which the page calls it.
        state: how it stands, in words.
        settings: key of the run file → value, in words.
        summary: of a finished run; else what is known of it until now, in the same form.
        records: of metrics.jsonl.
        spectra: of the newest checkpoint.
        faults: what could not be read, in words.
    """

    path: Path
    name: str
    state: str
    settings: dict[str, str]
    summary: dict[str, Any]
    records: Records
    spectra: Spectra
    faults: list[str] = field(default_factory=list)

    def table(self, kind: str) -> Table:
        """The records of a kind."""
        return self.records.tables[kind]

    @cached_property
    def full_ranks(self) -> dict[str, int]:
        """Of layers whose shape is known, by the summary or the newest checkpoint."""
        listed = self.summary.get("layers")
        found = {one.name: one.full for one in self.spectra.layers}
        for layer in listed if isinstance(listed, list) else ():
            with suppress(msgspec.ValidationError):
                known = msgspec.convert(layer, _Layer)
                found[known.name] = min(known.shape)
        return found

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Those recorded, oldest first."""
        table, start = self.table("attempt"), self.clock.start
        rows = zip(table["attempt"], table["step"], table["time"], strict=True)
        return [Attempt(n, step, time - (start or 0.0)) for n, step, time in rows if n == n]

    @property
    def laps(self) -> list[Lap]:
        """The records of pace that tell both seconds and steps."""
        pace = self.table("pace")
        laps = map(Lap, pace["step"], pace["seconds"], pace["steps"])
        return [lap for lap in laps if lap.seconds == lap.seconds and lap.steps > 0]

    @cached_property
    def clock(self) -> Clock:
        """By the times in the records, or else by the seconds that checks and validations have."""
        times = [time for table in self.records.tables.values() for time in table["time"] if time == time]
        pairs = [pair for kind in ("check", "valid") for pair in self.table(kind).points("step", "seconds")]
        anchors, last = {0.0: 0.0}, 0.0
        for step, seconds in sorted(pairs):
            if seconds >= last:
                anchors[step] = last = seconds
        return Clock(min(times, default=None), (tuple(anchors), tuple(anchors.values())))


def read_runs(paths: Sequence[Path], *, spectra: bool = True) -> list[Run]:
    """Reads run directories; files that are missing or damaged in part are made the most of.

    Args:
        paths: the directories.
        spectra: whether to read the newest checkpoints.

    Raises:
        UsageError: if one of them holds no run, or may not be read.
    """
    paths = list(dict.fromkeys(paths))
    names = [path.resolve().name for path in paths]
    called = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    runs = []
    for path, name in zip(paths, called, strict=True):
        with reading(path):  # files may vanish while they are looked at
            runs.append(_read(RunDirectory(path), name, spectra))
    return runs


def _read(directory: RunDirectory, name: str, spectra: bool) -> Run:
    if not directory.exists:
        raise UsageError(
            f"{directory.path}: there is no run; expected the directory of one, such as runs/digits, with its run.yaml"
        )
    with reading(directory.metrics):
        records = read_records(directory.metrics)
    faults: list[str] = []
    run = _run_file(directory, faults)
    if records.faulty:
        faults.append(_faults_of(records, directory.metrics))
    if records.lost:
        faults.append(f"{directory.metrics} has gaps: {records.lost:,.0f} records were lost, its disk being full")
    left_out = Spectra(why="The spectra were left out.")
    return Run(
        path=directory.path,
        name=name,
        state=_state(directory.path),
        settings={} if run is None else _settings(run),
        summary=_summary(directory, faults) or _until_now(records, None if run is None else judged_by(run)),
        records=records,
        spectra=spectra_of(directory.path) if spectra else left_out,
        faults=faults,
    )


def _faults_of(records: Records, path: Path) -> str:
    more = "" if records.faulty == len(records.faults) else f"; and {records.faulty - len(records.faults):,} more"
    return (
        f"{path}: {records.faulty:,} of {records.lines:,} lines are no records and were passed over "
        f"({'; '.join(records.faults)}{more})"
    )


def _state(run: Path) -> str:
    """How the run stands, by its files alone."""
    progress = progress_of(run)
    if progress.finished:
        return "finished"
    of = f" of {progress.steps:,}" if progress.steps else ""
    step = f"step {progress.step or 0:,}{of}"
    if progress.outcome is not None:
        why = f": {progress.outcome.message}" if progress.outcome.is_failure else ""
        return f"{step}; the last attempt has ended ({progress.outcome.name}){why}"
    if progress.silence is None:
        return step
    return f"{step}; last sign of life {progress.silence:,.0f} s ago"


def _run_file(directory: RunDirectory, faults: list[str]) -> RunFile | None:
    try:
        if directory.run_file.exists() and not directory.run_file.is_file():
            raise UsageError("it is no regular file")
        return load_run_file(directory.run_file)
    except UsageError as error:
        faults.append(f"{directory.run_file} cannot be used, so that settings are not known: {error}")
        return None


def _settings(run: RunFile) -> dict[str, str]:
    found = leaves(msgspec.to_builtins(run))
    return {".".join(path): _in_words(value) for path, value in found.items() if path != ("name",)}


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _summary(directory: RunDirectory, faults: list[str]) -> dict[str, Any] | None:
    """What a finished run has come to; None while it is none, or if that cannot be read."""
    try:
        with open_regular(directory.summary) as file:
            summary = msgspec.json.decode(file.read(_LARGEST), type=dict[str, Any])
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        faults.append(f"{directory.summary} cannot be used: {error}")
        return None
    return summary | {key: _dictionary(summary.get(key)) for key in _KEYS_OF_SUMMARY}


def _dictionary(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _until_now(records: Records, metric: str | None) -> dict[str, Any]:
    """What is known of a run that goes on, and is judged by this metric, as in its summary."""
    check, valid, pace = (records.tables[kind] for kind in ("check", "valid", "pace"))
    sizes = {name: check[name][-1] for name in check.columns if len(check) and check[name][-1] == check[name][-1]}
    seconds = [value for table in (check, valid) for value in table["seconds"] if value == value]
    memory = [value for value in pace["memory"] if value == value]
    return {
        "test": {},
        "best_validation": _best(valid, metric),
        "sizes": sizes,
        "cost": {"peak_memory_bytes": max(memory)} if memory else {},
        "steps": records.last_step,
        "seconds": max(seconds, default=None),
    }


def _best(valid: Table, metric: str | None) -> dict[str, float]:
    """All scores of the validation that is the best so far; of several that are equal the first, as training has it."""
    if metric is None:  # the run file does not tell
        metric = "accuracy" if valid.points("step", "accuracy") else "loss"
    sign = 1 if METRICS[metric].higher_is_better else -1
    rows = [row for row, value in enumerate(valid[metric]) if value == value]
    best = max(rows, key=lambda row: sign * valid[metric][row], default=None)
    scores = {} if best is None else {name: valid[name][best] for name in METRICS}
    return {name: value for name, value in scores.items() if value == value}
