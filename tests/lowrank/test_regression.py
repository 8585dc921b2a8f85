"""Reduced-rank regression, second moments of inputs, and networks that start as a linear map."""

import itertools
import math

import pytest
import torch
from lowrank_helpers import assert_near, distance
from torch import nn
from torch.nn import functional as F

from hpclr.lowrank import factorize, select
from hpclr.lowrank.activations import ENOUGH, input_moments, shrunk
from hpclr.lowrank.factors import FactorizationError
from hpclr.lowrank.linear_start import start_linear
from hpclr.lowrank.regression import LinearFit, Moments, decompose_in, fit_linear, nearest_in, order_by_output

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def planted(rows=800, n=12, m=7, rank=3, noise=0.05):
    """Correlated inputs far from zero, outputs that are a map of this rank and noise."""
    x = torch.randn(rows, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64) + 5
    weight = torch.randn(m, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)
    return x, x @ weight.T - 3 + noise * torch.randn(rows, m, dtype=torch.float64), weight


def fitted(x, y, ridge=0.0) -> LinearFit:
    moments = Moments()
    for rows in zip(x.split(123), y.split(123), strict=True):
        moments.add(*rows)
    return fit_linear(moments, ridge)


def error(x, y, weight, bias):
    return float((y - x @ weight.T - bias).square().sum(1).mean())


def test_a_planted_map_and_its_rank_are_found():
    x, y, weight = planted()
    fit = fitted(x, y)
    assert fit.proposed_rank == 3
    assert fit.rank == 7
    assert fit.noise == pytest.approx(0.05, rel=0.1)
    assert distance(fit.leading(3)[0], weight) < 0.01
    assert fit.explained(3) > 0.999 > fit.explained(2)


def test_outputs_without_relation_to_the_inputs_have_no_rank():
    x, _, _ = planted()
    ranks = [fitted(x, torch.randn(len(x), 7, dtype=torch.float64)).proposed_rank for _ in range(20)]
    assert sum(ranks) <= 3  # in 5 of 100 cases


def test_the_whole_map_is_that_of_least_squares_and_errors_are_the_errors():
    x, y, _ = planted(noise=2.0)
    fit = fitted(x, y)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    weight, bias = fit.leading(fit.rank)
    assert_near(weight, expected[:-1].T)
    assert_near(bias, expected[-1])
    for rank in range(1, 8):
        assert float(fit.errors[rank]) == pytest.approx(error(x, y, *fit.leading(rank)), rel=1e-9)
    assert float(fit.errors[0]) == pytest.approx(float(y.var(0, correction=0).sum()))


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_no_map_of_a_rank_is_better(ridge):
    """Gradient descent over B = D A from many starts, among them the one found, gets no lower."""
    x, y, _ = planted(rows=200, n=6, m=4, noise=2.0)
    fit, centred, wanted = fitted(x, y, ridge), x - x.mean(0), y - y.mean(0)
    penalty = ridge * float(centred.square().mean())

    def objective(weight):
        return (wanted - centred @ weight.T).square().sum(1).mean() + penalty * weight.square().sum()

    found = float(objective(fit.leading(2)[0]))
    for start in range(4):
        a, d = (part.clone(memory_format=torch.contiguous_format).requires_grad_() for part in fit.encoder(2))
        if start:
            a.data.normal_()
            d.data.normal_()
        descend(objective, a, d)
        assert float(objective(d @ a).detach()) >= found * (1 - 1e-9)


