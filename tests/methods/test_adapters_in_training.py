"""SARA, Mo-SARA and EDoRA in a training loop: what trains and what does not, optimisers, resuming, processes."""

import copy
import inspect
import io
import multiprocessing
import pickle

import pytest
import torch
from adapter_runs import METHODS, finetune, pretrained, trainable
from small_runs import batch
from torch import nn

from hpclr import EMA, OIALR, factorize
from hpclr.lowrank.adapters import adapted_modules, adapter_state_dict, load_adapter_state_dict, remove_adapters
from hpclr.parallel import Replica

every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
X, _ = batch(99, 10, 8)


def deep_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- what trains ----------------------------------------------------------------------------------------------------


@every_method
def test_the_function_is_kept_at_the_start(make):
    model = pretrained()
    before = model(X)
    make(model)
    assert (model(X) - before).norm() / before.norm() <= 1e-6


@every_method
def test_only_adapters_head_and_what_is_asked_for_change(make):
    model = pretrained()
    base = deep_state(model)
    method = make(model, train=["*.bias"])
    start = deep_state(model)
    assert method.trained == ("0.bias", "2.bias", "4.bias", "6.weight", "6.bias")
    why = "without an adapter as the first or last layer (keep_first, keep_last)"
    assert method.report == {"6": f"{why}; its weight and bias train"}
    finetune(model, torch.optim.AdamW(trainable(model), 1e-2), method, 2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    adapters = {f"{path}.{name}" for path, layer in adapted_modules(model) for name in layer.trained}
    assert changed == adapters | set(method.trained)
    remove_adapters(model)
    assert all(torch.equal(model.state_dict()[name], base[name]) for name in ("0.weight", "2.weight", "4.weight"))


@every_method
def test_without_a_head_and_whatever_was_frozen_before(make):
    model = pretrained().requires_grad_(False)
    method = make(model, keep_last=False, keep_first=True, exclude=["4"])
    assert list(method.ranks) == ["2", "6"]
    assert method.trained == ()
    assert set(trainable(model)) == {p for n in (2, 6) for p in map(model[n].parameter, model[n].trained)}


@every_method
def test_what_is_said_of_layers_that_train_without_an_adapter(make):
    method = make(pretrained(), include=["2"], train=["4.bias"])
    unnamed = "not among the names to include"
    assert method.report == {
        "0": unnamed,
        "4": f"{unnamed}; its bias trains",
        "6": f"{unnamed}; its weight and bias train",
    }


@pytest.mark.parametrize("name", ["sara", "edora"])
def test_merged_as_unmerged_and_back_to_the_bit(name):
    model = pretrained()
    base = deep_state(model)
    method = METHODS[name](model)
    finetune(model, torch.optim.AdamW(trainable(model), 1e-2), method, 5)
    model.eval()
    trained, state = model(X), deep_state(model)
    method.merge()
    assert (model(X) - trained).norm() / trained.norm() <= 1e-5
    assert not torch.equal(model[2].weight, base["2.weight"])
    method.unmerge()
    assert torch.equal(model(X), trained)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model[2].weight, base["2.weight"])


@every_method
def test_it_learns(make):
    model = pretrained()
    x, y = batch(7, 10, 8)
    losses = []
    method = make(model, keep_last=False)
    optimizer = torch.optim.AdamW(trainable(model), 3e-2)
    for steps in (0, 60):
        finetune(model, optimizer, method, steps)
        losses.append(nn.functional.cross_entropy(model(x), y).item())
    assert losses[1] < losses[0] - 0.2


# --- optimisers -----------------------------------------------------------------------------------------------------


@every_method
def test_adapters_take_the_places_of_their_weights(make):
    model = pretrained()
    slow = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    groups = [{"params": slow, "lr": 1e-3, "weight_decay": 0.1}, {"params": [*model[4].parameters()]}]
    optimizer = torch.optim.AdamW([*groups, {"params": [*model[6].parameters()]}], 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    nn.functional.cross_entropy(model(X), torch.zeros(32, dtype=torch.long)).backward()
    optimizer.step()
    method = make(model, optimizer, train=["2.bias"])
    expected = [
        [*adapter_of(model[0]), *adapter_of(model[2]), model[2].bias],
        adapter_of(model[4]),
        [*model[6].parameters()],
    ]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[*map(id, g)] for g in expected]
    assert set(optimizer.state) == {model[2].bias, *model[6].parameters()}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    start = deep_state(model)
    finetune(model, optimizer, method, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-3, 5e-3]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert torch.equal(model[0].weight, start["0.weight"])
    assert not torch.equal(model[6].weight, start["6.weight"])


def adapter_of(layer):
    return [layer.parameter(name) for name in layer.trained]


