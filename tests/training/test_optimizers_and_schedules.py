"""Optimisers by name, and learning rates against torch's own schedulers and against numbers worked out by hand."""

import pytest
import torch
from torch.optim import lr_scheduler
from training_helpers import OIALR, last_tree, records, summary

from hpclr.config.schema import Constant, Cosine, OneCycle, Optimizer, Step
from hpclr.errors import UsageError
from hpclr.training.optimizers import build_optimizer
from hpclr.training.schedules import learning_rate, set_learning_rate

OPTIMIZERS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"lr": 0.01, "betas": [0.8, 0.99], "eps": 1e-6},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "args": {"amsgrad": True}},
    "rmsprop": {"lr": 0.003, "momentum": 0.5},
    "adagrad": {"lr": 0.05},
    "adadelta": {"lr": 1.0},
    "adamax": {"lr": 0.01},
    "nadam": {"lr": 0.01},
    "radam": {"lr": 0.01},
    "rprop": {"lr": 0.001},
    "asgd": {"lr": 0.1},
}


COMMON = {"sgd", "adam", "AdamW", "rmsprop", "adagrad"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_oialr_trains_with(name, bench):
    run = bench.train(optimizer={"name": name} | OPTIMIZERS[name], train={"steps": 20}, checkpoint={"every": 100})
    losses = [record["loss"] for record in records(run, "train")]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(records(run, "check")[-1]["frozen"].values())
    (group,) = last_tree(run)["/optimizer/groups"]
    assert {"layers.1.sigma", "layers.1.bias", "head.weight"} <= set(group["params"])
    assert "layers.1.weight" not in group["params"]


def test_state_that_cannot_be_carried_is_reset_and_named(bench):
    with pytest.warns(UserWarning, match="Adafactor keeps state 'row_var'"):
        bench.train(optimizer={"name": "adafactor", "lr": 0.01})
    assert summary(bench.run)["steps"] == 13


def test_options_reach_the_optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2), requires_grad=False)]
    section = Optimizer(name="adamw", lr=0.5, weight_decay=0.25, betas=(0.5, 0.75), eps=0.125, args={"amsgrad": True})
    built = build_optimizer(section, parameters)
    assert type(built) is torch.optim.AdamW
    (group,) = built.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.5, 0.75))
    assert (group["eps"], group["amsgrad"]) == (0.125, True)
    assert len(group["params"]) == 1
    absent = build_optimizer(Optimizer(name="adamw", lr=0.5), parameters)
    assert absent.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"name": "adamm"}, ("'adamm'", "did you mean adam?")),
        ({"name": "Optimizer"}, ("no 'Optimizer'",)),
        ({"name": "lbfgs"}, ("LBFGS cannot train here",)),
        ({"name": "sparseadam"}, ("SparseAdam cannot train here",)),
        ({"name": "sgd", "betas": (0.9, 0.9)}, ("optimizer.betas", "SGD has no such option", "momentum")),
        ({"args": {"lr": 1.0}}, ("optimizer.args: lr", "write it as optimizer.lr")),
        ({"args": {"betas": [0.5, 0.5]}}, ("optimizer.args: betas", "write it as optimizer.betas")),
        ({"args": {"capturable": True}}, ("capturable", "on the CPU")),
        ({"args": {"differentiable": True}}, ("differentiable", "take it out")),
        ({"name": "sgd", "args": {"params": 1}}, ("optimizer.params",)),
        ({"name": "sgd", "nesterov": True}, ("SGD refuses its options", "momentum")),
    ],
)
def test_what_cannot_work_is_refused(options, texts):
    with pytest.raises(UsageError) as caught:
        build_optimizer(Optimizer(lr=0.1, **options), [torch.nn.Parameter(torch.zeros(1))])
    assert all(text in str(caught.value) for text in texts)


TOTAL = 20


def torch_rates(make) -> list[float]:
    """The learning rate that a scheduler of torch sets for each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(TOTAL - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def after_warmup(steps: int, make):
    """A scheduler after a linear warm-up."""

    def both(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
        return lr_scheduler.SequentialLR(optimizer, [rise, make(optimizer)], milestones=[steps])

    return both


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1)),
        (Constant(warmup_steps=4), after_warmup(4, lambda o: lr_scheduler.ConstantLR(o, factor=1))),
        (Cosine(), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL)),
        (Cosine(min_lr=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.1)),
        (Cosine(warmup_steps=5), after_warmup(5, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL - 5))),
        (Step(milestones=(7, 12), gamma=0.5), lambda o: lr_scheduler.MultiStepLR(o, [7, 12], 0.5)),
        (Step(milestones=(0.35, 0.6), gamma=0.5), lambda o: lr_scheduler.MultiStepLR(o, [7, 12], 0.5)),
        (OneCycle(), lambda o: lr_scheduler.OneCycleLR(o, 0.8, total_steps=TOTAL, cycle_momentum=False)),
        (
            OneCycle(max_lr=2.0, warmup_fraction=0.25, final_div=100.0),
            lambda o: lr_scheduler.OneCycleLR(
                o, 2.0, total_steps=TOTAL, pct_start=0.25, final_div_factor=100, cycle_momentum=False
            ),
        ),
    ],
    ids=lambda value: "torch" if callable(value) else repr(value),
)
def test_rates_are_those_of_torch(schedule, make):
    rate = learning_rate(schedule, 0.8, TOTAL)
    assert [rate(step) for step in range(TOTAL)] == pytest.approx(torch_rates(make), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(warmup_steps=3), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (Cosine(), [1, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449, 0.5]),
        (Cosine(warmup_steps=4, min_lr=0.5), [0.2, 0.4, 0.6, 0.8, 1, 0.9267766952966369, 0.75, 0.5732233047033631]),
        (Step(milestones=(2, 6)), [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        (OneCycle(warmup_fraction=0.5), [0.04, 0.28, 0.76, 1]),
    ],
    ids=repr,
)
def test_rates_worked_out_by_hand(schedule, expected):
    rate = learning_rate(schedule, 1.0, 8)
    assert [rate(step) for step in range(len(expected))] == pytest.approx(expected, rel=1e-9)


def test_a_rate_does_not_depend_on_what_was_asked_before():
    rate = learning_rate(OneCycle(), 1.0, 50)
    forwards = [rate(step) for step in range(50)]
    assert [rate(step) for step in reversed(range(50))] == forwards[::-1]


def test_every_group_gets_the_rate():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 3}], lr=1)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_run_follows_its_schedule(bench):
    schedule = {"name": "cosine", "warmup_steps": 3}
    run = bench.train(schedule=schedule, method=OIALR, optimizer={"name": "sgd", "lr": 0.5})
    rate = learning_rate(Cosine(warmup_steps=3), 0.5, 13)
    assert [record["lr"] for record in records(run, "train")] == [rate(step) for step in range(13)]
