"""What is refused before training starts, and in which words; and the small print of the interface."""

import copy
import pickle

import pytest
import torch
from small_runs import idle, mlp, stack, with_spectrum
from torch import nn

from hpclr import OIALR
from hpclr.lowrank import Energy
from hpclr.methods import Dense, Method
from hpclr.methods.placement import Here


def make(model=None, optimizer=None, **settings):
    model = mlp([8, 8, 8]) if model is None else model
    return OIALR(model, optimizer or idle(model), **({"delay": 4, "every": 2} | settings))


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("every", 0, "above 0"),
        ("every", -1, "above 0"),
        ("every", float("nan"), "above 0"),
        ("every", float("inf"), "whole number of steps"),
        ("every", 2.5, "whole number of steps"),
        ("delay", -1, "whole number of steps"),
        ("delay", 10.5, "whole number of steps"),
        ("layer_fraction", 0, r"\(0, 1\]"),
        ("layer_fraction", 1.01, r"\(0, 1\]"),
        ("max_cut", -0.1, r"\[0, 1\]"),
        ("max_cut", 1.1, r"\[0, 1\]"),
        ("min_rank", -0.1, r"\[0, 1\]"),
        ("min_rank", 2, r"\[0, 1\]"),
        ("max_aspect", 1, "above 1"),
        ("freeze", "never", "'schedule' or 'stable'"),
        ("stability_threshold", 0, r"\(0, 1\]"),
        ("stability_threshold", 1.5, r"\(0, 1\]"),
        ("convert", "at once", "'at_delay' or 'when_it_pays'"),
        ("sigma_lr", 0, "above 0"),
        ("sigma_lr", float("inf"), "finite"),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_is_allowed(setting, value, allowed):
    with pytest.raises(ValueError, match=rf"^{setting} must be .*{allowed}.*{value!s}"):
        make(**{setting: value})


@pytest.mark.parametrize("cutoff", [0, 1, -0.1, 1.5, float("nan"), {"rule": "unheard of"}, {"rule": "energy"}])
def test_a_cutoff_that_is_no_rule_is_refused(cutoff):
    with pytest.raises(ValueError, match=r"[Cc]utoff|rule"):
        make(cutoff=cutoff)


@pytest.mark.parametrize("setting", ["delay", "every"])
def test_a_fraction_needs_the_length_of_the_run(setting):
    with pytest.raises(ValueError, match=rf"{setting}=0\.25 is a fraction of the run.*total_steps"):
        make(**{setting: 0.25})


def test_a_model_without_an_eligible_layer_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match=r"no layer that OIALR can convert \(.*0: its weight is 2×100.*max_aspect"):
        make(nn.Sequential(nn.Linear(100, 2), nn.LayerNorm(2)), keep_last=False)
    with pytest.raises(ValueError, match=r"no layer that OIALR can convert.*keep_first, keep_last"):
        make(mlp([8, 8]))
    with pytest.raises(ValueError, match=r"no layer that OIALR can convert.*no parameters"):
        make(nn.Sequential(), idle(mlp([2, 2])))


def test_a_pattern_that_matches_nothing_is_refused():
    for setting in ("include", "exclude"):
        with pytest.raises(ValueError, match=r"pattern 'decoder\.\*'.*matches no layer.*its layers are 0, 2"):
            make(**{setting: ["decoder.*"]})


def test_include_exclude_and_the_ends_choose_the_layers_and_the_report_says_why():
    settings = {"include": ["0", "2", "6"], "exclude": ["2"]}
    oialr = make(mlp([8, 8, 8, 8, 8]), **settings, keep_last=False)
    assert list(oialr.ranks) == ["0", "6"]
    assert oialr.report["2"] == "excluded by name"
    assert oialr.report["4"] == "not among the names to include"
    assert list(make(mlp([8, 8, 8, 8]), keep_first=True).ranks) == ["2"]


def test_the_head_is_kept_whatever_its_shape():
    """A head too wide for the aspect rule is still the head: the layer before it is converted."""
    oialr = make(mlp([64, 64, 64, 4]))
    assert list(oialr.ranks) == ["0", "2"]
    assert list(oialr.report) == ["4"]


def test_a_weight_that_is_not_finite_is_refused_with_the_name_of_its_layer():
    for delay in (0, 4):
        model = mlp([8, 8, 8])
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layer '0': .*8×8.*not finite"):
            make(model, delay=delay)


