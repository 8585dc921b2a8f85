"""Accumulation in pieces, and mixed precision, in which a step may be skipped."""

import pytest
import torch
from training_helpers import OIALR, VIT, last_tree, records, summary

FULL = {"precision": "float64"}


def largest_difference(a, b) -> float:
    weights = [key for key in a if key.startswith("/model/")]
    assert weights == [key for key in b if key.startswith("/model/")]
    return max(float((a[key] - b[key]).abs().max() / (1 + b[key].abs().max())) for key in weights)


@pytest.mark.parametrize("micro_batch", [1, 24, 63])
def test_pieces_add_up_to_the_batch(micro_batch, bench):
    """The last pieces are smaller, and so is an epoch's last batch: each sample counts once."""
    sections = {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "data": {"mixup": 0.5}, "method": OIALR}
    whole = last_tree(bench.train(train=FULL, **sections).rename(bench.path / "whole"))
    pieces = last_tree(bench.train(train=FULL | {"micro_batch": micro_batch}, **sections))
    assert largest_difference(pieces, whole) < 1e-12
    losses = [[r["loss"] for r in records(run, "train")] for run in (bench.path / "whole", bench.run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_pieces_are_clipped_together(bench):
    train = FULL | {"clip_norm": 0.05}
    sections = {"optimizer": {"name": "sgd", "lr": 0.1}, "model": VIT, "method": {"name": "dense"}}
    whole = last_tree(bench.train(train=train, **sections).rename(bench.path / "whole"))
    assert largest_difference(last_tree(bench.train(train=train | {"micro_batch": 20}, **sections)), whole) < 1e-12


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_clipping_bounds_the_step(precision, bench):
    """In fp16 it is the gradient itself that is clipped, not the scaled one."""
    sections = {"optimizer": {"name": "sgd", "lr": 1.0}, "method": {"name": "dense"}, "checkpoint": {"every": 1}}
    run = bench.train(train={"steps": 1, "clip_norm": 0.01, "precision": precision}, **sections)
    after = last_tree(run)
    run.rename(bench.path / "one")
    before = last_tree(bench.train(train={"steps": 1, "clip_norm": 1e-30, "precision": precision}, **sections))
    moved = sum(float((after[key] - before[key]).square().sum()) for key in after if key.startswith("/model/"))
    assert moved**0.5 == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_keeps_weights_in_float32_and_learns(precision, bench):
    run = bench.train(train={"precision": precision, "steps": 40}, model=VIT, checkpoint={"every": 100})
    tree = last_tree(run)
    assert {value.dtype for key, value in tree.items() if key.startswith("/model/")} == {torch.float32}
    losses = [record["loss"] for record in records(run, "train")]
    assert losses[-1] < 0.9 * losses[0]
    exact = bench.train("--fresh", train={"steps": 40}, model=VIT, checkpoint={"every": 100})
    losses_exact = [record["loss"] for record in records(exact, "train")]
    assert losses[0] != losses_exact[0]
    assert losses[0] == pytest.approx(losses_exact[0], rel=2e-2)


def test_float64_is_float64(bench):
    tree = last_tree(bench.train(train=FULL | {"ema": 0.5}))
    for part in ("/model/", "/ema/", "/optimizer/state/layers.1.sigma/exp"):
        assert {value.dtype for key, value in tree.items() if part in key and torch.is_tensor(value)} == {torch.float64}


LOUD = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu() * 3000)
"""


def test_a_step_that_was_skipped_is_no_step(bench):
    """Gradients of this model overflow in fp16 until the loss scale has come down."""
    (bench.path / "loud.py").write_text(LOUD)
    train, method = {"precision": "fp16", "steps": 30}, OIALR | {"delay": 9, "every": 5}
    run = bench.train(
        model={"target": "loud:Net"}, train=train, method=method, optimizer={"name": "sgd", "lr": 1e-8, "momentum": 0.5}
    )
    tree = last_tree(run)
    skipped = 30 - tree["/method/state/steps"]
    assert skipped >= 2
    assert tree["/scaler"]["scale"] <= 65536 / 2**skipped
    frozen_at = [record["step"] for record in records(run, "check") if all(record["frozen"].values())]
    assert frozen_at[0] == 9 + skipped
    assert len(records(run, "train")) == 30
    assert summary(run)["steps"] == 30
