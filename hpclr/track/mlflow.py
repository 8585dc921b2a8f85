"""MLflow: one run of a tracking server for a run of hpclr's, whichever attempt it is in."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import mlflow
import msgspec
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from hpclr.files import write_whole
from hpclr.track.records import Record
from hpclr.track.scalars import scalars, time_of

_AT_ONCE = 1000  # metrics in a message; a server takes no more
_PARAMS_AT_ONCE, _LONGEST_PARAM = 100, 500
_GONE = "RESOURCE_DOES_NOT_EXIST"


class _Known(msgspec.Struct):
    """Which run of the server this one is."""

    uri: str
    run_id: str


class Mlflow:
    """Logs metrics, each step of each of them once.

    A server cannot take anything back, so after a requeue the steps that it has are left out.

    Args:
        note: the file in which the server's run is noted.
        uri: of the server; None: what MLflow itself is told.
        experiment: by name.
        name: of the run.
        params: the settings of the run, logged when it is made.

    Raises:
        Exception: whatever MLflow raises.
    """

    def __init__(self, note: Path, *, uri: str | None, experiment: str, name: str, params: Mapping[str, str]) -> None:
        for logger in ("mlflow", "urllib3.connectionpool"):  # what is wrong is said once, by whoever calls this
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        self._uri = uri or mlflow.get_tracking_uri()
        self._client = mlflow.MlflowClient(tracking_uri=self._uri, registry_uri="")
        self._run_id = self._continued(note) or self._created(note, experiment, name, params)
        self._client.update_run(self._run_id, status="RUNNING")
        self._last: dict[str, int] = {}  # name → the last step that the server has
        self._finished = False

    def write(self, records: Sequence[Record]) -> None:
        """Logs what is new."""
        metrics = [metric for record in records for metric in self._metrics(record)]
        for first in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _AT_ONCE])
        self._finished |= any(record["kind"] == "final" for record in records)

    def close(self) -> None:
        """Marks the run as finished, or as one that has ended before."""
        self._client.set_terminated(self._run_id, "FINISHED" if self._finished else "KILLED")

    def _metrics(self, record: Record) -> list[Metric]:
        found, step, when = [], record["step"], int(1000 * time_of(record))
        for name, value in scalars(record).items():
            if step > self._last_step(name):
                self._last[name] = step
                found.append(Metric(name, value, when, step))
        return found

    def _last_step(self, name: str) -> int:
        if name not in self._last:
            history = self._client.get_metric_history(self._run_id, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]

    def _continued(self, note: Path) -> str | None:
        """The server's run of the attempts before; None if there is none, or it has been deleted."""
        with suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(note.read_bytes(), type=_Known)
            if known.uri == self._uri and self._is_there(known.run_id):
                return known.run_id
        return None

    def _is_there(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == _GONE:
                return False
            raise

    def _created(self, note: Path, experiment: str, name: str, params: Mapping[str, str]) -> str:
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        run_id = str(self._client.create_run(place, run_name=name).info.run_id)
        write_whole(note, msgspec.json.encode(_Known(self._uri, run_id)))
        told = [Param(key, value[:_LONGEST_PARAM]) for key, value in params.items()]
        for first in range(0, len(told), _PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=told[first : first + _PARAMS_AT_ONCE])
        return run_id
