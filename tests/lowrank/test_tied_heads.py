"""A head with the weight of an embedding: one weight, one set of factors, two layers that use them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lowrank_helpers import dense_twin
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpclr.lowrank import (
    count_flops,
    count_training_flops,
    densify,
    factorize,
    fold,
    load_state_dict,
    select,
    summarize,
)
from hpclr.lowrank.activations import input_moments
from hpclr.lowrank.interchange import check_factors, dense_state_dict, factored_weights, tied_names
from hpclr.lowrank.probing import dense_gradients
from hpclr.lowrank.svd_layers import CHANNEL

TOKENS, WIDTH, PADDING = 30, 8, 3
NAMES = ("u", "sigma", "vh")


class Language(nn.Module):
    """Tells a token from the one before it."""

    def __init__(self, table=nn.Embedding, head=nn.Linear, **options):
        super().__init__()
        self.embedding = table(TOKENS, WIDTH, dtype=torch.float64, **options)
        nn.init.normal_(self.embedding.weight)  # that of padding too, as the head trains it
        self.body = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = head(WIDTH, TOKENS, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class Scaled(nn.Embedding):
    """Has a forward pass of its own."""

    def forward(self, ids):
        return 3 * super().forward(ids)


class Widened(nn.Linear):
    """Reads its weight."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


MODELS = {
    "plain": Language,
    "padding": lambda: Language(padding_idx=PADDING),
    "classes of their own": lambda: Language(Scaled, Widened, padding_idx=-1),
}


def ids(*shape):
    """Tokens, of which many are padding."""
    drawn = torch.randint(TOKENS, shape, generator=torch.Generator().manual_seed(1))
    return torch.where(torch.arange(drawn.numel()).view(shape) % 3 == 0, PADDING, drawn)


def factored(make=Language, rank=None):
    torch.manual_seed(0)
    model = make()
    factorize(model, rank, tied=True)
    return model


def is_tied(model):
    head, embedding = model.head._parameters, model.embedding._parameters
    names = [name for name in ("weight", *NAMES) if name in head or name in embedding]
    return bool(names) and all(head[name] is embedding[name] for name in names)


def loss(model, x):
    return F.cross_entropy(model(x).flatten(0, -2), x.roll(1, -1).flatten())


