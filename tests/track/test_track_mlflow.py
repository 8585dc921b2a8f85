"""A real MLflow, with its store of files: every step once, one run for all attempts, faults."""

import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from track_helpers import train, write
from training_helpers import as_killed_after, hpclr, records

from hpclr.track import follower

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _store(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def uri(tmp_path) -> str:
    return f"file://{tmp_path}/mlruns"


def logged(uri: str) -> list:
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("hpclr").experiment_id])
    return [(run, {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}) for run in found]


def test_a_run_and_its_requeue_are_one_run_there(bench, uri):
    settings = {"track": {"mlflow": {"uri": uri}}, "checkpoint": {"every": 1, "keep": 20}}
    run = bench.train(**settings)
    killed = as_killed_after(run, 7, bench.path / "killed")
    run.rename(bench.path / "uninterrupted")
    killed.rename(run)
    done = hpclr("train", bench.write(**settings))
    assert done.code == 0, done.err
    assert "warning" not in done.err
    ((there, metrics),) = logged(uri)
    assert there.info.run_id == json.loads((run / "mlflow.json").read_text())["run_id"]
    assert there.info.run_name == "run"
    assert there.info.status == "FINISHED"
    assert there.data.params["method.name"] == "oialr"
    expected = [(r["step"], r["loss"], int(1000 * r["time"])) for r in records(run, "train")]
    found = sorted((m.step, m.value, m.timestamp) for m in metrics["train/loss"])
    assert [step for step, *_ in found] == list(range(1, 14))
    assert [value[:2] for value in found] == [value[:2] for value in expected]
    for name in set(metrics) - {"train/loss"}:
        at = [metric.step for metric in metrics[name]]
        assert len(at) == len(set(at)), name
    assert {"valid/accuracy", "test/accuracy", "parameters/trained", "memory/bytes"} <= set(metrics)


def test_a_longer_run_goes_on_there(bench, uri):
    bench.train(train={"steps": 5}, track={"mlflow": {"uri": uri}})
    bench.train(train={"steps": 8}, track={"mlflow": {"uri": uri}})
    ((_, metrics),) = logged(uri)
    assert [metric.step for metric in metrics["train/loss"]] == list(range(1, 9))


def test_what_was_not_told_is_told_when_a_finished_run_is_started_again(bench, uri, monkeypatch):
    monkeypatch.setattr(follower, "LAST_WAIT", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    bench.train(train={"steps": 5}, track={"mlflow": {"uri": "http://127.0.0.1:9"}})
    done = hpclr("train", bench.write(train={"steps": 5}, track={"mlflow": {"uri": uri}}))
    assert "this run is finished" in done.err
    ((there, metrics),) = logged(uri)
    assert there.info.status == "FINISHED"
    assert [metric.step for metric in metrics["train/loss"]] == list(range(1, 6))
    assert "test/accuracy" in metrics


class Answers(BaseHTTPRequestHandler):
    """Of a server that has one run, which lacks everything."""

    def do_GET(self) -> None:
        info = {"run_id": "r", "status": "RUNNING", "lifecycle_stage": "active", "experiment_id": "0"}
        content = json.dumps({"experiment": {"experiment_id": "0"}, "run": {"info": info, "data": {}}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *words: object) -> None:
        """Nothing."""


def test_standard_output_is_for_the_run_directory_alone(bench):
    """MLflow prints addresses there when a run of a server ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        done = hpclr("train", bench.write(train={"steps": 5}, track={"mlflow": {"uri": uri}}))
        server.shutdown()
    assert done.code == 0, done.err
    assert "warning" not in done.err
    assert done.out.split() == ["runs/run"]


def sink(tmp_path, uri: str):
    from hpclr.track.mlflow import Mlflow

    return Mlflow(tmp_path / "mlflow.json", uri=uri, experiment="hpclr", name="a", params={"k": "v" * 9999})


def test_a_run_that_is_gone_there_is_made_anew(tmp_path, uri):
    first = sink(tmp_path, uri)
    first.close()
    mlflow.MlflowClient(tracking_uri=uri).delete_run(json.loads((tmp_path / "mlflow.json").read_text())["run_id"])
    (tmp_path / "other").write_text("{")
    again = sink(tmp_path, uri)
    again.write([train(1)])
    again.close()
    ((run, metrics),) = logged(uri)
    assert run.info.status == "KILLED"
    assert [metric.step for metric in metrics["train/loss"]] == [1]
    (tmp_path / "mlflow.json").write_text('{"uri":')
    sink(tmp_path, uri).close()
    assert len(logged(uri)) == 2


def test_a_server_that_is_away_delays_nothing_and_gets_all_later(bench, uri, monkeypatch):
    monkeypatch.setattr(follower, "LAST_WAIT", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = {"mlflow": {"uri": "http://127.0.0.1:9"}}
    done = hpclr("train", bench.write(train={"steps": 5}, track=away))
    assert done.code == 0
    assert done.err.count("warning: MLflow") == 1
    bench.train(train={"steps": 8}, track={"mlflow": {"uri": uri}})
    ((_, metrics),) = logged(uri)
    assert [metric.step for metric in metrics["train/loss"]] == list(range(1, 9))


def test_a_server_that_accepts_and_never_answers_delays_nothing(bench, tmp_path):
    """In a process of its own: at its end nothing must wait for the server either, whose patience is minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        file = bench.write(train={"steps": 8}, track={"mlflow": {"uri": uri}})
        began = time.monotonic()
        program = "from hpclr.track import follower; follower.LAST_WAIT = 1.0; from hpclr.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, "train", file], capture_output=True, text=True, timeout=100, check=False
        )
        took = time.monotonic() - began
        silent.settimeout(0.1)
        silent.accept()  # it has been asked
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning") == 1
    assert "MLflow: it does not take the last records in time" in done.stderr
    assert records(bench.run, "train")[-1]["step"] == 8
    assert took < 30


def test_what_is_logged_twice_in_the_records_is_there_once(tmp_path, uri):
    write(tmp_path / "metrics.jsonl", train(1))
    one = sink(tmp_path, uri)
    one.write([train(1), train(2)])
    one.write([train(2), train(1), train(3)])
    one.close()
    ((_, metrics),) = logged(uri)
    assert sorted(metric.step for metric in metrics["train/loss"]) == [1, 2, 3]
