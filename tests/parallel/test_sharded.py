"""A model that is sharded over processes trains as replicas of it do, and as one process does."""

import numpy
import pytest
import torch
from sharded_runs import BATCH, SAVED_AT, Block, Net, adamw, together, trained
from torch import nn

from hpclr import OIALR
from hpclr.errors import UsageError
from hpclr.lowrank import EMA, densify, factorize
from hpclr.methods import Cuttlefish, FixedRank, SVDTraining, Truncate
from hpclr.parallel import Replica, Sharded, shards
from hpclr.parallel.shards import rows_of
from hpclr.parallel.verify import ReplicasDifferError

slow = pytest.mark.slow


def assert_equal_training(found, expected, within=1e-5):
    """Losses, lengths of gradients, ranks at every check, and weights."""
    for one in found:
        assert one["ranks"] == expected["ranks"]
        assert one["converted"] == expected["converted"]
        assert one["losses"] == pytest.approx(expected["losses"], abs=within)
        assert one["norms"] == pytest.approx(expected["norms"], abs=within)
        assert one["stability"] == pytest.approx(expected["stability"], abs=1e-4)
    assert found[0]["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert numpy.abs(found[0]["weights"][name] - weight).max() < within, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What two processes have saved on the way, and how they went on."""
    where = tmp_path_factory.mktemp("pieces")
    return where, trained(2, "sharded", "adamw", save=where)


def test_shards_train_as_one_process(saved):
    [alone] = trained(1, "sharded", "adamw")
    assert_equal_training(saved[1], alone)
    assert all(one["is_weight"] for one in saved[1])
    assert {one["hooks"] for one in saved[1]} == {alone["hooks"]}
    assert len(alone["outside"]) > 1
    assert not any(one["outside"] for one in saved[1]), "of shards nothing is gathered"


@slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("scenario", ["adamw", "sgd", "kept"])
def test_shards_train_as_one_process_in_every_way(processes, scenario):
    """Conversion at the delay, at once, or when it pays; cuts, down to fewer rows than processes; clipping."""
    [alone] = trained(1, "sharded", scenario)
    found = trained(processes, "sharded", scenario)
    assert_equal_training(found, alone)
    assert alone["converted"][-1] > 1
    assert alone["ranks"][-1] != alone["ranks"][0] or alone["converted"][-1] > alone["converted"][0]


@slow
@pytest.mark.parametrize("scenario", ["adamw", "norms"])
def test_shards_train_as_replicas(scenario):
    """With batch normalisation too, whose running statistics are the first process's."""
    replicas, sharded = trained(2, "replica", scenario), trained(2, "sharded", scenario)
    assert_equal_training(sharded, replicas[0])
    for one, replica in zip(sharded, replicas, strict=True):
        assert one["buffers"] == pytest.approx(replica["buffers"], abs=1e-4)
    assert sharded[0]["trained"] == replicas[0]["trained"]


def test_a_process_holds_its_share(saved):
    """Before and after conversion."""
    for one in saved[1]:
        for here, whole in one["held"]:
            assert here < 0.54 * whole
        assert one["held"][-1][1] < 0.5 * one["held"][0][1]


@slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_larger_model_is_shared_out_evenly(processes):
    """And no tensor of the whole model is left anywhere in the memory of a process."""
    [alone] = trained(1, "sharded", "large")
    for one in trained(processes, "sharded", "large"):
        for here, whole in one["held"]:
            assert here < 1.05 * whole / processes
        table = 1 << 17  # bytes of a constant of the digest
        assert one["alive"] - table < 1.1 * alone["alive"] / processes


@slow
def test_mixed_precision_keeps_weights_in_float32():
    found = trained(2, "sharded", "bf16")
    [alone] = trained(1, "sharded", "adamw")
    assert found[0]["types"] == {"torch.float32"}
    assert found[0]["ranks"] == found[1]["ranks"]
    assert found[0]["losses"] == pytest.approx(alone["losses"], abs=0.02)
    assert found[0]["losses"] != pytest.approx(alone["losses"], abs=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(saved):
    where, uninterrupted = saved
    for resumed, one in zip(trained(2, "sharded", "adamw", load=where), uninterrupted, strict=True):
        assert resumed["losses"] == one["losses"][SAVED_AT:]
        assert resumed["bits"] == one["bits"]


@slow
@pytest.mark.parametrize("processes", [1, 4])
def test_pieces_load_on_another_number_of_processes(saved, processes):
    where, uninterrupted = saved
    resumed = trained(processes, "sharded", "adamw", load=where)
    assert resumed[0]["losses"] == pytest.approx(uninterrupted[0]["losses"][SAVED_AT:], abs=1e-5)
    for name, weight in uninterrupted[0]["weights"].items():
        assert numpy.abs(resumed[0]["weights"][name] - weight).max() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 8, 12])
def test_rows_are_dealt_out_as_torch_does(length, size):
    chunks = torch.arange(length).chunk(size) if length else []
    rows = [torch.arange(length)[slice(*rows_of(length, rank, size))] for rank in range(size)]
    assert [row.tolist() for row in rows if len(row)] == [chunk.tolist() for chunk in chunks]


def small(**options):
    torch.manual_seed(0)
    return Sharded(Net(), **options)


def raised(action, *kinds):
    try:
        action()
    except kinds as error:
        return type(error).__name__, str(error)
    return None


