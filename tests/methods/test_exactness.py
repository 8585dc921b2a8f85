"""What a change of basis without a cut must not change: the function, the momentum, the way training goes."""

from collections.abc import Callable

import pytest
import torch
from small_runs import (
    batch,
    frobenius,
    idle,
    matrices,
    matrix,
    mlp,
    random_gradients,
    sites,
    stack,
    train_step,
    with_spectrum,
)
from torch import Tensor, nn

from hpclr import OIALR

NEVER = 10**6
UNCUT = {"cutoff": 1e-12, "min_rank": 1.0, "layer_fraction": 1.0, "keep_last": False}


def sgd_run(widths, steps, **settings):
    """Trains in float64 and gives the dense weights after every step, and the losses."""
    model = mlp(widths, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
    oialr = OIALR(model, optimizer, **UNCUT, **settings)
    weights, losses = [], []
    for step in range(steps):
        losses.append(train_step(model, optimizer, *batch(step, widths[0], widths[-1], torch.float64)))
        oialr.step()
        weights.append(matrices(model))
    return model, weights, losses


def largest_difference(one, other):
    return max(float((a[name] - b[name]).abs().max()) for a, b in zip(one, other, strict=True) for name in a)


def test_sgd_momentum_that_refactorises_follows_the_run_that_never_does():
    _, again, losses = sgd_run([12, 24, 16, 6], 240, delay=20, every=20)
    _, once, _ = sgd_run([12, 24, 16, 6], 240, delay=20, every=NEVER)
    assert losses[-1] < 0.5 * losses[0]
    assert largest_difference(again, once) < 1e-10


def test_momentum_goes_through_the_conversion_of_square_weights_exactly():
    converted, again, losses = sgd_run([12, 12, 12, 12], 200, delay=20, every=30)
    dense, never, _ = sgd_run([12, 12, 12, 12], 200, delay=NEVER, every=NEVER)
    assert all(site.is_lowrank for site in sites(converted).values())
    assert not any(site.is_lowrank for site in sites(dense).values())
    assert losses[-1] < 0.5 * losses[0]
    assert largest_difference(again, never) < 1e-10


def test_momentum_of_a_wide_weight_is_projected_onto_its_basis():
    model = stack(with_spectrum([3, 2, 1], 3, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    oialr = OIALR(model, optimizer, delay=1, every=NEVER, keep_last=False)
    random_gradients(model, 0)
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    oialr.step()
    u, _, vh = sites(model)["0"].factors
    carried = optimizer.state[model[0].sigma]["momentum_buffer"]
    assert torch.allclose(carried, u.mT @ momentum @ vh.mT, rtol=0, atol=1e-13)


# --- outputs ---------------------------------------------------------------------------------------------------------


def conv_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, groups=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 8),
    ).to(dtype)


class Attending(nn.Module):
    """A small vision transformer: a linear embedding of 16 patches, two blocks, a mean."""

    def __init__(self, features: int = 12, width: int = 24, classes: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def attending(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Attending().to(dtype)


MODELS: dict[str, tuple[Callable[[torch.dtype], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda dtype: mlp([20, 64, 48, 48, 10], dtype), (20,)),
    "conv": (conv_net, (3, 8, 8)),
    "attention": (attending, (16, 12)),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_conversion_and_refactorisation_change_no_output(name, dtype, tolerance):
    build, shape = MODELS[name]
    model = build(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    oialr = OIALR(model, optimizer, delay=1, every=1, **UNCUT)
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for step in range(4):
        random_gradients(model, step)
        optimizer.step()
        with torch.no_grad():
            before = {training: model.train(training)(x).double() for training in (True, False)}
            oialr.step()
            for training, output in before.items():
                after = model.train(training)(x).double()
                assert frobenius(after - output) <= tolerance * frobenius(output)
    assert all(oialr.frozen.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.005)], ids=str)
@pytest.mark.parametrize(("m", "n"), [(48, 48), (64, 24)])
def test_rounding_does_not_add_up_over_a_hundred_updates_of_a_moving_sigma(m, n, dtype, tolerance):
    """The error is what the checks do, apart from what the optimiser does between them."""
    torch.manual_seed(0)
    model = stack((torch.randn(m, n) / n**0.5).to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-3)
    oialr = OIALR(model, optimizer, delay=1, every=1, **UNCUT)
    site = sites(model)["0"]
    start, drift = matrix(site), torch.zeros(m, n, dtype=torch.float64)
    for step in range(101):
        random_gradients(model, step)
        optimizer.step()
        before = matrix(site)
        oialr.step()
        drift += matrix(site) - before
    assert oialr.checks == 101
    assert frobenius(matrix(site) - start) > 0.05 * frobenius(start), "Σ did move"
    assert frobenius(drift) <= tolerance * frobenius(start)


def test_a_bf16_weight_loses_little_to_rounding_where_every_check_cuts():
    """Beyond what is cut away on purpose: the leading directions keep their weight through 20 rotations."""
    spectrum = [2.0] * 8 + [0.9 ** (i + 3) for i in range(24)]
    model = stack(with_spectrum(spectrum, 40, 32).bfloat16())
    optimizer = idle(model)
    site = sites(model)["0"]
    leading = torch.linalg.svd(matrix(site))[0][:, :8]
    before = leading.mT @ matrix(site)

    def one_fewer(singular_values: Tensor, shape: tuple[int, int]) -> int:
        return max(8, len(singular_values) - 1)

    oialr = OIALR(model, optimizer, delay=1, every=1, layer_fraction=1, keep_last=False, cutoff=one_fewer)
    for _ in range(21):
        optimizer.step()
        oialr.step()
    assert oialr.ranks == {"0": 12}
    after = leading.mT @ matrix(site)
    assert frobenius(after - before) <= 0.005 * frobenius(before)


# --- Adam ------------------------------------------------------------------------------------------------------------


def adam_run(name: str, seed: int, optimizer_class: type[torch.optim.Optimizer], steps: int, **settings):
    """Trains; gives ‖ΔW‖_F of every step and layer, and the steps after which each layer's basis changed."""
    build, shape = MODELS[name]
    model = build(torch.float32)
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(6, *shape, generator=g)
    labels = torch.randint(0, 6, (256,), generator=g)
    samples = 0.7 * prototypes[labels] + torch.randn(256, *shape, generator=g)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    oialr = OIALR(model, optimizer, **settings)
    lengths: dict[str, list[float]] = {layer: [] for layer in oialr.ranks}
    changed: list[tuple[int, str]] = []
    oialr.on_change(lambda change: changed.append((oialr.steps, change.name)))
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, 256, (32,), generator=g)
        before = matrices(model)
        losses.append(train_step(model, optimizer, samples[rows], labels[rows]))
        after = matrices(model)
        for layer, history in lengths.items():
            history.append(frobenius(after[layer] - before[layer]))
        oialr.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    return lengths, changed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "optimizer_class"),
    [
        ("mlp", torch.optim.Adam),
        ("mlp", torch.optim.AdamW),
        ("conv", torch.optim.AdamW),
        ("attention", torch.optim.AdamW),
    ],
)
def test_no_step_of_adam_is_longer_for_a_change_of_basis(name, optimizer_class, seed):
    settings = {"delay": 20, "every": 12, "cutoff": 0.3, "layer_fraction": 0.5, "keep_last": False}
    lengths, changed = adam_run(name, seed, optimizer_class, 58, **settings)
    assert {step for step, _ in changed} == {20, 32, 44, 56}
    for step, layer in changed:
        history = lengths[layer]
        assert history[step] <= 1.2 * max(history[step - 10 : step]), (step, layer)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("active", [1, 3, 12])
def test_gradients_of_unequal_size_do_not_lengthen_the_step(active, amsgrad):
    """A few units have nearly all of the gradient; averaged over the basis, its squares alone would say too little."""
    model = stack(with_spectrum([5, 4, 3, 3, 2, 2, 1, 1, 1, 0.5, 0.5, 0.1], 12, 12).float())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=amsgrad)
    oialr = OIALR(model, optimizer, delay=30, every=NEVER, keep_last=False)
    site, g = sites(model)["0"], torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -3, 12)[:, None] * (torch.arange(12) < active)[:, None]
    mean, lengths = torch.randn(12, 12, generator=g), []
    for _ in range(31):
        gradient = sizes * (mean + 0.3 * torch.randn(12, 12, generator=g))
        u, _, vh = site.factors if site.is_lowrank else (torch.eye(12), None, torch.eye(12))
        site.parameter.grad = u.mT @ gradient @ vh.mT
        before = matrix(site)
        optimizer.step()
        lengths.append(frobenius(matrix(site) - before))
        oialr.step()
    assert site.is_lowrank
    assert 0.5 * min(lengths[20:30]) <= lengths[30] <= 1.2 * max(lengths[20:30])
