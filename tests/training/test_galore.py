"""GaLore as an optimiser: its arithmetic, its state in checkpoints, what it refuses."""

import re
import sys
import warnings
from math import ceil, inf, nan, sqrt

import pytest
import torch
from process_helpers import (  # noqa: F401 - the_tasks and the_team are fixtures
    FLOAT64,
    assert_same_result,
    own_model,
    the_tasks,
    the_team,
)
from torch import nn
from training_helpers import OIALR, SVD, as_killed_after, assert_same_run, hpclr, last_tree, records, summary

from hpclr.checkpoint import CheckpointStore, Json
from hpclr.config.schema import Optimizer
from hpclr.errors import TrainingDivergedError, UsageError
from hpclr.lowrank import optimizer_bytes

GALORE = {"name": "galore_adamw", "lr": 0.02, "args": {"rank": 0.25, "update_proj_gap": 4, "scale": 0.5}}
DENSE = {"name": "dense"}
EVERY_STEP = {"every": 1, "keep": 100}


@pytest.fixture(name="build")
def the_build():
    """What makes the optimiser, where the package is installed."""
    pytest.importorskip("galore_torch")
    from hpclr.training.galore import build_galore

    def build(model, **options):
        return build_galore(Optimizer(name="galore_adamw", lr=0.1, **options), model)

    return build


def adam(m, v, step, eps):
    """Adam's step in units of the learning rate."""
    return m / (v.sqrt() + eps) * sqrt(1 - 0.999**step) / (1 - 0.9**step)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("side", ["std", "left", "right"])
def test_steps_are_those_of_the_paper(shape, side, build):
    """Projection, Adam among the r directions, and back; the moments stay as they are when the directions are new."""
    torch.manual_seed(0)
    layer, (m, n), r = nn.Linear(*reversed(shape)).double(), shape, 3
    args = {"rank": r, "update_proj_gap": 2, "scale": 0.25, "proj_type": side}
    optimizer = build(layer, args=args, weight_decay=0.1, eps=1e-8)
    right = side == "right" or (side == "std" and m >= n)
    weight, bias = (p.detach().clone() for p in (layer.weight, layer.bias))
    moments = [[torch.zeros(m, r) if right else torch.zeros(r, n)] * 2, [torch.zeros(m)] * 2]
    for step in range(1, 6):
        gradients = torch.randn(m, n).double(), torch.randn(m).double()
        layer.weight.grad, layer.bias.grad = (g.clone() for g in gradients)
        optimizer.step()
        if step % 2 == 1:
            u, _, vh = torch.linalg.svd(gradients[0], full_matrices=False)
        projected = gradients[0] @ vh[:r].T if right else u[:, :r].T @ gradients[0]
        for i, g in enumerate((projected, gradients[1])):
            moments[i] = [0.9 * moments[i][0] + 0.1 * g, 0.999 * moments[i][1] + 0.001 * g**2]
        inner = adam(*moments[0], step, 1e-8)
        weight = (weight - 0.1 * 0.25 * (inner @ vh[:r] if right else u[:, :r] @ inner)) * (1 - 0.1 * 0.1)
        bias = (bias - 0.1 * adam(*moments[1], step, 1e-8)) * (1 - 0.1 * 0.1)
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-12, atol=1e-12)


