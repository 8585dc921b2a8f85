"""One layer, forward and backward (or forward alone), against torch's own dense layer.

    python benchmarks/layer.py [--inference] [--compile] [--device cuda --dtype bfloat16] [--only 768] [--json FILE]

`dense ms` is the time of nn.Linear or nn.Conv2d; all other figures say how many times as fast a way is. `plain` writes
the three products down, x V Σ Uᵀ, and leaves the rest to autograd. `bound` is the ratio of floating-point operations,
dense to the cheapest order known (W rebuilt, or through the factors), `of it` how much of that hpclr reaches. The rank
marked * is the largest at which a layer is converted under `convert: when_it_pays`; above it the layer stays dense.

With --inference: `unfolded` is a converted layer in evaluation, `folded` what `hpclr.lowrank.fold` makes of it, and
`densified` is the dense layer again.
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.lowrank import fold, select
from hpclr.lowrank.product import operations, pays

SHARES = (1.0, 0.5, 0.25, 0.125)
LINEAR = ((768, 768), (3072, 768), (768, 3072), (192, 192))  # m, n
CONV = ((64, 16, 32), (256, 16, 16))  # channels, images, height and width
Way = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A layer (m outputs, n inputs of its weight as a matrix) and an input for it."""

    name: str
    make: Callable[[], nn.Module]
    m: int
    n: int
    rows: int
    shape: tuple[int, ...]

    def ranks(self) -> dict[str, int]:
        """Label → k: the shares of the full rank, and the largest rank that pays."""
        full = min(self.m, self.n)
        edge = max(k for k in range(1, full + 1) if pays(self.m, self.n, k))
        found = {f"{share:g}": round(full * share) for share in SHARES} | {f"{edge / full:.2f}*": edge}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def bound(self, k: int, *, training: bool) -> float:
        """Operations of the dense layer to those of the cheapest order."""
        dense = (6 if training else 2) * self.rows * self.m * self.n
        return dense / min(operations(self.rows, self.m, self.n, k, training=training, always_folds=True))


def main() -> None:
    arguments = parse()
    device, dtype = measure.begin(arguments)
    facts = measure.machine(device) | {"dtype": arguments.dtype, "repeats": arguments.repeats}
    print(f"{measure.heading(facts)}, {arguments.dtype}, medians of {arguments.repeats}")
    bench = inference if arguments.inference else training
    results = []
    for case in cases(arguments):
        with torch.set_grad_enabled(not arguments.inference):
            results += bench(case, arguments, device, dtype)
    measure.show(list(results[0]), [[shown(value) for value in line.values()] for line in results])
    measure.write_json(arguments.json, facts, results)


def parse() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--inference", action="store_true", help="the forward pass alone, without gradients")
    parser.add_argument("--compile", action="store_true", help="compiled layers, too, against the dense one compiled")
    parser.add_argument("--channels-last", action="store_true", help="of convolutions and their inputs")
    parser.add_argument("--rows", help="rows of the linear layers' inputs; 2048,8192, with --inference 1,16,2048")
    parser.add_argument("--only", default="*", help="a pattern of layer names, as in '768 x*' or 'conv*'")
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> list[Case]:
    rows = arguments.rows or ("1,16,2048" if arguments.inference else "2048,8192")
    found = [
        Case(f"{m} x {n}", lambda m=m, n=n: nn.Linear(n, m), m, n, b, (b, n))
        for m, n in LINEAR
        for b in map(int, rows.split(","))
    ] + [
        Case(f"conv {c}", lambda c=c: nn.Conv2d(c, c, 3, padding=1), c, 9 * c, b * size**2, (b, c, size, size))
        for c, b, size in CONV
    ]
    chosen = [case for case in found if fnmatch(case.name, arguments.only)]
    if not chosen:
        raise SystemExit(
            f"--only {arguments.only}: there is none; there are {', '.join(dict.fromkeys(case.name for case in found))}"
        )
    return chosen


