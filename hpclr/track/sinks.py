"""Which programs are told of a run, by the section `track` of its run file."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import msgspec

from hpclr.config import RunFile
from hpclr.config.leaves import leaves
from hpclr.config.schema import Mlflow as Server
from hpclr.config.schema import Track
from hpclr.errors import UsageError
from hpclr.track.follower import Sink, followed

_MLFLOW_MEANS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a job tells only whom its run file names
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where a program looks for the run's directory
    # MLflow's own patience is four minutes, and two for each answer, in which nobody is told that a server is away
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def require_packages(settings: Track | None) -> None:
    """Refuses, before anything is done, to tell programs that are not installed.

    Raises:
        UsageError: naming what to install.
    """
    settings = settings or Track()
    wanted = {"tensorboard": (settings.tensorboard, "track"), "mlflow": (settings.mlflow is not None, "mlflow")}
    for package, (asked, extra) in wanted.items():
        if asked and find_spec(package) is None:
            raise UsageError(
                f"track.{package} asks for records in {package}, which is not installed here: "
                f"pip install 'hpclr[{extra}]', or leave track.{package} out"
            )


def tracked(
    run_directory: Path, metrics: Path, run: RunFile, *, finished: bool = False
) -> AbstractContextManager[None]:
    """Tells the programs that a run file names of all that metrics.jsonl has and gets, while the block goes on.

    Args:
        run_directory: of the run.
        metrics: its records.
        run: the run file.
        finished: as `followed`.
    """
    settings = run.track or Track()
    sinks: dict[str, Callable[[], Sink]] = {}
    if settings.tensorboard:
        sinks["TensorBoard"] = lambda: _tensorboard(run_directory)
    if (told := settings.mlflow) is not None:
        sinks["MLflow"] = lambda: _mlflow(run_directory, run, told)
    return followed(metrics, sinks, finished=finished)


def _tensorboard(run_directory: Path) -> Sink:
    from hpclr.track.tensorboard import TensorBoard

    return TensorBoard(run_directory / "tensorboard")


def _mlflow(run_directory: Path, run: RunFile, settings: Server) -> Sink:
    for name, value in _MLFLOW_MEANS.items():
        os.environ.setdefault(name, value)
    from hpclr.track.mlflow import Mlflow

    return Mlflow(
        run_directory / "mlflow.json",
        uri=settings.uri,
        experiment=settings.experiment,
        name=run.name,
        params={".".join(path): str(value) for path, value in leaves(msgspec.to_builtins(run)).items()},
    )