def descend(objective, a, d):
    optimizer = torch.optim.LBFGS([a, d], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = objective(d @ a)
        value.backward()
        return value

    optimizer.step(loss)


def test_constant_and_repeated_inputs_do_no_harm():
    x, y, _ = planted()
    doubled = torch.cat([x, x[:, :2], torch.full((len(x), 1), 4.0)], 1)
    assert error(doubled, y, *fitted(doubled, y).leading(7)) == pytest.approx(error(x, y, *fitted(x, y).leading(7)))
    nothing = fitted(torch.ones(5, 3), torch.randn(5, 2))
    assert nothing.rank == 0
    assert float(nothing.errors[-1]) == float(nothing.errors[0])


def test_fewer_pairs_than_inputs_tell_nothing_of_the_noise():
    fit = fitted(torch.randn(5, 12), torch.randn(5, 7))
    assert fit.noise is None
    assert fit.proposed_rank == fit.rank == 4


def test_wrong_pairs_are_refused():
    moments = Moments()
    with pytest.raises(ValueError, match="at least one pair"):
        fit_linear(moments)
    moments.add(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"r×3 and r×1 before, found \(2, 2\)"):
        moments.add(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="of one r"):
        moments.add(torch.ones(2, 3), torch.ones(1, 1))
    with pytest.raises(ValueError, match="ridge"):
        fit_linear(moments, float("nan"))
    moments.add(torch.full((1, 3), float("inf")), torch.ones(1, 1))
    with pytest.raises(FactorizationError, match="not finite"):
        fit_linear(moments)


# --- networks that start as the map ----------------------------------------------------------------------------------


def network(activation, n, m, hidden):
    widths = [n, *hidden, m]
    layers = [nn.Linear(a, b).double() for a, b in itertools.pairwise(widths)]
    between = itertools.chain.from_iterable((layer, ACTIVATIONS[activation]()) for layer in layers[:-1])
    return nn.Sequential(*between, layers[-1]), layers


@torch.no_grad()
def loss_of(model, x, y):
    return float((model(x) - y).square().sum(1).mean())


@pytest.mark.parametrize("hidden", [[20], [14, 20], [6, 9, 8], []])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_pairs_of_units_carry_the_map_exactly(activation, hidden):
    x, y, _ = planted(noise=2.0)
    fit, (model, layers) = fitted(x, y), network(activation, 12, 7, hidden)
    rank = start_linear(layers, activation, fit)
    assert rank == min([7, *(width // 2 for width in hidden)])
    assert loss_of(model, x, y) == pytest.approx(float(fit.errors[rank]), rel=1e-9)


@pytest.mark.parametrize("hidden", [[7], [5], [9, 8]])
def test_tanh_carries_it_up_to_the_square_of_the_scale(hidden):
    """The map's outputs are off by O(c⁻²), and so is the loss above the linear optimum, by its first order."""
    x, y, _ = planted(noise=2.0)
    fit, (model, layers) = fitted(x, y), network("tanh", 12, 7, hidden)
    off, above = [], []
    for scale in (20.0, 40.0):
        rank = start_linear(layers, "tanh", fit, scale=scale)
        weight, bias = fit.leading(rank)
        off.append(distance(model(x), x @ weight.T + bias))
        above.append(abs(loss_of(model, x, y) - float(fit.errors[rank])))
    assert rank == min(7, *hidden)
    assert off[0] / off[1] == pytest.approx(4, rel=0.1)
    assert 3.6 < above[0] / above[1] < 17  # c⁻², or c⁻⁴ where the first order cancels


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_units_left_over_change_nothing_at_first_and_learn_at_once(activation):
    x, y, _ = planted()
    model, layers = network(activation, 12, 7, [40, 30])
    before = layers[0].weight.detach().clone()
    carriers = 7 * (2 if activation == "relu" else 1)
    start_linear(layers, activation, fitted(x, y), scale=50)
    assert torch.equal(layers[0].weight[carriers:], before[carriers:])
    (model(x) - y + 1).square().mean().backward()
    assert float(layers[2].weight.grad[:, carriers:].norm()) > 0


def test_a_limit_on_the_ranks_of_the_weights_is_kept():
    x, y, _ = planted()
    model, layers = network("relu", 12, 7, [40, 30])
    fit = fitted(x, y)
    rank = start_linear(layers, "relu", fit, ranks={0: 6, 1: 5})
    assert rank == 5
    assert [int(torch.linalg.matrix_rank(layer.weight)) for layer in layers[:2]] == [6, 5]
    assert loss_of(model, x, y) == pytest.approx(float(fit.errors[5]))


@pytest.mark.parametrize(
    ("activation", "hidden", "options", "words"),
    [
        ("silu", [8], {}, "known for tanh, relu, gelu"),
        ("relu", [1], {}, "in 2 hidden units"),
        ("tanh", [8], {"scale": 0}, "scale"),
    ],
)
def test_starts_that_cannot_be_are_refused(activation, hidden, options, words):
    x, y, _ = planted()
    _, layers = network("relu", 12, 7, hidden)
    with pytest.raises(ValueError, match=words):
        start_linear(layers, activation, fitted(x, y), **options)


# --- weights in the metric of their inputs ---------------------------------------------------------------------------


def test_the_nearest_weight_has_the_error_that_its_values_say():
    weight, x = torch.randn(9, 6).double(), torch.randn(500, 4).double() @ torch.randn(4, 6).double()
    moment = x.T @ x / len(x)  # singular
    u, s, vh = decompose_in(weight, moment)
    root = torch.linalg.eigh(moment)
    assert_near((u * s) @ vh, weight @ (root[1] * root[0].clamp_min(0).sqrt()) @ root[1].T)
    for rank in (1, 3):
        cut = nearest_in(weight, moment, rank)
        lost = float((x @ (weight - cut).T).square().sum(1).mean())
        assert lost == pytest.approx(float(s[rank:].square().sum()))
        a, b, c = torch.linalg.svd(weight, full_matrices=False)
        plain = (a[:, :rank] * b[:rank]) @ c[:rank]
        assert lost < 0.9 * float((x @ (weight - plain).T).square().sum(1).mean())
    with pytest.raises(ValueError, match="belong together"):
        decompose_in(weight, torch.eye(9))


CONVOLUTIONS = {
    "1d, dilated": (nn.Conv1d(4, 6, 3, dilation=2, padding=1), (4, 11)),
    "2d, strided, groups": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (4, 7, 8)),
    "2d, same, reflected": (nn.Conv2d(3, 5, (2, 3), padding="same", padding_mode="reflect"), (3, 6, 5)),
    "2d, depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
    "3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 4, 5, 6)),
    "linear on sequences": (nn.Linear(5, 4), (3, 5)),
}


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_moments_tell_the_energy_of_the_outputs(name, factored):
    """Σ over outputs of y² is tr(W C Wᵀ) a row; of groups, that of W's mean square over them."""
    layer, shape = CONVOLUTIONS[name]
    model = nn.Sequential(layer).double()
    model[0].bias.data.zero_()
    if factored:
        factorize(model)
    (site,) = select(model).eligible
    batches = [torch.randn(n, *shape, dtype=torch.float64) for n in (3, 5)]
    (moment,) = input_moments(model, [site], batches).values()
    assert moment.shape == (site.shape[1], site.shape[1])
    weight = site.to_matrix(model[0].weight)
    rows = torch.cat([_outputs_of_all_groups(model[0], weight, x) for x in batches])
    energy = float((weight @ moment @ weight.T).detach().trace())
    assert float(rows.detach().square().sum(1).mean()) == pytest.approx(energy)


def _outputs_of_all_groups(layer, weight, x):
    """Every row of the weight on the input of every group: (…, m), a row a group."""
    if isinstance(layer, nn.Linear):
        return (x @ weight.T).flatten(0, -2)
    layers = []
    for part in x.chunk(layer.groups, 1):
        options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, 1, False, layer.padding_mode)
        one = getattr(layer, "dense_class", type(layer))(part.shape[1], len(weight), *options).double()
        one.weight.data = weight.detach().reshape(len(weight), part.shape[1], *layer.kernel_size)
        layers.append(one(part).movedim(1, -1).flatten(0, -2))
    return torch.cat(layers)


def test_the_moment_of_few_rows_is_nearer_the_truth_shrunk():
    """And more so the fewer they are; on average the amount is that of an oracle, who knows the truth."""
    n, truth = 40, torch.diag(torch.logspace(0, -2, 40, dtype=torch.float64))
    generator, gains = torch.Generator().manual_seed(0), []
    for rows in (10, 30, 150):
        errors, best = [], []
        for _ in range(50):
            x = torch.randn(rows, n, dtype=torch.float64, generator=generator) @ truth.sqrt()
            seen, target = x.mT @ x / rows, torch.eye(n).double()
            found, level = shrunk(seen, rows), seen.trace() / n
            errors.append((float((found - truth).norm()), float((seen - truth).norm())))
            away = level * target - seen
            oracle = float(((truth - seen) * away).sum() / away.square().sum())
            best.append((float(((found - seen) * away).sum() / away.square().sum()), oracle))
        (mine, raw), (rho, oracle) = (map(sum, zip(*pairs, strict=True)) for pairs in (errors, best))
        assert rho / 50 == pytest.approx(oracle / 50, rel=0.2, abs=0.02)
        gains.append(raw / mine)
    assert gains[0] > gains[1] > gains[2] > 1


def test_the_amount_of_shrinkage_worked_out_by_hand():
    """C = diag(3, 1, 1, 1) of r = 5 rows: tr C = 6, tr C² = 12; ρ = (½·12 + 36) / ((5 + 1 − ½) (12 − 36/4)) > 1 …"""
    little, much = torch.diag(torch.tensor([3.0, 1, 1, 1])).double(), torch.diag(torch.tensor([9.0, 1, 1, 1])).double()
    assert_near(shrunk(little, 5), 1.5 * torch.eye(4).double())
    rho = (0.5 * 84 + 144) / (5.5 * (84 - 144 / 4))  # … and of diag(9, 1, 1, 1): tr C = 12, tr C² = 84
    assert_near(shrunk(much, 5), (1 - rho) * much + 3 * rho * torch.eye(4).double())


def test_enough_rows_speak_for_themselves_and_a_single_one_says_nothing():
    x = torch.randn(40, 10, dtype=torch.float64)
    moment = x.mT @ x / 40
    assert shrunk(moment, ENOUGH * 10) is moment
    few = shrunk(moment, 12)
    assert not torch.allclose(few, moment)
    assert_near(few.trace(), moment.trace())
    one = x[:1].mT @ x[:1]
    assert_near(shrunk(one, 1), one.trace() / 10 * torch.eye(10).double())
    assert_near(shrunk(2 * torch.eye(10).double(), 5), 2 * torch.eye(10).double())
    assert not shrunk(torch.zeros(10, 10), 5).any()


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_attention_shows_what_each_projection_takes(separate, factored):
    attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=5 if separate else None).double()

    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x[..., :5], value=x) if separate else self.attention(x, x, x)

    model = Crossed()
    if factored:
        factorize(model)
    kind, x = type(attention), torch.randn(8, 4, 8, dtype=torch.float64)
    moments = input_moments(model, select(model).eligible, [x])
    rows = x.flatten(0, 1)
    expected = rows.T @ rows / len(rows)
    names = {"q_proj": 8, "k_proj": 5, "v_proj": 8} if separate else {"in_proj": 8}
    for name, size in names.items():
        assert_near(moments[f"attention.{name}"], expected[:size, :size])
    assert moments["attention.out_proj"].shape == (8, 8)
    assert type(attention) is kind


