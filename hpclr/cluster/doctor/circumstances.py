"""What the checks must know: where runs live, and which process of how many this is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpclr.cluster.doctor.finding import Finding, warning
from hpclr.config import load_run_file
from hpclr.config.schema import Parallel
from hpclr.errors import UsageError
from hpclr.parallel.meeting.layout import ALONE, Layout
from hpclr.slurm.jobs import Job, this_job
from hpclr.training.processes import slurm_gpus, who_am_i
from hpclr.training.run_directory import runs_directory

_DOUBT = "A run would not start in this way. This page does not need it; `--job` is started as a run is."
_RUN_FILES = ("run.yaml", "submission/run.yaml")


@dataclass(frozen=True)
class Circumstances:
    """Where and as what the doctor runs.

    Attributes:
        asked: the run directory, or where runs live; it need not be there yet.
        directory: it, or what there is of the way to it.
        layout: which process of how many this is.
        settings: the section `parallel` of the run's file, else its defaults.
        gpus: GPUs that the Slurm job has on this node; None without Slurm or without GPUs.
        job: the Slurm job.
        doubt: why it cannot be said which process this is; "" if it can.
    """

    asked: Path
    directory: Path
    layout: Layout
    settings: Parallel
    gpus: int | None
    job: Job | None
    doubt: str = ""

    @property
    def spans_nodes(self) -> bool:
        """Whether processes on other nodes work together with this one."""
        return self.layout.world_size > self.layout.local_size

    def doubts(self) -> Iterator[Finding]:
        """A line about who this is, where that is not clear."""
        if self.doubt:
            yield warning("launcher", self.doubt, _DOUBT)


def look_around(directory: Path | None, *, strict: bool) -> Circumstances:
    """Finds out where and as what this process runs, by files and environment alone.

    Args:
        directory: the run directory; None: where runs live.
        strict: it must be clear which process this is.

    Raises:
        UsageError: if it is not; if the run's file cannot be read; or if there is a file instead of the directory.
    """
    asked = runs_directory(None) if directory is None else directory
    settings = _settings(asked)
    layout, gpus, doubt = ALONE, None, ""
    try:
        layout, gpus = who_am_i(settings.launcher), slurm_gpus()
    except UsageError as error:
        if strict:
            raise
        doubt = str(error)
    return Circumstances(asked, _nearest(asked), layout, settings, gpus, this_job(os.environ), doubt)


def _settings(run: Path) -> Parallel:
    file = next((run / name for name in _RUN_FILES if (run / name).is_file()), None)
    return Parallel() if file is None else load_run_file(file).parallel


def _nearest(path: Path) -> Path:
    """What is there of the way to a directory."""
    whole = path.absolute()
    there = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
    if not os.path.isdir(there):
        raise UsageError(
            f"cannot look at {path}: expected a run directory, or where one will be, but {there} is no directory. "
            "Give the directory of a run, or none to look at where runs live (HPCLR_RUNS, else ./runs)."
        )
    return there