def all_on_meta():
    with torch.device("meta"):
        return small()


def refused_of_a_sharded_model():
    sharded = small()
    optimizer = adamw(sharded.parameters())
    module = sharded.module
    oialr = OIALR(sharded, optimizer, delay=10, every=5)
    later = {
        "truncate": lambda: Truncate(sharded, optimizer, at=1, rank=0.5),
        "fixed rank": lambda: FixedRank(sharded, optimizer, rank=0.5),
        "cuttlefish": lambda: Cuttlefish(sharded, optimizer, every=5, delay=50, window=2),
        "svd": lambda: SVDTraining(sharded, optimizer, sparsity=0.1, prune_at=5),
        "inside": lambda: OIALR(module, optimizer, delay=10, every=5),
        "again": lambda: Sharded(module),
        "replica": lambda: Replica(sharded),
        "tied": lambda: OIALR(sharded, optimizer, delay=10, every=5, tied=True),
        "hook": lambda: oialr.on_change(EMA(module, 0.9).follow),
        "densify": lambda: factorize(module),
        "load": lambda: sharded.load_pieces({"model/head.weight": (5, 12)}, lambda *_: None),
        "meta": all_on_meta,
        "compile": lambda: torch.compile(sharded, backend="eager")(torch.zeros(2, 6, 7)),
    }
    return {what: raised(action, TypeError, ValueError, RuntimeError, UsageError) for what, action in later.items()}


@pytest.fixture(scope="module")
def refusals():
    return together(2, refused_of_a_sharded_model)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        *((what, "only OIALR") for what in ("truncate", "fixed rank", "cuttlefish", "svd")),
        ("inside", "give that to OIALR"),
        ("again", "already wrapped"),
        ("replica", "holds but a part"),
        ("tied", "a head and its embedding change together, which they cannot do on a sharded model"),
        ("hook", "cannot do so on a sharded model"),
        ("densify", "sharded over the processes"),
        ("load", "missing"),
        ("compile", "cannot be compiled"),
        ("meta", "the first process's model is on the meta device"),
    ],
)
def test_what_shards_cannot_do_is_refused(refusals, what, words):
    assert words in refusals[0][what][1]
    assert refusals[0][what] == refusals[1][what]


def changed_on_one_process():
    """A process whose arithmetic is faulty gives a layer another Σ."""
    sharded = small()
    optimizer = adamw(sharded.parameters())
    oialr = OIALR(sharded, optimizer, delay=1, every=1)
    if sharded.group.rank == 1:
        diag, torch.diag = torch.diag, lambda s: diag(s) * 1.0000002
    sharded(torch.randn(BATCH, 6, 7)).sum().backward()
    optimizer.step()
    return raised(oialr.step, ReplicasDifferError)


def test_a_process_that_changes_a_layer_in_another_way_is_found():
    for kind, text in together(2, changed_on_one_process):
        assert kind == "ReplicasDifferError"
        assert "changed layers" in text


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (None, ["blocks.0", "blocks.1"]),
        (["blocks.*"], ["blocks.0", "blocks.1"]),
        (
            ["*.mlp", "*.attention", "head"],
            ["blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp", "head"],
        ),
        ([], []),
    ],
)
def test_units_are_blocks_or_what_patterns_name(units, expected):
    assert small(units=units).units == expected


def test_containers_inside_containers_are_no_units():
    stages = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(Block(nn.LayerNorm, 4), Block(nn.LayerNorm, 4)))
    assert Sharded(stages).units == ["0", "2.0", "2.1"]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


def tied():
    net = Net()
    net.blocks[1].mlp[0].weight = net.blocks[0].mlp[0].weight
    return net


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (Plain, {}, "name the modules with units="),
        (tied, {}, "'blocks.0.mlp.0.weight' and 'blocks.1.mlp.0.weight' are one parameter in two units"),
        (Net, {"units": ["layer.*"]}, "'layer.*' .units. matches no module"),
        (Net, {"units": "blocks.*"}, "takes a list"),
        (Net, {"svd": "heat"}, "'rank0' or 'spread'"),
        (lambda: torch.compile(Net()), {}, "is compiled"),
        (lambda: Replica(Net()), {}, "already wrapped in Replica"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), {}, "not known yet"),
    ],
)
def test_what_cannot_be_sharded_is_refused(make, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Sharded(make(), **options)


def test_a_factored_layer_that_is_a_unit_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    factorize(model, 2)
    with pytest.raises(ValueError, match="'0' is itself a factored layer"):
        Sharded(model)


def without(names):
    """As on a torch that keeps sharded parameters in another way."""
    for name in names:
        delattr(shards._fsdp_param, name)
    return raised(small, UsageError)


@slow
def test_a_torch_with_other_names_is_refused_by_what_it_lacks():
    for kind, text in together(2, without, ["ParamModuleInfo"]):
        assert kind == "UsageError"
        assert f"torch {torch.__version__} keeps in another way: it lacks ParamModuleInfo" in text


def test_without_processes_it_is_the_model_itself():
    sharded = small()
    x = torch.randn(3, 6, 7)
    assert torch.equal(sharded(x), sharded.module(x))
    assert [name for name, _ in sharded.pieces()] == [f"model/{name}" for name in sharded.module.state_dict()]
    densify(sharded.module)
