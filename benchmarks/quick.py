"""Whether hpclr has become slower: a few ratios of the other benchmarks, beside those in quick.json.

    python benchmarks/quick.py            compares; ends with 1 if a ratio is more than 15 % below the one kept
    python benchmarks/quick.py --write    keeps those found now

Only ratios against dense training are compared, which were measured in turns on this machine, so that another machine
may have others: keep its own with --write, and --kept FILE. A ratio that is too low is measured twice more, and the
best counts, since other programs can only slow things down.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

HERE = Path(__file__).parent
TOLERANCE = 0.85
TRIES = 3
RUNS = {
    "layer": ["layer.py", "--only", "768 x 768", "--rows", "2048", "--repeats", "5"],
    "wide layer": ["layer.py", "--only", "3072 x 768", "--rows", "2048", "--repeats", "5"],
    "step": ["step.py", "--models", "vit-tiny", "--depth", "2", "--shares", "0.5,0.25,0.125", "--repeats", "5"],
}


def main() -> None:
    arguments = parse()
    found = {name: ratios(name) for name in RUNS}
    if arguments.write:
        arguments.kept.write_text(json.dumps({"machine": measure.machine(), "ratios": found}, indent=2) + "\n")
        return
    kept = json.loads(arguments.kept.read_text())["ratios"]
    for name in RUNS:
        for _ in range(TRIES - 1):
            if too_low(found[name], kept[name]):
                found[name] = {what: max(ratio, again) for (what, ratio), again in paired(name, found[name])}
    lines = [
        [f"{name}, {what}", f"{ratio:.2f}", f"{kept[name][what]:.2f}", f"{ratio / kept[name][what]:.2f}"]
        for name in RUNS
        for what, ratio in found[name].items()
    ]
    measure.show(["against dense", "now", "kept", "now / kept"], lines)
    slower = [f"{name}, {what}" for name in RUNS for what in too_low(found[name], kept[name])]
    if slower:
        sys.exit(f"slower than before by more than {1 - TOLERANCE:.0%}: {'; '.join(slower)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep what is found now")
    parser.add_argument("--kept", type=Path, default=HERE / "quick.json", help="where the ratios to compare with are")
    return parser.parse_args()


def ratios(name: str) -> dict[str, float]:
    """What was measured → how many times as fast as dense."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        script, *options = RUNS[name]
        subprocess.run([sys.executable, HERE / script, *options, "--json", file], check=True, stdout=subprocess.DEVNULL)
        results = json.loads(file.read_text())["results"]
    if isinstance(results, list):
        return {f"rank {line['k/min']}": line["hpclr"] for line in results}
    return {
        f"{model} {line['share']:g} {line['form']}": line["speed"] for model, lines in results.items() for line in lines
    }


def paired(name: str, found: dict[str, float]) -> list[tuple[tuple[str, float], float]]:
    """Each ratio beside the same measured anew."""
    again = ratios(name)
    return [((what, ratio), again[what]) for what, ratio in found.items()]


def too_low(found: dict[str, float], kept: dict[str, float]) -> list[str]:
    """What is slower than it was."""
    return [what for what, ratio in found.items() if ratio < TOLERANCE * kept[what]]


if __name__ == "__main__":
    main()
