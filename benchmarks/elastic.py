"""One model at every rank: nested training against cutting what was trained dense.

    hpclr data prepare digits datasets/digits.h5 --valid-fraction 0.1
    python benchmarks/elastic.py jobs/elastic.yaml
    python benchmarks/elastic.py jobs/fashion-mnist-vit.yaml train.epochs=2 method='{name: nested, delay: 0.7}'

The nested run is the run file's own, with what is put behind it; the dense one differs in its method alone. `nested` is
the first cut to each rank; `dense, cut` the second, in the order of singular values, and `calibrated` in the order of
what directions do to outputs, on --calibrate training samples. Accuracy in per cent on the test split, means over seeds
± standard deviations; behind them the difference of `nested` to `calibrated`, paired by seed, ± its standard error.
Runs are kept in runs/, and one that has ended is not trained again.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure

from hpclr.training.elastic import AtRank, evaluate_at_ranks

WAYS = ("nested", "dense, cut", "calibrated")
COLUMNS = ("rank", "parameters", *WAYS, "nested − calibrated")


def trained(name: str, seed: int, arguments: argparse.Namespace, *overrides: str) -> Path:
    """The directory of a run of the run file."""
    run = f"{arguments.file.stem}-{name}-{seed}"
    options = [f"name={run}", f"train.seed={seed}", *arguments.overrides, *overrides]
    subprocess.run([sys.executable, "-m", "hpclr", "train", arguments.file, *options], check=True, stdout=sys.stderr)
    return Path("runs") / run


def curves(seed: int, arguments: argparse.Namespace) -> dict[str, list[AtRank]]:
    """Way → its model at each rank, of one seed."""
    nested = trained("nested", seed, arguments)
    dense = trained("dense", seed, arguments, "method={name: dense}")
    ways: dict[str, tuple[Path, int | None]] = {
        "nested": (nested, None),
        "dense, cut": (dense, None),
        "calibrated": (dense, arguments.calibrate),
    }
    return {
        way: evaluate_at_ranks(run, arguments.fractions, calibrate=calibrate).points
        for way, (run, calibrate) in ways.items()
    }


def row(found: list[dict[str, list[AtRank]]], place: int) -> tuple[str, ...]:
    """One line of the table, of all seeds."""
    points = {way: [one[way][place] for one in found] for way in WAYS}
    scores = {way: [100 * point.score.values["accuracy"] for point in of_way] for way, of_way in points.items()}
    gains = [one - other for one, other in zip(scores["nested"], scores["calibrated"], strict=True)]
    first = points["nested"][0]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    gain = f"{statistics.mean(gains):+.2f} ± {error:.2f}"
    return f"{first.fraction:g}", f"{first.sizes.stored_share:.1%}", *(spread(scores[way]) for way in WAYS), gain


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("file", type=Path, help="a run file with a nested method")
    parser.add_argument("overrides", nargs="*", help="as for hpclr train")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--fractions", default="1,0.5,0.25,0.125")
    parser.add_argument("--calibrate", type=int, default=512)
    arguments = parser.parse_intermixed_args()
    measure.begin(arguments)
    arguments.fractions = [float(fraction) for fraction in arguments.fractions.split(",")]
    found = [curves(int(seed), arguments) for seed in arguments.seeds.split(",")]
    print(measure.heading(measure.machine()))
    measure.show(COLUMNS, [row(found, place) for place in range(len(arguments.fractions))])
    results: list[Any] = [{way: [point.as_dict() for point in one[way]] for way in WAYS} for one in found]
    measure.write_json(arguments.json, measure.machine(), results)


if __name__ == "__main__":
    main()
