"""A process that is killed after its sinks have been told of steps that no checkpoint has."""

import signal
import subprocess
import sys

import pytest
from track_helpers import eventually
from training_helpers import hpclr, records, steps_kept

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("tensorboard")

SAVED, STEPS = 20, 30
PROGRAM = """
from hpclr.cli import main
from hpclr.track import follower
follower._INTERVAL, follower._REST = 0.01, 0.0
main()
"""
STALLING = """
import os, time
from torch import nn

class Net(nn.Sequential):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > int(os.environ["STALL_AFTER"]):
            time.sleep(1000)
        return super().forward(x)

def make():
    return Net(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""


def test_after_kill_9_no_step_is_told_twice(bench, tmp_path, monkeypatch):
    (tmp_path / "stalling.py").write_text(STALLING)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/mlruns"
    file = bench.write(
        model={"target": "stalling:make"},
        train={"steps": STEPS},
        validation={"every_steps": 4},  # at which records of losses are written
        checkpoint={"every": SAVED, "keep_best": False},
        track={"tensorboard": True, "mlflow": {"uri": uri}},
    )
    monkeypatch.setenv("STALL_AFTER", str(SAVED + 5))
    with subprocess.Popen([sys.executable, "-c", PROGRAM, "train", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: in_store(tmp_path) > SAVED and in_tensorboard(bench.run)[-1:] > [SAVED])
        finally:
            process.send_signal(signal.SIGKILL)
    assert steps_kept(bench.run)[-1] == SAVED
    monkeypatch.setenv("STALL_AFTER", str(STEPS))
    assert hpclr("train", file).code == 0
    assert records(bench.run, "attempt")[-1]["step"] == SAVED
    assert told(uri) == in_tensorboard(bench.run) == list(range(1, STEPS + 1))


def told(uri: str) -> list[int]:
    """The steps whose loss MLflow has."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("hpclr").experiment_id])
    return sorted(m.step for run in runs for m in client.get_metric_history(run.info.run_id, "train/loss"))


def in_store(path) -> int:
    """How many losses it has by now; read past MLflow, which may be writing."""
    return sum(file.read_bytes().count(b"\n") for file in path.glob("mlruns/*/*/metrics/train/loss"))


def in_tensorboard(run) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return [event.step for event in found.Scalars("train/loss")] if "train/loss" in found.Tags()["scalars"] else []
