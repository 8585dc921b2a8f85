"""The memory of a plan, against what real steps and real checks hold."""

from pathlib import Path

import pytest
import torch
from planning_helpers import OIALR, PICTURES, VIT, counts_of, run_of

from hpclr.lowrank import optimizer_bytes, select
from hpclr.lowrank.activations import InputWatch
from hpclr.lowrank.probing import dense_gradients
from hpclr.methods import OIALR as Method
from hpclr.planning.checking import check_bytes, watched_bytes
from hpclr.planning.counting import Share
from hpclr.planning.forms import formed
from hpclr.planning.hardware import TABLE
from hpclr.planning.memory import memory_of, probing_bytes, section_of
from hpclr.planning.ranks import Assumed, path_of
from hpclr.planning.subject import copied
from hpclr.training.optimizers import optimizer_of
from hpclr.training.precision import Precision

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU, SIZE = torch.device("cpu"), 32
MODELS = {"vit": VIT, "resnet20": {"name": "resnet20"}, "mlp": {"name": "mlp", "hidden": [256, 256]}}


@pytest.fixture
def memory(monkeypatch):
    """The benchmarks' way to measure peaks, to the byte."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory

    return memory


def real(counts, ranks):
    """A model with contents, its optimiser, and a forward and backward pass."""
    run = counts.subject.run
    form = formed(counts.model, run.method, ranks)
    model = copied(
        form, lambda t: torch.randn(t.shape) * 0.05 if t.is_floating_point() else torch.zeros_like(t)
    ).train()
    batch, precision = counts.subject.batch(SIZE), Precision(run.train.precision, CPU)
    batch.x.normal_()
    batch.y.random_(0, 10)

    def passes():
        with precision.context():
            loss = counts.subject.loss(model, batch)
        loss.backward()

    return model, optimizer_of(run, model), passes


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("share", [None, 1.0, 0.25])
@pytest.mark.parametrize("model", ["vit", "mlp", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_a_traced_step_holds_what_a_real_one_holds(model, share, precision, memory):
    train = {"steps": 13, "precision": precision, "device": "cpu"}
    counts, layers = counts_of(run_of(model=MODELS[model], train=train), PICTURES)
    ranks = {} if share is None else {layer.name: max(1, round(share * layer.full)) for layer in layers}
    traced = counts.traced(ranks, SIZE)
    net, optimizer, passes = real(counts, ranks)
    assert traced.peak == pytest.approx(memory.peak_bytes(passes, CPU), rel=0.1)
    optimizer.step()
    assert traced.optimizer == optimizer_bytes(optimizer)
    sizes = counts.sizes(ranks)
    assert sizes.gradient_bytes == sum(p.grad.nbytes for p in net.parameters() if p.requires_grad)
    assert sizes.weight_bytes == sum(t.nbytes for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("model", ["vit", "mlp"])
def test_the_step_before_a_check_holds_whole_gradients_too(model, share, memory):
    counts, layers = counts_of(run_of(model=MODELS[model], method=OIALR), PICTURES)
    ranks = {layer.name: max(1, round(share * layer.full)) for layer in layers}
    net, _, passes = real(counts, ranks)

    def probing():
        with dense_gradients({site.name: site for site in select(net).candidates}) as gradients:
            passes()
        assert gradients.keys() == ranks.keys()

    expected = counts.sizes(ranks).gradient_bytes + probing_bytes(counts, ranks, layers, Share(SIZE, SIZE))
    assert expected == pytest.approx(memory.peak_bytes(probing, CPU), rel=0.1)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "adagrad", "adafactor"])
def test_the_state_of_other_optimisers_is_known_too(name):
    optimizer = {"name": name, "lr": 0.1} | ({"momentum": 0.9} if name == "sgd" else {})
    counts, _ = counts_of(run_of(optimizer=optimizer))
    _, real_one, passes = real(counts, {})
    passes()
    real_one.step()
    assert counts.traced({}, SIZE).optimizer == optimizer_bytes(real_one)


def test_a_check_holds_what_a_real_one_holds(memory):
    run = run_of(model={"name": "mlp", "hidden": [512, 384]}, method=OIALR | {"delay": 1, "every": 1})
    counts, layers = counts_of(run, PICTURES)
    with memory.Recording(CPU) as recording:
        net, optimizer, passes = recording.phase("make", lambda: real(counts, {}))
        method = recording.phase("make", lambda: Method(net, optimizer, delay=1, every=1, max_aspect=10.0))
        recording.phase("make", passes)
        recording.phase("make", optimizer.step)
        optimizer.zero_grad(set_to_none=True)
        recording.phase("held", lambda: torch.empty(1))
        recording.phase("check", method.step)
    peaks = recording.peaks()
    assert check_bytes(layers, 4) == pytest.approx(peaks["check"] - peaks["held"], rel=0.25)


@pytest.mark.parametrize("processes", [1, 4])
def test_phases_add_up(processes):
    counts, layers = counts_of(run_of(train={"steps": 13, "ema": 0.99}))
    path = path_of(counts.subject.run.method, layers, 13, Assumed())
    held = memory_of(counts, path, layers, Share(16, 16), processes, TABLE["a100"])
    assert [one.phase for one in held] == ["at the start", "factors begin", "a check", "at the end"]
    for one in held:
        parts = one.weights + one.gradients + one.optimizer + one.activations + one.check + one.other
        assert max(one.weights, one.optimizer, one.activations) < one.total <= parts + one.gradients
        assert one.other > one.weights  # the averages
    assert (held[2].gradients > 0) == (processes > 1)  # the buckets stay


def test_a_model_that_is_shared_out_takes_its_share():
    whole, layers = counts_of(run_of())
    shared, _ = counts_of(run_of(parallel={"shard": True}))
    path = path_of(whole.subject.run.method, layers, 13, Assumed())
    one, part = (memory_of(c, path, layers, Share(16, 16), 4, TABLE["a100"])[0] for c in (whole, shared))
    assert part.weights == -(-one.weights // 4)
    assert part.optimizer == -(-one.optimizer // 4)
    assert part.activations == one.activations


BY_OUTPUT = {
    # before factors, with factors
    "at_delay": (OIALR | {"order": "output"}, (False, True)),
    "when_it_pays": (OIALR | {"order": "output", "convert": "when_it_pays"}, (True, True)),
    "truncate": ({"name": "truncate", "at": 0.5, "rank": 0.25, "order": "output"}, (True, False)),
    "by size": (OIALR, (False, False)),
}


@pytest.mark.parametrize("share", [None, 1.0, 0.25])
@pytest.mark.parametrize("model", ["vit", "mlp"])
@pytest.mark.parametrize(("method", "watches"), BY_OUTPUT.values(), ids=BY_OUTPUT)
def test_what_layers_take_in_before_a_check_by_outputs_is_counted(model, share, method, watches):
    counts, layers = counts_of(run_of(model=MODELS[model], method=method), PICTURES)
    ranks = {} if share is None else {layer.name: max(1, round(share * layer.full)) for layer in layers}
    found = watched_bytes(section_of(counts), ranks, layers)
    if not watches[bool(ranks)]:
        assert found == 0
        return
    net, _, passes = real(counts, ranks)
    watch = InputWatch(
        [site for site in select(net).candidates if site.name in {one.name for one in layers}], inside=True
    )
    passes()
    watch.close()
    assert found == sum(one.total.nbytes for one in watch._sums.values()) > 0
