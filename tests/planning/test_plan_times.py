"""Times, operations and break-even: by hand, and against a run's own accounting."""

import json
from pathlib import Path as FilePath

import pytest
import torch
from planning_helpers import DENSE, METHODS, OIALR, VIT, counts_of, hpclr, run_of, written

from hpclr.planning.asking import Wishes, planned
from hpclr.planning.counting import Share, share_of
from hpclr.planning.estimate import break_even
from hpclr.planning.forms import Layer
from hpclr.planning.hardware import TABLE, hardware_of
from hpclr.planning.measuring import CHECK_FACTORS, _check_range
from hpclr.planning.pace import AssumedPace, MeasuredPace, Timed
from hpclr.planning.page import between, number, round_to_two
from hpclr.planning.ranks import Path, Stage
from hpclr.planning.steps import BUCKET, Cluster, Reached, Work, all_reduce_seconds, exposed_seconds

UNIT = Cluster("by hand", gpus=4, flops=1e12, memory=1e9, inside=1e9, between=1e8, hop_inside=0.0, hop_between=0.0)


def test_an_all_reduce_within_and_between_nodes():
    assert all_reduce_seconds(4e6, 1, UNIT) == 0
    assert all_reduce_seconds(4e6, 4, UNIT) == pytest.approx(2 * 3 / 4 * 4e6 / 1e9)
    assert all_reduce_seconds(4e6, 8, UNIT) == pytest.approx(6e-3 + 2 * 1 / 2 * 1e6 / 1e8)


def test_what_hides_behind_the_backward_pass():
    half = Reached(overlap=0.5, bandwidth=1.0)
    whole, last = (all_reduce_seconds(size, 8, UNIT) for size in (1e9, BUCKET))
    assert exposed_seconds(1e9, 8, UNIT, half, backward=1.0) == pytest.approx(whole - 0.5)
    assert exposed_seconds(1e9, 8, UNIT, half, backward=1e6) == pytest.approx(last)  # with nothing left to hide behind
    assert exposed_seconds(1e9, 1, UNIT, half, backward=0.0) == 0


def test_a_step_by_hand():
    work = Work(3e9, 1e9, trained=1e5, stored=1e5, gradient_bytes=4e5, saved_bytes=1e6, moved_bytes=1e6, calls=100)
    pace = AssumedPace(UNIT, Reached(flops=0.5, bandwidth=0.5, overlap=0.0, passes=4.0, call=1e-3))
    found = pace.computing(work, Share(8, 8))
    products, elementwise = 3e9 / 5e11, 4 * 1e6 / 5e8
    assert found.passes == pytest.approx(0.1)  # the host takes longer than the device
    assert found.backward == pytest.approx(products * 2 / 3 + elementwise / 2)
    assert found.optimizer == pytest.approx(7 * 4e5 / 5e8)


@pytest.mark.parametrize(
    ("seconds", "checks", "expected"),
    [
        ((1.0, 2.0, 0.5), {}, 40),  # ten steps that cost one more each, ten's worth won back at half a second a step
        ((1.0, 0.5, 0.5), {}, 10),
        ((1.0, 2.0, 0.5), {10: 5.0}, 50),
        ((1.0, 2.0, 1.5), {}, None),
        ((1.0, 1.0, 0.5), {99: 100.0}, None),
    ],
)
def test_where_a_run_breaks_even(seconds, checks, expected):
    stages = Stage(0, 10, {}), Stage(10, 20, {"a": 8}), Stage(20, 100, {"a": 2})
    assert break_even(Path(stages, tuple(checks), True, ""), seconds, checks, dense=1.0) == expected


def test_a_plan_counts_the_operations_that_a_run_counts(few_digits):
    data = {"path": str(few_digits), "batch_size": 60}
    for method in (DENSE, OIALR, METHODS["fixed_rank"]):
        file = written(method=method, data=data, train={"epochs": 2, "threads": 1}, checkpoint={"every": 50})
        assert hpclr("train", file, "--fresh").code == 0
        cost = json.loads(FilePath("runs/run/summary.json").read_text())["cost"]
        like = ["--like", "runs/run"] if method is OIALR else []
        done = hpclr("plan", file, "--json", "--gpu", "cpu", "--gpus-per-node", 1, *like)
        plan = json.loads(done.out)
        assert plan["dense_flops"] == pytest.approx(cost["dense_training_flops"], rel=1e-9)
        assert plan["flops"] == pytest.approx(cost["training_flops"], rel=0.03 if method is OIALR else 1e-9)
        if method is not OIALR:
            assert plan["phases"][0]["gradient_bytes"] == cost["gradient_bytes_mean"]