# --- models and optimisers that cannot be followed -------------------------------------------------------------------


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, found function"):
        make(lambda x: x, idle(mlp([2, 2])))


@pytest.fixture
def one_process_group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_in_data_parallel_is_refused_compiled_or_not():
    model = mlp([8, 8, 8])
    for wrapped in (nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        with pytest.raises(TypeError, match=r"wrapped in DataParallel, which fixes.*Replica\(model\)"):
            make(wrapped)


def test_a_model_in_distributed_data_parallel_is_refused(one_process_group):
    model = nn.parallel.DistributedDataParallel(mlp([8, 8, 8]))
    with pytest.raises(TypeError, match="wrapped in DistributedDataParallel"):
        make(model)


def test_a_compiled_model_is_taken_by_the_module_inside():
    model = mlp([8, 8, 8])
    assert list(make(torch.compile(model)).ranks) == ["0"]


def test_optimisers_that_cannot_follow_are_refused():
    model = mlp([8, 8, 8])
    for cls in (torch.optim.LBFGS, torch.optim.SparseAdam):
        with pytest.raises(TypeError, match=rf"{cls.__name__} cannot follow a change of basis"):
            make(model, cls(model.parameters()))
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, found LambdaLR"):
        make(model, torch.optim.lr_scheduler.LambdaLR(idle(model), lambda step: 1.0))


def test_an_optimiser_of_other_parameters_is_refused_by_name():
    model = mlp([8, 8, 8, 8])
    with pytest.raises(ValueError, match=r"does not hold the weights of 1 of the 2 layers.*\(2\)"):
        make(model, torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_nothing_has_changed_after_a_refusal():
    model = mlp([8, 8, 8])
    names = [name for name, _ in model.named_parameters()]
    optimizer = idle(model)
    with pytest.raises(ValueError, match="cutoff"):
        make(model, optimizer, delay=0, cutoff=2)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model[0]) is nn.Linear


# --- the common face -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [lambda model: Dense(model), lambda model: make(model)], ids=["dense", "oialr"])
def test_every_method_has_the_same_face(method):
    model = mlp([8, 8, 8])
    chosen = method(model)
    assert isinstance(chosen, Method)
    assert chosen.penalty().shape == ()
    assert float(chosen.penalty()) == 0.0
    loss = model(torch.ones(2, 8)).sum()
    (loss + chosen.penalty()).backward()
    chosen.on_change(lambda change: None)
    chosen.step()
    chosen.load_state_dict(chosen.state_dict())
    assert all(rank == 8 for rank in chosen.ranks.values())


def test_dense_is_the_baseline():
    method = Dense(mlp([8, 8, 8]))
    assert method.ranks == method.state_dict() == {}
    assert method.checks == 0


def test_until_it_is_converted_a_layer_is_listed_with_the_rank_the_rule_would_keep():
    model = stack(with_spectrum([3.0, 2.0, 0.1, 0.1], 4, 4))
    optimizer = idle(model)
    oialr = make(model, optimizer, keep_last=False, cutoff=Energy(0.99))
    assert oialr.ranks == {"0": 4}
    for _ in range(2):
        optimizer.step()
    oialr.step()
    assert oialr.ranks == {"0": 2}
    assert oialr.frozen == {"0": False}


def test_a_placement_decides_who_examines_and_all_apply():
    model = mlp([8, 16, 8, 8])
    optimizer = idle(model)
    asked = {}

    class Backwards(Here):
        def share(self, costs, examine, memory):
            asked.update(costs)
            return ((name, examine(name)) for name in reversed(costs))

    oialr = OIALR(model, optimizer, delay=1, every=1, placement=Backwards())
    optimizer.step()
    oialr.step()
    assert asked == {"0": 8 * 8 * 16, "2": 8 * 8 * 16}
    assert all(oialr.frozen.values())


def test_a_copy_or_a_pickle_is_refused_since_it_would_lose_its_hooks():
    method = make()
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(method)


def test_two_methods_share_an_optimiser_only_for_different_layers():
    model = mlp([8, 8, 8, 8])
    optimizer = idle(model)
    make(model, optimizer, include=["0"], keep_last=False)
    with pytest.raises(ValueError, match="another method"):
        make(model, optimizer, include=["0", "2"], keep_last=False)
    make(model, optimizer, include=["2"], keep_last=False)


def test_patterns_come_in_a_list():
    for setting in ("include", "exclude"):
        with pytest.raises(TypeError, match="list of patterns"):
            make(**{setting: "0"})