@pytest.mark.parametrize("shape", [(2, 3), (5, 9), (0, 2), (7,)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_both_compute_as_before(name, shape):
    torch.manual_seed(0)
    dense, x = MODELS[name](), ids(*shape)
    low = copy.deepcopy(dense)
    factorize(low, tied=True)
    assert is_tied(low)
    for found, expected in ((low.embedding(x), dense.embedding(x)), (low(x), dense(x))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert low.embedding(ids()).shape == (WIDTH,)


@pytest.mark.parametrize("shape", [(1, 5), (5, 9)], ids=["fewer rows than width", "more"])
@pytest.mark.parametrize("name", MODELS)
def test_sigma_is_trained_by_both_uses(name, shape):
    """∂Σ = Uᵀ G V, with G the whole gradient of the one dense weight, without that of padding as it is looked up."""
    low, x = factored(MODELS[name], 4), ids(*shape)
    dense = dense_twin(low)
    for model in (low, dense):
        loss(model, x).backward()
    u, sigma, vh = (low.head._parameters[name] for name in NAMES)
    torch.testing.assert_close(sigma.grad, u.mT @ dense.head.weight.grad @ vh.mT, rtol=0, atol=1e-12)
    assert u.grad is None
    assert vh.grad is None
    alone = low.embedding(x).square().sum()
    [found] = torch.autograd.grad(alone, [sigma])
    [whole] = torch.autograd.grad(dense.embedding(x).square().sum(), [dense.embedding.weight])
    torch.testing.assert_close(found, u.mT @ whole @ vh.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_the_whole_weight_is_that_of_both_uses(name):
    low, x = factored(MODELS[name], 3), ids(4, 5)
    dense = dense_twin(low)
    loss(dense, x).backward()
    with dense_gradients({site.name: site for site in select(low).eligible}) as found:
        loss(low, x).backward()
    torch.testing.assert_close(found["head"], dense.head.weight.grad, rtol=0, atol=1e-12)
    assert "arithmetic" not in low.embedding.__dict__


class _Largest(TorchDispatchMode):
    """The most numbers that any result has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def test_the_weight_is_never_built():
    low, x = factored(rank=4), ids(2, 3)
    with _Largest() as largest:
        low.embedding(x).square().sum().backward()
    assert largest.numbers == x.numel() * WIDTH < TOKENS * WIDTH


def test_under_autocast_tokens_are_of_the_weights_type():
    """As of a dense table, which autocast leaves alone."""
    low = factored(rank=4).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = low.embedding(ids(2, 3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense_twin(low).embedding(ids(2, 3)), rtol=0.05, atol=0.05)


def test_it_is_one_layer_and_the_head_is_it():
    model = Language()
    assert [site.name for site in select(model).eligible] == ["body"]
    chosen = select(model, tied=True)
    assert [site.name for site in chosen.eligible] == [site.name for site in chosen.candidates] == ["body", "head"]
    assert chosen.eligible[1].embeddings == (model.embedding,)
    assert chosen.left_alone == {"embedding": "its weight is that of the head 'head', and it changes with that"}
    reports = {report.name: report for report in factorize(model, 4, tied=True)}
    assert reports["head"] == ("head", (TOKENS, WIDTH), 4, True, "")
    assert not reports["embedding"].converted
    for tied in (False, True):
        chosen = select(model, tied=tied)
        assert [site.name for site in chosen.eligible] == ["body", "head"]
        assert chosen.left_alone == {"embedding": "its factors are those of the head 'head', and it changes with that"}


def test_without_being_asked_it_is_left_alone():
    model = Language()
    chosen = select(model)
    assert chosen.left_alone == {
        "embedding": "Embedding has no low-rank form",
        "head": "tied: its weight is shared with another layer",
    }
    factorize(model)
    assert type(model.embedding) is nn.Embedding
    assert is_tied(model)


def test_limits_of_shape_and_place_do_not_concern_it_but_names_do():
    limits = {"max_aspect": 2.0, "keep_last": True}
    assert [site.name for site in select(Language(), tied=True, **limits).eligible] == ["body", "head"]
    model = factored()
    assert [site.name for site in select(model, tied=True, **limits).eligible] == ["body", "head"]
    assert "head" in select(model, **limits).left_alone
    assert [site.name for site in select(Language(), tied=True, include=["head"]).eligible] == ["head"]


@pytest.mark.parametrize("names", [{"exclude": ["head"]}, {"exclude": ["emb*"]}, {"include": ["body"]}])
def test_names_that_leave_it_nothing_to_do_are_refused(names):
    with pytest.raises(ValueError, match=r"no head .* can be converted \(head: (excluded by name|not among)"):
        select(Language(), tied=True, **names)


def of(change=lambda model: None, **options):
    model = Language(**options)
    change(model)
    return model


def another_linear(model):
    model.again = nn.Linear(WIDTH, TOKENS)
    model.again.weight = model.head.weight


def frozen(model):
    model.head.weight.requires_grad_(False)


def named_as_a_factor(model):
    model.embedding.sigma = 1.0


def parametrised(model):
    model.embedding.register_parameter("gain", nn.Parameter(torch.ones(2)))
    parametrize.register_parametrization(model.embedding, "gain", nn.Identity())


REFUSED = {
    "max_norm": (lambda: of(max_norm=1.0), "has max_norm"),
    "sparse": (lambda: of(sparse=True), "has sparse"),
    "scale_grad_by_freq": (lambda: of(scale_grad_by_freq=True), "has scale_grad_by_freq"),
    "two heads": (lambda: of(another_linear), "shared with another layer"),
    "frozen": (lambda: of(frozen), "does not require gradients"),
    "parametrised": (lambda: of(parametrised), "is parametrised"),
    "named": (lambda: of(named_as_a_factor), "an attribute named as a factor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_change_with_its_embedding_is_refused(name):
    make, reason = REFUSED[name]
    model = make()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=reason):
        factorize(model, tied=True)
    assert dict(model.named_parameters()) == before


def test_trained_bases_are_no_form_of_it():
    with pytest.raises(ValueError, match="frozen bases alone"):
        select(Language(), kinds=CHANNEL, tied=True)
    assert "frozen bases, of another method" in select(factored(), kinds=CHANNEL).left_alone["head"]


def untied():
    model = Language()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def only_a_view():
    """Of the same memory, in a Parameter of its own."""
    model = Language()
    model.head.weight = nn.Parameter(model.embedding.weight.detach())
    return model


@pytest.mark.parametrize("make", [untied, only_a_view, lambda: nn.Linear(3, 2)])
def test_a_model_without_such_a_head_is_refused(make):
    for ask in (select, factorize):
        with pytest.raises(ValueError, match=r"no nn\.Linear of the model has the weight of"):
            ask(make(), tied=True)


def test_several_embeddings_may_have_it():
    model = Language()
    model.second = Scaled(TOKENS, WIDTH, dtype=torch.float64)
    model.second.weight = model.head.weight
    expected = model.second(ids(4))
    factorize(model, tied=True)
    assert is_tied(model)
    assert model.second._parameters["sigma"] is model.head._parameters["sigma"]
    torch.testing.assert_close(model.second(ids(4)), expected, rtol=0, atol=1e-12)
    assert densify(model).second.weight is model.head.weight


def test_who_gives_the_embedding_another_weight_has_untied_it():
    """Between the choice of layers and their conversion, say: the embedding keeps what it was given."""
    model = Language()
    (head,) = [site for site in select(model, tied=True).eligible if site.name == "head"]
    model.embedding.weight = nn.Parameter(torch.ones(TOKENS, WIDTH, dtype=torch.float64))
    head.factorize(4)
    assert type(model.embedding) is nn.Embedding
    assert bool((model.embedding(ids(4)) == 1).all())
    assert type(densify(model).head) is nn.Linear


@pytest.mark.parametrize("take", [densify, fold])
@pytest.mark.parametrize("part", ["head", "embedding"])
def test_a_part_of_a_tie_is_refused(take, part):
    model = factored()
    before = model(ids(4))
    with pytest.raises(ValueError, match="give the whole model"):
        take(getattr(model, part))
    torch.testing.assert_close(model(ids(4)), before, rtol=0, atol=0)
    assert is_tied(densify(model))


def test_a_tie_that_loading_has_cut_is_none_any_more():
    model = factored()
    whole = model(ids(4))
    copied = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(copied, assign=True)
    factorize(model, 2)
    assert model.embedding._parameters["sigma"].shape[0] > model.head._parameters["sigma"].shape[0] == 2
    assert not is_tied(densify(model))
    assert model(ids(4)).shape == whole.shape


@pytest.mark.parametrize("other", ["a weight of its own", "factors of its own"])
def test_other_weights_for_the_embedding_are_not_dropped(other):
    separate = Language()
    separate.embedding.weight = nn.Parameter(torch.randn(TOKENS, WIDTH, dtype=torch.float64))
    state = separate.state_dict()
    if other == "factors of its own":
        state = factored().state_dict()
        state["embedding.sigma"] = 2 * state["embedding.sigma"]
    else:
        factorize(separate, 4)
        state = separate.state_dict()
    with pytest.raises(ValueError, match="tied: its weight is shared"):
        load_state_dict(Language(), state)


def test_a_change_of_rank_reaches_both():
    model = factored()
    before = [model.head._parameters[name] for name in NAMES]
    factorize(model, 3)
    assert [model.embedding._parameters[name] for name in NAMES] == before
    assert model.embedding._parameters["u"].shape == (TOKENS, 3)
    assert "rank=3" in repr(model.embedding)
    torch.testing.assert_close(model.embedding(ids(4)), F.embedding(ids(4), model.head.weight), rtol=0, atol=1e-12)


def test_dense_again_it_is_the_very_parameter_that_it_was():
    model = Language()
    weight, names = model.head.weight, [name for name, _ in model.named_parameters(remove_duplicate=False)]
    factorize(model, 4, tied=True)
    expected = model(ids(4))
    densify(model)
    assert model.head.weight is weight is model.embedding.weight
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
    assert (type(model.embedding), type(model.head)) == (nn.Embedding, nn.Linear)
    torch.testing.assert_close(model(ids(4)), expected, rtol=0, atol=1e-12)


def test_an_embedding_by_itself_is_no_layer():
    alone = copy.deepcopy(factored(rank=4).embedding)
    assert select(alone).candidates == []
    assert "a head that is not here" in next(iter(select(alone).left_alone.values()))


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_tied(name, twin):
    model = factored(MODELS[name], 4)
    other = twin(model)
    assert is_tied(other)
    assert other.head._parameters["sigma"] is not model.head._parameters["sigma"]
    assert torch.equal(other(ids(4)), model(ids(4)))


@pytest.mark.parametrize("into", [None, 2, 8], ids=["dense", "lower", "higher"])
def test_factors_load_into_any_form(into):
    model, other = factored(rank=4), Language()
    if into:
        factorize(other, into, tied=True)
    load_state_dict(other, model.state_dict())
    assert is_tied(other)
    assert torch.equal(other(ids(4)), model(ids(4)))


def test_a_dense_state_dict_loads_into_factors():
    dense, low = Language(), factored(rank=4)
    low.load_state_dict(dense.state_dict())
    assert is_tied(low)
    torch.testing.assert_close(low(ids(4)), dense(ids(4)), rtol=0, atol=1e-12)


def test_factors_that_all_train_do_not_load_into_it():
    model = untied()
    for site in select(model, kinds=CHANNEL).eligible:
        site.factorize(4)
    with pytest.raises(ValueError, match="'head', which cannot be converted: it shares its weight with an embedding"):
        load_state_dict(Language(), model.state_dict())


def test_dense_weights_are_made_of_the_state_dict_alone():
    model = factored(rank=4)
    layers, state = factored_weights(model), model.state_dict()
    assert set(layers) == {"embedding", "body", "head"}
    assert tied_names(model) == {f"head.{name}": f"embedding.{name}" for name in NAMES}
    check_factors(state, layers)
    dense = Language()
    dense.load_state_dict(dense_state_dict(state, layers))
    torch.testing.assert_close(dense(ids(4)), model(ids(4)), rtol=0, atol=1e-12)


def test_it_is_counted_once():
    low, k = factored(rank=4), 4
    found = summarize(low)
    body, biases = WIDTH * WIDTH, WIDTH + TOKENS
    assert found.trainable == 2 * k * k + biases
    assert found.stored == k * (TOKENS + WIDTH) + k * (2 * WIDTH) + 2 * k * k + biases
    assert found.dense == TOKENS * WIDTH + body + biases == summarize(Language()).dense
    assert found.dense_gradient_bytes == 8 * found.dense
    assert [layer.name for layer in found.layers] == ["body", "head"]


@pytest.mark.parametrize(("rows", "core"), [(5, 2 * 5 * 4 * 4), (40, 2 * 4 * 4 * WIDTH)], ids=["few", "many"])
def test_the_small_products_of_the_embedding_are_counted(rows, core):
    embedding = factored(rank=4).embedding
    forward = 2 * rows * 4 * WIDTH + core
    assert count_flops(embedding, ids(rows)) == forward
    x = ids(rows).to("meta")
    assert count_training_flops(embedding, lambda twin: twin(x).sum()) == 2 * forward
    assert count_training_flops(Language(), lambda twin: twin(x).sum(), dense=True) == count_training_flops(
        factored(), lambda twin: twin(x).sum(), dense=True
    )


def test_what_the_head_takes_in_are_its_own_inputs():
    model = factored(rank=4)
    chosen = [site for site in select(model).eligible if site.name == "head"]
    x = torch.tanh(model.body(model.embedding(ids(40))))
    torch.testing.assert_close(input_moments(model, chosen, [ids(40)])["head"], (x.mT @ x / len(x)).detach())


@pytest.mark.parametrize("rank", [2, 8], ids=["few directions", "all"])
def test_a_model_made_ready_for_serving(rank):
    model = factored(rank=rank)
    expected = model(ids(4))
    fold(model)
    torch.testing.assert_close(model(ids(4)), expected, rtol=0, atol=1e-12)
    assert is_tied(model)
    assert ("sigma" in model.head._parameters) == (rank == 2)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("sigma"))


def test_it_is_one_graph():
    torch.compiler.reset()
    model, x = factored(lambda: Language(padding_idx=PADDING), 4), ids(4, 5)
    found = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, model(x), rtol=0, atol=1e-12)