def test_a_model_is_left_as_it_was_and_what_no_batch_reaches_is_missing():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.drop, self.idle = nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(self.drop(x))

    model = Partly()
    model.drop.eval()
    x = torch.randn(12, 3)
    moments = input_moments(model, select(model).eligible, [x[:8], x[8:]])
    assert list(moments) == ["used"]
    assert_near(moments["used"], (x.T @ x / 12).double(), 1e-6)
    assert model.training
    assert not model.drop.training
    assert not model.used._forward_pre_hooks
    assert F.linear(x, model.used.weight).requires_grad


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_the_order_of_outputs_by_eigenvectors_alone(shape):
    weight, rank = torch.randn(shape).double(), min(shape)
    x = torch.randn(500, shape[1]).double() * torch.logspace(1, -2, shape[1]).double()
    moment = x.T @ x / len(x)
    order, (u, s, _) = order_by_output(weight, moment), decompose_in(weight, moment)
    assert_near(order.s, s)
    assert_near((order.u.T @ u).abs(), torch.eye(rank, dtype=torch.float64), 1e-6)
    for k in (1, 3, rank):
        left, values, right = order.cut(weight, k)
        assert_near((left * values) @ right, nearest_in(weight, moment, k))
        assert_near(left.T @ left, torch.eye(k, dtype=torch.float64))
        assert_near(right @ right.T, torch.eye(k, dtype=torch.float64))
        assert (values.diff() <= 0).all()
    assert not order_by_output(weight, torch.zeros_like(moment)).s.any()


@pytest.mark.parametrize("bad", ["weight", "moment"])
def test_an_order_of_what_is_not_finite(bad):
    pair = {"weight": torch.ones(3, 4), "moment": torch.eye(4)}
    pair[bad][0, 0] = math.nan
    with pytest.raises(FactorizationError, match="not finite"):
        order_by_output(**pair)
    with pytest.raises(ValueError, match="belong together"):
        order_by_output(torch.ones(3, 4), torch.eye(3))
