"""Pictures of what layer.py and step.py have measured.

python benchmarks/picture.py --layer layer.json --step step.json --out docs/images
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "hpclr", "svg.fonttype": "none"}

import matplotlib.pyplot as plt  # noqa: E402

MARKS = "osD^vP"  # told apart without colours, too


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.layer:
        layers(json.loads(arguments.layer.read_text())["results"], arguments.out / "layer.svg")
    if arguments.step:
        merged: dict[str, Any] = {}
        for file in arguments.step:
            merged |= json.loads(file.read_text())["results"]
        steps(merged, arguments.out / "step.svg")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=Path)
    parser.add_argument("--step", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    return parser.parse_args()


def layers(results: list[dict[str, Any]], file: Path) -> None:
    """Speed against rank: measured, and as far as the operations allow."""
    names = list(dict.fromkeys((line["layer"], line["rows"]) for line in results))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("linear", "convolutions"), strict=True):
        chosen = [name for name in names if name[0].startswith("conv") == (kind == "convolutions")]
        for mark, (layer, rows) in zip(MARKS * 2, chosen, strict=False):
            points = sorted(
                (float(line["k/min"].rstrip("*")), line["hpclr"], line["bound"])
                for line in results
                if (line["layer"], line["rows"]) == (layer, rows)
            )
            ranks, measured, bound = zip(*points, strict=True)
            (drawn,) = axis.plot(ranks, measured, marker=mark, label=f"{layer}, {rows:,} rows")
            axis.plot(ranks, bound, "--", color=drawn.get_color(), linewidth=1)
        _logarithmic(axis, "rank / full rank", kind)
    axes[0].set_ylabel("times as fast as dense (dashed: bound)")
    figure.savefig(file, metadata={"Date": None})


def steps(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """A whole step: speed, and peak memory, against mean rank."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for mark, (model, lines) in zip(MARKS, results.items(), strict=False):
        chosen = sorted((line for line in lines if line["form"] == "equal pays"), key=lambda line: line["share"])
        shares = [line["share"] for line in chosen]
        axes[0].plot(shares, [line["speed"] for line in chosen], marker=mark, label=model)
        axes[1].plot(shares, [line["of_dense"]["peak_bytes"] for line in chosen], marker=mark, label=model)
    _logarithmic(axes[0], "mean rank / full rank", "speed, times dense")
    axes[1].set(xscale="log", xlabel="mean rank / full rank", title="peak memory, share of dense")
    axes[1].set_xticks([0.125, 0.25, 0.5, 1], ["1/8", "1/4", "1/2", "1"])
    axes[1].minorticks_off()
    figure.savefig(file, metadata={"Date": None})


def _logarithmic(axis: Any, label: str, title: str) -> None:
    axis.axhline(1, color="0.6", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel=label, title=title)
    axis.set_xticks([0.125, 0.25, 0.5, 1], ["1/8", "1/4", "1/2", "1"])
    axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axis.minorticks_off()
    axis.legend(fontsize=7)


if __name__ == "__main__":
    main()
