"""How well a cut by outputs does when few rows of inputs have been seen, with their second moment as it is and shrunk.

    python benchmarks/few_rows.py glosses [--samples 2,4,8,16,32,64,128]
    python benchmarks/few_rows.py images --data fashion-mnist.h5

`glosses`: layers of two blocks of MiniLM-L6, pretrained, and what they take in of definitions of WordNet. `images`:
those of a small vision transformer, trained on five classes of Fashion-MNIST, and of pictures of the other five. Of so
many samples come the rows by which a layer is cut, so that outputs change by 1.4 % at most, or to a quarter of its
rank; 1,000 others tell by how much they do change (√(E‖(W − W_r) x‖² / E‖W x‖²), percent). `rank` is minus the one that
the 1,000 would have it cut to. Means over three draws and all layers with as many inputs. `shrunk` is with C shrunk
however many rows there are; `size` orders directions by their singular values, whatever goes into the layer.
"""

import argparse
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch
from pretrained import Task, glosses, images
from torch import Tensor, nn

from hpclr.lowrank.activations import shrunk
from hpclr.lowrank.ranks import Energy
from hpclr.lowrank.regression import order_by_output

COLUMNS = ("inputs", "rows/inputs", "seen: rank", "error", "shrunk: rank", "error", "1/4: seen", "shrunk", "size")
BLOCKS = {"glosses": ("encoder.encoder.layer.1.", "encoder.encoder.layer.4."), "images": ("blocks.",)}
KEEPS = Energy(0.9998)
DRAWS = 3


class Rows:
    """What layers take in."""

    def __init__(self, model: nn.Module, blocks: tuple[str, ...]) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)}
        self._model, self._sums = model.eval(), dict[str, tuple[Tensor, int]]()
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._add(name, inputs[0]))

    @torch.no_grad()
    def moments(self, task: Task, samples: list[Any]) -> dict[str, tuple[Tensor, int]]:
        """Layer name → the mean of x xᵀ in float64, and over how many rows."""
        self._sums.clear()
        for first in range(0, len(samples), 32):
            self._model(*task.batch(samples[first : first + 32])[0])
        return {name: (total / rows, rows) for name, (total, rows) in self._sums.items()}

    def _add(self, name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        total, rows = self._sums.get(name, (0, 0))
        self._sums[name] = total + x.mT @ x, rows + len(x)


def outcome(weight: Tensor, judged: Tensor, truth: Tensor, rank: int | None = None) -> tuple[int, float]:
    """The rank that W (m×n) is cut to by one second moment, and the error by another, in percent."""
    order = order_by_output(weight, judged)
    u = order.u[:, : rank or KEEPS(order.s, tuple(weight.shape))]
    lost = weight - u @ (u.mT @ weight)
    share = (lost @ truth * lost).sum() / (weight @ truth * weight).sum()
    return u.shape[1], 100 * float(share.clamp_min(0).sqrt())


def trial(weight: Tensor, seen: Tensor, rows: int, truth: Tensor) -> Iterator[float]:
    """One layer's figures, as in `COLUMNS`."""
    n, quarter = weight.shape[1], min(weight.shape) // 4
    needed, _ = outcome(weight, truth, truth)
    ways = (seen, shrunk(seen, rows, enough=torch.inf))
    yield rows / n
    for way in ways:
        rank, error = outcome(weight, way, truth)
        yield from (rank - needed, error)
    for way in (*ways, torch.eye(n).double()):
        yield outcome(weight, way, truth, quarter)[1]


def main() -> None:
    """Cuts layers by the rows of ever more samples, and prints a table."""
    options = parse()
    torch.set_num_threads(options.threads)
    facts = measure.machine()
    task = glosses(4000, 0, 1) if options.task == "glosses" else images(options.data, 4000, 0, 1)
    rows = Rows(task.build(0), BLOCKS[options.task])
    known, others = list(task.train[:1000]), list(task.train[1000:])
    truths, lines = rows.moments(task, known), dict[int, list[list[str]]]()
    for samples in map(int, options.samples.split(",")):
        found: dict[int, list[list[float]]] = {}
        for draw in range(DRAWS):
            seen = rows.moments(task, random.Random(draw).sample(others, samples))
            for name, layer in rows.layers.items():
                weight = layer.weight.detach().double()
                found.setdefault(weight.shape[1], []).append([*trial(weight, *seen[name], truths[name][0])])
        for n, of_n in found.items():
            lines.setdefault(n, []).append(line(n, [statistics.fmean(column) for column in zip(*of_n, strict=True)]))
    print(measure.heading(facts))
    measure.show(COLUMNS, [one for n in sorted(lines) for one in lines[n]])
    measure.write_json(options.json, facts, {"columns": COLUMNS, "lines": lines})


def line(n: int, means: list[float]) -> list[str]:
    share, rank, error, shrunk_rank, shrunk_error, *quarters = means
    cut = (f"{round(rank):+d}", f"{error:.1f}", f"{round(shrunk_rank):+d}", f"{shrunk_error:.1f}")
    return [str(n), f"{share:.2f}", *cut, *(f"{one:.1f}" for one in quarters)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(BLOCKS))
    parser.add_argument("--data", type=Path, help="images: Fashion-MNIST as hpclr's HDF5 file")
    parser.add_argument("--samples", default="2,4,8,16,32,64,128", help="how many are seen")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if options.task == "images" and options.data is None:
        parser.error("images: --data FILE, as `hpclr data prepare fashion-mnist FILE` makes it")
    return options


if __name__ == "__main__":
    main()
