"""nn.MultiheadAttention with low-rank projections, and the transformer layers of torch around it."""

import copy

import pytest
import torch
from lowrank_helpers import assert_near, converted, dense_twin
from torch import nn

from hpclr.lowrank import factorize, select

N, L, S, E, H = 3, 5, 7, 16, 4
FORMS = {
    "packed": {},
    "packed, no bias": {"bias": False},
    "packed, length first": {"batch_first": False},
    "separate": {"kdim": 10, "vdim": 6},
    "separate, length first, no bias": {"kdim": 10, "vdim": 6, "batch_first": False, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "kdim": 10, "vdim": 6},
    "dropout": {"dropout": 0.3},
}
FUTURE = torch.ones(L, S, dtype=torch.bool).triu(1)
PADDING = torch.zeros(N, S, dtype=torch.bool)
PADDING[1, 5:] = PADDING[2, 2:] = True
CALLS = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of heads": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding, without weights": {"key_padding_mask": PADDING, "need_weights": False},
    "padding as floats": {"key_padding_mask": PADDING.double() * -3},
    "mask": {"attn_mask": FUTURE},
    "mask of every head": {"attn_mask": torch.randn(N * H, L, S).double(), "need_weights": False},
    "both masks": {"attn_mask": FUTURE.double() * -2, "key_padding_mask": PADDING.double() * -1},
    "causal": {"attn_mask": FUTURE, "is_causal": True, "need_weights": False},
    "causal, with weights": {"attn_mask": FUTURE, "is_causal": True},
}


def attention(**form):
    layer = nn.MultiheadAttention(E, H, **{"batch_first": True} | form).double().eval()
    if layer.in_proj_bias is not None:  # torch starts both at zero
        nn.init.normal_(layer.in_proj_bias)
        nn.init.normal_(layer.out_proj.bias)
    return layer


def inputs(layer, batched=True):
    x = [torch.randn(N, length, width).double() for length, width in ((L, E), (S, layer.kdim), (S, layer.vdim))]
    if not batched:
        return [part[0] for part in x]
    return x if layer.batch_first else [part.transpose(0, 1) for part in x]


def assert_same_result(found, expected):
    assert_near(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert_near(found[1], expected[1])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_and_call(form, call):
    layer = attention(**form)
    x = inputs(layer)
    assert_same_result(converted(layer)(*x, **call), layer(*x, **call))
    low = converted(layer, 3)
    assert_same_result(low(*x, **call), dense_twin(low)(*x, **call))


@pytest.mark.parametrize("form", ["packed", "separate", "bias_kv"])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"average_attn_weights": False},
        {"key_padding_mask": PADDING[2], "need_weights": False},
        {"attn_mask": FUTURE},
        {"attn_mask": torch.randn(H, L, S).double()},
    ],
)
def test_a_single_sequence(form, call):
    layer = attention(**FORMS[form])
    x = inputs(layer, batched=False)
    assert_same_result(converted(layer)(*x, **call), layer(*x, **call))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("form", ["packed", "packed, length first", "separate", "bias_kv"])
def test_gradients_in_training(form, need_weights, order):
    low = converted(attention(**FORMS[form]).train(), 4)
    twin = dense_twin(low)
    x = inputs(low)
    for model in (low, twin):
        model(*x, need_weights=need_weights)[0].square().sum().backward()
    for site in select(low).eligible:
        weight = twin.get_parameter(site.key(site.slot.weight))
        u, _, vh = site.factors
        assert_near(site.parameter.grad, u.mT @ weight.grad @ vh.mT)
    for name in ("in_proj_bias", "out_proj.bias"):
        assert_near(low.get_parameter(name).grad, twin.get_parameter(name).grad)


def test_self_attention_projects_once_and_means_the_same():
    layer = attention().train()
    x = inputs(layer)[0]
    low = converted(layer)
    assert_same_result(low(x, x, x), layer(x, x, x))
    assert_same_result(low(x, x.clone(), x.clone()), layer(x, x, x))


def test_causal_without_a_mask_is_refused_as_torch_refuses_it():
    layer = attention()
    x = inputs(layer)
    for model in (layer, converted(layer)):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            model(*x, is_causal=True, need_weights=False)


def test_dropout_acts_in_training_only():
    low = converted(attention(dropout=0.5))
    x = inputs(low)
    torch.testing.assert_close(low(*x)[0], low(*x)[0])
    low.train()
    assert not torch.equal(low(*x)[0], low(*x)[0])
    assert not torch.equal(low(*x, need_weights=False)[0], low(*x, need_weights=False)[0])


@pytest.mark.parametrize("kept", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_partly_converted(kept):
    layer = attention(kdim=10, vdim=6)
    x = inputs(layer)
    low = copy.deepcopy(layer)
    reports = factorize(low, exclude=[kept])
    assert [report.converted for report in reports] == [report.name != kept for report in reports]
    assert_same_result(low(*x), layer(*x))
    assert_same_result(copy.deepcopy(low)(*x), layer(*x))


@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 6}], ids=["packed", "separate"])
def test_an_output_projection_alone_is_called_and_not_rebuilt(sizes, monkeypatch):
    layer = attention(**sizes)
    x, own_class = inputs(layer), type(layer)
    low = copy.deepcopy(layer)
    (report,) = (report for report in factorize(low, include=["out_proj"]) if report.converted)
    assert report.name == "out_proj"
    with monkeypatch.context() as patch:
        patch.setattr(type(low.out_proj), "dense_weight", None)
        assert_same_result(low(*x), layer(*x))
        if not sizes:
            assert_same_result(low(x[0], x[0], x[0]), layer(x[0], x[0], x[0]))
    assert_same_result(copy.deepcopy(low)(*x), layer(*x))
    factorize(low)
    assert_same_result(low(*x), layer(*x))
    for name in (["in_proj"] if not sizes else ["q_proj", "k_proj", "v_proj"]) + ["out_proj"]:
        assert type(low) is not own_class
        next(site for site in select(low).eligible if site.name == name).densify()
    assert type(low) is own_class
    assert_same_result(low(*x), layer(*x))


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(E, H, 24, 0.1, batch_first=True, **options).double()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(training, norm_first):
    layer = encoder_layer(norm_first=norm_first)
    layer.dropout.p = layer.dropout1.p = layer.dropout2.p = layer.self_attn.dropout = 0
    layer.train(training)
    low = converted(layer)
    x = torch.randn(N, L, E).double()
    assert_near(low(x), layer(x))
    with torch.no_grad():  # in eval mode: the fast path of the encoder layer
        assert_near(low(x, src_key_padding_mask=PADDING[:, :L]), layer(x, src_key_padding_mask=PADDING[:, :L]))
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    assert_near(low(x, src_mask=mask, is_causal=True), layer(x, src_mask=mask, is_causal=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoder_with_its_nested_tensors(nested, padded):
    model = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=nested).eval()
    low = converted(model)
    x = torch.randn(N, S, E).double()
    mask = PADDING if padded else None
    with torch.no_grad():
        assert_near(low(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask))


def test_whole_transformer():
    model = nn.Transformer(E, H, 1, 1, 24, 0.0, batch_first=True).double()
    source, target = torch.randn(N, S, E).double(), torch.randn(N, L, E).double()
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    low = converted(model)
    assert_near(low(source, target, tgt_mask=mask), model(source, target, tgt_mask=mask))
    cut = converted(model, 4)
    assert_near(cut(source, target, tgt_mask=mask), dense_twin(cut)(source, target, tgt_mask=mask))