def test_processes_share_the_batch_of_the_run_file():
    counts, _ = counts_of(run_of(train={"steps": 13, "micro_batch": 5}))
    assert share_of(counts.subject, 4) == Share(16, 5)
    assert share_of(counts.subject, 4).passes == 4
    assert share_of(counts.subject, 32) == Share(2, 2)


def test_more_nodes_take_less_time_until_the_network_counts():
    run = run_of(model=VIT | {"dim": 128}, data={"path": "absent.h5", "batch_size": 512}, train={"steps": 100})
    wishes = Wishes(nodes="1,2,3", gpu="a100", gpus_per_node=1, samples=256, shape="3x32x32", classes=10)
    plan, _ = planned(run, wishes)
    one, two, three = plan.rows
    assert two.total.high < one.total.high
    assert two.waits.high > one.waits.high == 0
    assert three.impossible is not None
    assert "512 cannot be shared equally by 3" in three.impossible
    assert one.energy.high == pytest.approx(one.total.high * 400 * 1.8 / 3.6e6)
    assert one.total.low < one.total.high
    assert plan.phases[-1].trained < plan.dense_parameters


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) if "spatial" in m else m for m in METHODS])
def test_every_method_can_be_planned(method):
    model = {"name": "resnet20", "width": 8} if "spatial" in method else {"name": "mlp", "hidden": [32, 24]}
    run = run_of(method=METHODS[method], model=model, train={"steps": 60})
    plan, _ = planned(run, Wishes(gpu="cpu", samples=256, shape="3x32x32", classes=10))
    assert plan.rows[0].total.low > 0
    assert (plan.phases[-1].trained < plan.dense_parameters) == (method != "dense")


def test_between_measured_forms_time_goes_with_operations_and_samples():
    timed = {
        "dense": Timed(100, 9, (1.0, 2.0), 0.1),
        "begin": Timed(120, 5, (1.5, 3.0), 0.2),
        "end": Timed(20, 1, (0.5, 1.0), 0.0),
    }
    pace = MeasuredPace(Share(8, 8), timed, True, 1.0, Reached())

    def seconds(flops, trained, samples=8):
        found = pace.computing(Work(flops, flops / 3, trained, 9, 0, 0, 0), Share(samples, samples))
        return found.passes, found.optimizer

    assert seconds(100, 9) == (2.0, 0.1)
    assert seconds(120, 5) == (3.0, 0.2)
    assert seconds(70, 3) == pytest.approx((2.0, 0.1))
    assert seconds(10, 1, samples=4) == (0.5, 0.0)


@pytest.mark.parametrize("shape", [(96, 48), (8, 200), (1, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_check_of_any_layer_is_measured(shape, dtype):
    layer = Layer("a", shape, 1, None)
    found = _check_range([layer], torch.device("cpu"), dtype)
    assert found.measured
    fast, slow = (pace.seconds([layer], {}) for pace in (found.fast, found.slow))
    assert 0 < fast / CHECK_FACTORS[0] == pytest.approx(slow / CHECK_FACTORS[1])
    assert found.fast.seconds([layer] * 2, {"a": 1}) == pytest.approx(2 * found.fast.each, rel=0.5)


def test_what_the_user_knows_better():
    found = hardware_of("a100", 4, ["memory=40e9", "watts=300"])
    assert (found.memory, found.watts, found.per_node, found.float32) == (40e9, 300, 4, TABLE["a100"].float32)
    assert "memory=40e9" in found.what


def test_no_more_digits_than_are_known():
    from hpclr.planning.estimate import Range
    from hpclr.planning.page import _TIMES

    assert between(Range(0.0123456, 0.0987), _TIMES) == "12–99 ms"
    assert between(Range(3700.0, 7300.0), _TIMES) == "1–2 h"
    assert between(Range(123456.0 * 86400, 123456.0 * 86400), _TIMES) == "120,000 d"
    assert number(808_232, ((1e6, "MB"), (1e3, "kB"))) == "808 kB"
    assert [round_to_two(n) for n in (3.4, 12.6, 1234, 98765)] == [3, 13, 1200, 99000]