class Mixed(nn.Module):
    """Something of each kind; the two embeddings are one parameter."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.wide = nn.Linear(12, 50)
        self.narrow = nn.Linear(50, 12, bias=False)
        self.out = nn.Linear(12, 9)
        self.out.weight = self.words.weight

    def forward(self, x):
        h = self.conv(self.words(x).mT).mT
        h = h + self.attention(h, h, h)[0]
        return self.out(self.narrow(self.wide(h).relu()))


def loss_of(model):
    return model(torch.arange(18).reshape(2, 9) % 9).square().sum()


def test_matrices_of_layers_are_projected_and_nothing_else(build):
    model = Mixed()
    model.narrow.weight.requires_grad_(False)
    optimizer = build(model, args={"rank": 0.3})
    names = {p: name for name, p in model.named_parameters()}
    of_galore = [group for group in optimizer.param_groups if "rank" in group]
    projected = {names[p]: group["rank"] for group in of_galore for p in group["params"]}
    assert projected == dict.fromkeys(("attention.in_proj_weight", "attention.out_proj.weight", "wide.weight"), 4)
    everything = [names[p] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(names[p] for p in names if p.requires_grad)
    (group,) = of_galore
    assert (group["update_proj_gap"], group["scale"], group["proj_type"]) == (200, 0.25, "std")
    assert group["betas"] == (0.9, 0.999)


def test_between_steps_the_state_is_tensors_and_numbers_and_counted_to_the_byte(build):
    model = Mixed()
    optimizer = build(model, args={"rank": 4})
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in optimizer.state.values():
        assert all(isinstance(value, (torch.Tensor, int)) for value in state.values())
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.untyped_storage().nbytes() == value.nbytes
    matrices = ("attention.in_proj_weight", "attention.out_proj.weight", "wide.weight", "narrow.weight")
    shapes = [(max(p.shape), min(p.shape)) for name, p in model.named_parameters() if name in matrices]
    others = [p.numel() for name, p in model.named_parameters() if name not in matrices]
    assert optimizer_bytes(optimizer) == 4 * (sum(4 * (2 * long + short) for long, short in shapes) + 2 * sum(others))


def test_a_rank_that_a_layer_does_not_have_is_all_of_it(build):
    optimizer = build(nn.Linear(6, 4), args={"rank": 100})
    assert [group["rank"] for group in optimizer.param_groups if "rank" in group] == [4]
    shares = {0.5: 5, 0.55: 6, 1.0: 10, 0.01: 1}
    for share, rank in shares.items():
        (group,) = (g for g in build(nn.Linear(10, 10), args={"rank": share}).param_groups if "rank" in g)
        assert group["rank"] == rank == ceil(share * 10 - 1e-9)


def test_a_gradient_that_is_not_finite_ends_training(build):
    layer = nn.Linear(5, 4)
    optimizer = build(layer)
    layer.weight.grad = torch.full((4, 5), float("nan"))
    with pytest.raises(TrainingDivergedError, match="4×5 matrix has entries that are not finite"):
        optimizer.step()


# Runs


@pytest.fixture(name="installed")
def the_installed():
    pytest.importorskip("galore_torch")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"ema": 0.9}, id="float32"),
        pytest.param(FLOAT64 | {"micro_batch": 24}, id="float64, accumulation"),
        pytest.param({"precision": "fp16", "clip_norm": 1.0}, id="fp16", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_and_continued_to_the_bit(train, bench):
    sections = {"optimizer": GALORE, "method": DENSE, "train": train}
    reference = bench.train(checkpoint=EVERY_STEP, **sections).rename(bench.path / "reference")
    for step in (1, 4, 6):  # directions are found in steps 1, 5, 9 and 13
        as_killed_after(reference, step, bench.run)
        assert_same_run(reference, bench.train(**sections))
        bench.run.rename(bench.path / f"continued-{step}")
    bases = {key: value for key, value in last_tree(reference).items() if key.endswith("/ortho_matrix")}
    assert {key.split("/")[3] for key in bases} == {"layers.1.weight", "layers.4.weight", "head.weight"}


@pytest.mark.usefixtures("installed")
def test_a_run_learns_is_verified_and_says_what_it_takes(bench):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        run = bench.train(optimizer=GALORE, method=DENSE, train={"steps": 30})
    losses = [record["loss"] for record in records(run, "train")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    done = hpclr("verify", run)
    assert done.code == 0, done.out
    kept = sum((2 * n + m) * ceil(m / 4) for m, n in ((32, 64), (24, 32), (10, 24)))
    assert summary(run)["cost"]["optimizer_bytes_peak"] == 4 * (kept + 2 * (32 + 24 + 10))


@pytest.mark.usefixtures("installed")
def test_verify_finds_state_of_a_wrong_shape(bench):
    run = bench.train(optimizer=GALORE, method=DENSE)
    store = CheckpointStore(run / "checkpoints")
    tree = dict(store.load(13).tree)
    state = tree["optimizer"]["state"]
    spoiled = state["layers.1.weight"] | {"exp_avg": torch.zeros(8, 63)}
    tree["optimizer"] = tree["optimizer"] | {"state": state | {"layers.1.weight": spoiled}}
    CheckpointStore(bench.path / "spoiled").save(13, tree)
    done = hpclr("verify", bench.path / "spoiled")
    assert done.code == 1
    assert "exp_avg of 'layers.1.weight': expected a shape projected by (32, 8), found (8, 63)" in done.out
    assert isinstance(state["layers.1.weight"]["step"], Json)


@pytest.mark.slow  # each process takes seconds to import the package
@pytest.mark.usefixtures("installed")
def test_two_processes_give_the_result_of_one_and_continue_to_the_bit(team):
    """Their parameters are compared in every step: other directions in one of them would show."""
    sections = {
        "model": own_model(team.bench),
        "optimizer": GALORE,
        "method": DENSE,
        "train": FLOAT64,
        "parallel": {"timeout": 60, "verify_every": 1},
    }
    one = team.bench.train(**sections).rename(team.bench.path / "one")
    two = team.srun(2, **sections, checkpoint=EVERY_STEP)
    assert two.ended() == [0, 0], two.console
    reference = two.run.rename(team.bench.path / "two")
    assert_same_result(one, reference)
    as_killed_after(reference, 6, two.run)
    last = team.srun(2, **sections)
    assert last.ended() == [0, 0], last.console
    assert_same_run(reference, last.run)


# What cannot work


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"args": {"rank": 0}}, "optimizer.args.rank: expected a whole number from 1 on, or .*, found 0$"),
        ({"args": {"rank": 2.5}}, "optimizer.args.rank: .* share .* up to 1.0, found 2.5$"),
        ({"args": {"rank": 4, "scale": 0}}, "optimizer.args.scale: expected a finite number above 0, found 0$"),
        ({"args": {"update_proj_gap": 0.5}}, "optimizer.args.update_proj_gap: expected a whole .* 1 on, found 0.5$"),
        (
            {"args": {"gap": 4}},
            "optimizer.args.gap: .* no such option; it has rank, update_proj_gap, scale, proj_type$",
        ),
        ({"args": {"proj_type": "full"}}, "optimizer.args.proj_type: expected std, left or right, found 'full'$"),
        ({"momentum": 0.9}, "optimizer.momentum: galore_adamw has no such option; it has betas, eps and weight_decay"),
        ({"name": "galore_adafactor"}, "optimizer.name: of GaLore's optimisers there is galore_adamw here"),
    ],
)
def test_what_it_does_not_take_is_refused(changes, said, bench):
    done = hpclr("train", bench.write(optimizer=GALORE | changes, method=DENSE))
    assert done.code == 2
    assert_says(done.err, said)
    assert not bench.run.exists()


@pytest.mark.parametrize("scale", [inf, nan])
def test_a_scale_that_is_not_finite_is_refused(scale, build):
    with pytest.raises(UsageError, match=f"optimizer.args.scale: expected a finite number above 0, found {scale}$"):
        build(nn.Linear(6, 4), args={"scale": scale})


def assert_says(text, pattern):
    assert re.search(pattern, " ".join(text.split())), text


@pytest.mark.parametrize("method", [OIALR, SVD])
def test_methods_that_change_weights_are_refused(method, bench):
    done = hpclr("train", bench.write(optimizer=GALORE, method=method))
    assert done.code == 2
    assert_says(done.err, f"moments in a space of its own .* when method '{method['name']}' changes the weight's form")
    assert not bench.run.exists()


@pytest.mark.usefixtures("installed")
def test_a_model_without_matrices_is_refused(build):
    with pytest.raises(UsageError, match="no linear layer that it could take; use adamw"):
        build(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def test_where_the_package_is_not_installed(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    monkeypatch.delitem(sys.modules, "hpclr.training.galore", raising=False)
    done = hpclr("train", bench.write(optimizer=GALORE, method=DENSE))
    assert done.code == 2
    assert_says(done.err, r"galore_adamw needs the package galore-torch, .*: pip install 'hpclr\[galore\]'")
    assert not bench.run.exists()