@every_method
def test_with_and_without_an_optimiser_is_the_same(make):
    results = []
    for given in (True, False):
        model = pretrained()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5) if given else None
        method = make(model, optimizer)
        finetune(model, optimizer or by_hand(model, method), method, 3)
        results.append(model(X))
    assert torch.equal(*results)


def by_hand(model, method):
    """AdamW whose decay leaves the scales alone."""
    scales = method.without_decay
    spared = {id(p) for p in scales}
    rest = [p for p in trainable(model) if id(p) not in spared]
    return torch.optim.AdamW([{"params": rest}, {"params": scales, "weight_decay": 0.0}], 1e-2, weight_decay=0.5)


@every_method
def test_weight_decay_leaves_scales_alone_and_nothing_else(make):
    model = pretrained()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    method = make(model, optimizer)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    start = deep_state(model)
    optimizer.step()
    spared = {id(p) for p in method.without_decay}
    for name, parameter in model.named_parameters():
        share = 0.95 if parameter.requires_grad and id(parameter) not in spared else 1
        assert torch.allclose(parameter, share * start[name]), name
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if id(p) in spared} == {
        name for layer in (model[0],) for name in layer.trained if name not in ("sara_a", "sara_b", "edora_core")
    }
    assert len(optimizer.param_groups) == 1


@every_method
def test_names_in_the_groups_follow(make):
    model = pretrained()
    optimizer = torch.optim.AdamW(model.named_parameters(), 1e-2)
    make(model, optimizer, train=["2.bias"])
    (group,) = optimizer.param_groups
    named = dict(model.named_parameters())
    assert all(parameter is named[name] for parameter, name in zip(group["params"], group["param_names"], strict=True))
    assert len(group["params"]) == len(trainable(model))


def test_names_of_a_model_that_is_a_layer_follow():
    layer = nn.Linear(10, 8)
    optimizer = torch.optim.AdamW(layer.named_parameters(), 1e-2)
    METHODS["sara"](layer, optimizer, keep_last=False)
    assert optimizer.param_groups[0]["param_names"] == ["sara_a", "sara_lambda", "sara_b"]


def test_optimisers_that_hold_too_little():
    make = METHODS["sara"]
    model = pretrained()
    with pytest.raises(ValueError, match="does not hold the weights of 3 of the 3 layers"):
        make(model, torch.optim.SGD(model[6].parameters(), 0.1))
    held = [p for name, p in model.named_parameters() if not name.startswith("6")]
    with pytest.raises(ValueError, match=r"does not hold 2 of the parameters that are to train \(6\.weight, 6\.bias\)"):
        make(model, torch.optim.SGD(held, 0.1))
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        make(model, "adamw")
    assert not list(adapted_modules(model))
    assert all(p.requires_grad for p in model.parameters())


@every_method
def test_signatures_say_every_keyword(make):
    keywords = inspect.signature(type(make(pretrained()))).parameters
    common = ["max_aspect", "keep_first", "keep_last", "include", "exclude", "train", "seed", "placement"]
    assert list(keywords)[:2] == ["model", "optimizer"]
    assert [name for name in keywords if name in common] == common
    assert all(keyword.kind is keyword.KEYWORD_ONLY for name, keyword in keywords.items() if name in common)


# --- refusals -------------------------------------------------------------------------------------------------------


@every_method
def test_what_is_refused(make):
    model = pretrained()
    for error, settings, expected in (
        (ValueError, {"include": ["9"]}, "the pattern '9' .* matches no layer"),
        (ValueError, {"train": ["nothing.*"]}, r"the pattern 'nothing\.\*' \(train\) matches no parameter"),
        (ValueError, {"train": ["0.*"]}, r"'0\.weight' is to train, and is the weight under an adapter"),
        (ValueError, {"exclude": ["*"]}, "the model has no layer that"),
        (TypeError, {"train": "*.bias"}, "train takes a list of patterns"),
        (TypeError, {"include": "0"}, "take a list of patterns"),
    ):
        with pytest.raises(error, match=expected):
            make(model, **settings)
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer '2': .* not finite"):
        make(model)
    assert not list(adapted_modules(model))
    with pytest.raises(TypeError, match="wrapped in DataParallel"):
        make(nn.DataParallel(pretrained()))


@every_method
def test_models_with_another_form(make):
    model = pretrained()
    make(model)
    with pytest.raises(ValueError, match="layer '0' has an adapter already"):
        make(model)
    model = pretrained()
    factorize(model, 2)
    with pytest.raises(ValueError, match="layer '0' is held as factors already"):
        make(model)
    model = pretrained()
    make(model)
    with pytest.raises(ValueError, match="the model has no layer that OIALR can convert"):
        OIALR(model, torch.optim.SGD(trainable(model), 0.1), delay=1, every=1)


# --- states ---------------------------------------------------------------------------------------------------------


