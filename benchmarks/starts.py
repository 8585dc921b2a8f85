"""Starting a multilayer perceptron from the data (`model.init: svd`) against starting it at random.

    python benchmarks/starts.py digits
    python benchmarks/starts.py series --data appliances.h5 --epochs 10
    python benchmarks/starts.py digits --hidden '64;256,256' --activations relu,tanh --rates 0.001,0.01 --seeds 0,1,2

The same seeds, learning rates and numbers of steps both ways, AdamW at a constant rate. `start`, `epoch N` and `end`
are losses on the validation split: cross-entropy, or the mean squared error of a series. `test` is the score on the
test split after the last step: accuracy in per cent, or mean squared error. Means over seeds ± standard deviations.
The row `linear` is the best linear map by itself, without training: for classes that of squared errors, whose outputs
times the best factor are the logits.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure

from hpclr.config import RunFile, load_run_file
from hpclr.training.assembly import assemble
from hpclr.training.metrics import read_metrics
from hpclr.training.run import train

COLUMNS = ("model", "lr", "init", "start", "epoch 1", "epoch 3", "end", "test")
WINDOW = {"context": 24, "horizon": 12}


class Way(NamedTuple):
    """One row of the table."""

    hidden: tuple[int, ...]
    activation: str
    rate: float
    init: str | None

    def run_file(self, data: dict[str, Any], seed: int, epochs: int, threads: int) -> dict[str, Any]:
        return {
            "name": "-".join(map(str, (*self.hidden, self.activation, self.rate, self.init, seed))),
            "model": {"name": "mlp", "hidden": self.hidden, "activation": self.activation, "init": self.init},
            "data": data,
            "optimizer": {"name": "adamw", "lr": self.rate},
            "train": {"epochs": epochs, "seed": seed, "threads": threads or "auto"},
            "checkpoint": {"every": 10**6},
        }


class Found(NamedTuple):
    """What one run has come to."""

    start: float
    first: float
    third: float
    end: float
    test: float


def written(directory: Path, content: dict[str, Any]) -> RunFile:
    file = directory / "run.yaml"
    file.write_text(json.dumps(content))
    return load_run_file(file)


def at_start(run: RunFile) -> tuple[float, float]:
    """The loss on the validation split and the score on the test split, before any step."""
    parts = assemble(run)
    assert parts.valid is not None, "the data needs a validation split: hpclr data prepare --valid-fraction 0.1"
    valid, test = (parts.task.score(parts.model, loader, parts.precision) for loader in (parts.valid, parts.test))
    return valid.loss, score(test.metrics)


def score(metrics: dict[str, float]) -> float:
    return 100 * metrics["accuracy"] if "accuracy" in metrics else metrics["mse"]


def trained(directory: Path, run: RunFile) -> Found:
    start, _ = at_start(run)
    made = train(run, directory / "runs")
    losses = [record["loss"] for record in read_metrics(made.metrics) if record["kind"] == "valid"]
    test = json.loads(made.summary.read_text())["test"]
    return Found(start, losses[0], losses[min(2, len(losses) - 1)], losses[-1], score(test))


def cells(found: list[Found]) -> list[str]:
    digits = (3, 3, 3, 3, 1 if found[0].test > 2 else 3)
    return [spread([one[i] for one in found], places) for i, places in enumerate(digits)]


def spread(values: list[float], places: int) -> str:
    beyond = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{beyond}"


def rows(directory: Path, arguments: Any) -> Iterator[tuple[list[str], dict[str, Any]]]:
    data = data_of(directory, arguments)
    linear = Way((), "relu", 1e-3, "svd").run_file(data, 0, 1, arguments.threads)
    loss, test = at_start(written(directory, linear))
    yield (
        ["linear", "", "", f"{loss:.3f}", "", "", "", f"{test:.1f}" if test > 2 else f"{test:.3f}"],
        {"linear": [loss, test]},
    )
    hidden = [tuple(map(int, widths.split(","))) for widths in arguments.hidden.split(";")]
    rates = map(float, arguments.rates.split(","))
    for way in itertools.starmap(
        Way, itertools.product(hidden, arguments.activations.split(","), rates, [None, "svd"])
    ):
        files = [
            way.run_file(data, int(seed), arguments.epochs, arguments.threads) for seed in arguments.seeds.split(",")
        ]
        found = [trained(directory, written(directory, file)) for file in files]
        name = f"{','.join(map(str, way.hidden))} {way.activation}"
        yield [name, f"{way.rate:g}", way.init or "random", *cells(found)], way._asdict() | {"runs": found}


def data_of(directory: Path, arguments: Any) -> dict[str, Any]:
    if arguments.subject == "series":
        assert arguments.data is not None, "series needs --data FILE, as hpclr data prepare csv writes it"
        return {"path": str(arguments.data), "batch_size": 64} | WINDOW
    path = arguments.data or directory / "digits.h5"
    if arguments.data is None:
        options = ["--valid-fraction", "0.2"]
        subprocess.run([sys.executable, "-m", "hpclr", "data", "prepare", "digits", path, *options], check=True)
    return {"path": str(path), "batch_size": 64}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("subject", choices=("digits", "series"))
    parser.add_argument("--data", type=Path, help="a prepared file; digits are prepared where there is none")
    parser.add_argument("--hidden", default="64;256,256", help="widths of the hidden layers; ';' between models")
    parser.add_argument("--activations", default="relu,tanh")
    parser.add_argument("--rates", default="0.001", help="learning rates")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    measure.begin(arguments)
    with tempfile.TemporaryDirectory() as directory:
        table, results = zip(*rows(Path(directory), arguments), strict=True)
    print(measure.heading(measure.machine()))
    measure.show(COLUMNS, table)
    measure.write_json(arguments.json, measure.machine(), results)


if __name__ == "__main__":
    main()
