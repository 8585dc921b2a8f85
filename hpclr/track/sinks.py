"""Which programs are told of a run, by the section `track` of its run file."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import msgspec

from hpclr.config import RunFile
from hpclr.config.leaves import leaves
from hpclr.config.schema import Track
from hpclr.errors import UsageError
from hpclr.track.follower import Sink, followed


def require_packages(settings: Track) -> None:
    """Refuses, before anything is done, to tell programs that are not installed.

    Raises:
        UsageError: naming what to install.
    """
    wanted = {"tensorboard": (settings.tensorboard, "track"), "mlflow": (settings.mlflow is not None, "mlflow")}
    for package, (asked, extra) in wanted.items():
        if asked and find_spec(package) is None:
            raise UsageError(
                f"track.{package} asks for records in {package}, which is not installed here: "
                f"pip install 'hpclr[{extra}]', or leave track.{package} out"
            )


def tracked(run_directory: Path, metrics: Path, run: RunFile) -> AbstractContextManager[None]:
    """Tells the programs that a run file names of all that metrics.jsonl has and gets, while the block goes on."""
    sinks: dict[str, Callable[[], Sink]] = {}
    if run.track.tensorboard:
        sinks["TensorBoard"] = lambda: _tensorboard(run_directory)
    if run.track.mlflow is not None:
        sinks["MLflow"] = lambda: _mlflow(run_directory, run)
    return followed(metrics, sinks)


def _tensorboard(run_directory: Path) -> Sink:
    from hpclr.track.tensorboard import TensorBoard

    return TensorBoard(run_directory / "tensorboard")


def _mlflow(run_directory: Path, run: RunFile) -> Sink:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a job tells only whom its run file names
    from hpclr.track.mlflow import Mlflow

    settings = run.track.mlflow
    assert settings is not None
    return Mlflow(
        run_directory / "mlflow.json",
        uri=settings.uri,
        experiment=settings.experiment,
        name=run.name,
        params={".".join(path): str(value) for path, value in leaves(msgspec.to_builtins(run)).items()},
    )