@every_method
def test_resumed_to_the_bit(make):
    model = pretrained()
    method = make(model, optimizer := torch.optim.AdamW(model.parameters(), 1e-2))
    finetune(model, optimizer, method, 3)
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in (method, model, optimizer)], file)
    finetune(model, optimizer, method, 3, first=3)
    file.seek(0)
    states = torch.load(file)

    other = pretrained()
    fresh = torch.optim.AdamW(other.parameters(), 1e-2)
    again = make(other, fresh)
    for thing, state in zip((again, other, fresh), states, strict=True):
        thing.load_state_dict(state)
    finetune(other, fresh, again, 3, first=3)
    assert torch.equal(other(X), model(X))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_ranks_of_the_saved_state_are_taken():
    """As after a decomposition on another machine, which may round a singular value to the other side."""
    model = pretrained()
    method = METHODS["mo_sara"](model)
    state, parameters = method.state_dict(), [id(p) for p in model.parameters()]
    state["ranks"] = state["ranks"] | {"2": 3}
    method.load_state_dict(state)
    assert method.ranks["2"] == 3
    assert model[2].mo_sara_lambdas.shape == (5, 3)
    assert [id(p) for p in model.parameters()] == parameters


@every_method
def test_states_of_others_are_refused(make):
    method = make(pretrained())
    state = method.state_dict()
    for change, expected in (
        ({"method": "oialr"}, "the saved state is of oialr, not of"),
        ({"settings": {"proportion": 0.9}}, "is of other settings: it was saved with settings"),
        ({"trained": ["6.weight"]}, "is of other settings: it was saved with trained"),
        ({"ranks": {"0": 4, "2": 4}}, "another model or other settings: layers 4 differ"),
        ({"ranks": method.ranks | {"2": 13}}, "another model or other settings: layers 2 differ"),
    ):
        with pytest.raises(ValueError, match=expected):
            method.load_state_dict(state | change)


@every_method
def test_copies_pickles_and_averages(make):
    model = pretrained()
    method = make(model)
    average, start = EMA(model, 0.5), model(X)
    method.on_change(average.follow)
    finetune(model, torch.optim.SGD(trainable(model), 0.1), method, 2)
    with average.applied():
        assert torch.equal(model(X), start)
    assert not torch.equal(model(X), start)
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))
    assert method.checks == 0
    assert float(method.penalty()) == 0


@every_method
def test_adapters_go_to_a_fresh_model_of_the_same_weights(make):
    model = pretrained()
    method = make(model, keep_last=False)
    finetune(model, torch.optim.AdamW(trainable(model), 1e-2), method, 3)
    fresh = pretrained()
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    assert torch.equal(fresh(X), model(X))
    assert sum(v.numel() for v in adapter_state_dict(model).values()) == sum(
        layer.parameter(name).numel() for _, layer in adapted_modules(model) for name in layer.names
    )


def test_seeds_of_layers_do_not_depend_on_which_others_there_are():
    starts = []
    for settings in ({}, {"include": ["2"]}, {"seed": 1}):
        model = pretrained()
        METHODS["sara"](model, **settings)
        starts.append(model[2].sara_a.detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@every_method
def test_the_global_generator_is_left_alone(make):
    model, state = pretrained(), torch.random.get_rng_state()
    make(model)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- processes ------------------------------------------------------------------------------------------------------


@every_method
def test_a_replica_of_one_process(make):
    model = pretrained()
    replica = Replica(model)
    method = make(replica)
    finetune(replica, torch.optim.SGD(trainable(model), 0.1), method, 2)
    assert list(method.ranks) == ["0", "2", "4"]


def one_process(rank, path, way, results):
    """Two replicas on halves of each batch; each tells all it has."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = {}
    for name, make in METHODS.items():
        model = pretrained()
        torch.manual_seed(rank)  # replicas must be the same all the same
        replica = Replica(model, svd=way)
        replica(X).sum().backward()  # a step of what was before has its own gradients
        method = make(replica)
        optimizer = torch.optim.SGD(trainable(model), 0.1)
        for step in range(3):
            x, y = batch(step, 10, 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(replica(x[rank::2]), y[rank::2]).backward()
            optimizer.step()
            method.step()
        found[name] = (method.ranks, {key: value.tolist() for key, value in model.state_dict().items()})
    results.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["rank0", "spread"])
def test_two_processes_train_as_one(way, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=one_process, args=(r, tmp_path / "meet", way, results)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    assert found[0] == found[1]
    for name, make in METHODS.items():
        model = pretrained()
        method = make(model)
        finetune(model, torch.optim.SGD(trainable(model), 0.1), method, 3)
        ranks, state = found[0][name]
        assert ranks == method.ranks
        for key, value in model.state_dict().items():
            assert torch.allclose(torch.tensor(state[key]), value, atol=1e-5)