def training(case: Case, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Forward and backward, to the gradients of all that is trained and of the input."""
    dense, x = on_device(case, arguments, device, dtype)
    grad = torch.randn_like(dense(x))
    ranks = case.ranks()
    layers = {label: factored(dense, k) for label, k in ranks.items()}
    ways = {"dense": passes(dense, dense, x, grad)}
    ways |= {label: passes(layer, layer, x, grad) for label, layer in layers.items()}
    ways |= {f"plain {label}": passes(plain(layer), layer, x, grad) for label, layer in layers.items()}
    if arguments.compile:
        both = {"dense": dense} | layers
        ways |= {f"compiled {label}": passes(compiled(layer), layer, x, grad) for label, layer in both.items()}
    times = measure.interleaved(ways, device=device, repeats=arguments.repeats)
    speed = measure.speed_ratios(times, "dense")
    lines = []
    for label, k in ranks.items():
        bound = case.bound(k, training=True)
        line = heading(case, label, times) | {"plain": speed[f"plain {label}"], "hpclr": speed[label]}
        line |= {"bound": bound, "of it": speed[label] / bound}
        if arguments.compile:
            line["compiled"] = measure.speed_ratios(times, "compiled dense")[f"compiled {label}"]
        lines.append(line)
    return lines


def inference(case: Case, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """The forward pass of layers as they are after training, and folded."""
    dense, x = on_device(case, arguments, device, dtype)
    ranks = case.ranks()
    layers = {label: factored(dense, k) for label, k in ranks.items()}
    folded = {f"folded {label}": fold(copy.deepcopy(layer)) for label, layer in layers.items()}
    every = {"dense": dense.requires_grad_(False)} | layers | folded
    if arguments.compile:
        every |= {f"compiled {label}": compiled(layer) for label, layer in ({"dense": dense} | folded).items()}
    ways: dict[str, Way] = {label: lambda layer=layer: layer(x) for label, layer in every.items()}
    times = measure.interleaved(ways, device=device, repeats=arguments.repeats, least_seconds=0.02)
    speed = measure.speed_ratios(times, "dense")
    lines = []
    for label, k in ranks.items():
        line = heading(case, label, times) | {"unfolded": speed[label], "folded": speed[f"folded {label}"]}
        line["bound"] = max(1.0, case.m * case.n / (k * (case.m + case.n)))
        if arguments.compile:
            line["compiled"] = measure.speed_ratios(times, "compiled dense")[f"compiled folded {label}"]
        lines.append(line)
    return lines


def on_device(
    case: Case, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Tensor]:
    layer, x = case.make().to(device, dtype), torch.randn(case.shape, device=device, dtype=dtype)
    if arguments.channels_last and x.ndim == 4:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return layer, x.requires_grad_(not arguments.inference)


def factored(dense: nn.Module, k: int) -> nn.Module:
    """A copy with random factors of rank k, which are as good for a clock as those of an SVD."""
    layer = copy.deepcopy(dense)
    (site,) = select(layer).eligible
    m, n = site.shape
    u, sigma, vh = (torch.randn(size) / math.sqrt(size[0]) for size in ((m, k), (k, k), (k, n)))
    site.convert(u, sigma, vh)
    return layer


def plain(layer: Any) -> Callable[[Tensor], Tensor]:
    """x V Σ Uᵀ + b as three products."""
    u, sigma, vh, bias = layer.u, layer.sigma, layer.vh, layer.bias
    if isinstance(layer, nn.Linear):
        return lambda x: F.linear(F.linear(F.linear(x, vh), sigma), u, bias)
    filters, padding = vh.view(-1, layer.in_channels, *layer.kernel_size), layer.padding
    return lambda x: F.conv2d(
        F.conv2d(F.conv2d(x, filters, padding=padding), sigma[:, :, None, None]), u[:, :, None, None], bias
    )


def compiled(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(layer, fullgraph=True, dynamic=False)


def passes(forward: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, grad: Tensor) -> Way:
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def way() -> None:
        forward(x).backward(grad)
        for tensor in trained:
            tensor.grad = None

    return way


def heading(case: Case, label: str, times: dict[str, list[float]]) -> dict[str, Any]:
    milliseconds = 1000 * measure.medians(times)["dense"]
    return {"layer": case.name, "rows": case.rows, "k/min": label, "dense ms": milliseconds}


def shown(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
