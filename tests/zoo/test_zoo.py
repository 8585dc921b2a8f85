"""Models that nobody tuned this for: they convert, train through checks that cut, and come back dense."""

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr import OIALR
from hpclr.lowrank import densify, select

STEPS, DELAY, EVERY = 20, 6, 4


class Case(NamedTuple):
    """A model, a batch of its inputs (a function of a generator), its loss and its outputs."""

    model: nn.Module
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    output: Callable[..., Tensor]
    loss: Callable[..., Tensor]
    converted: int  # layers at the least


def images(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight of them in four classes, each a little brighter somewhere else."""
    y = torch.randint(0, 4, (8,), generator=g)
    x = torch.randn(8, 3, 16, 16, generator=g)
    for i, c in enumerate(y):
        x[i, c % 3, :, 4 * c : 4 * c + 4] += 2
    return x, y


def tokens(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences that count upwards, and the number that follows."""
    start = torch.randint(0, 20, (8, 1), generator=g)
    x = (start + torch.arange(13)) % 20
    return x[:, :-1], x[:, 1:]


def vectors(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of vectors and a linear function of their running means."""
    x = torch.randn(8, 10, 16, generator=g)
    return x, x.cumsum(1)[..., :8] / 3


def classified(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x.reshape(-1, x.shape[-1]), y.reshape(-1))


# --- transformers ----------------------------------------------------------------------------------------------------


def gpt2() -> Case:
    t = pytest.importorskip("transformers")
    config = t.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=24, n_layer=2, n_head=2, resid_pdrop=0.1, bos_token_id=0, eos_token_id=0
    )
    model = t.GPT2LMHeadModel(config)

    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x, use_cache=False).logits

    return Case(model, tokens, output, lambda model, x, y: classified(output(model, x, y), y), 8)


def vit() -> Case:
    t = pytest.importorskip("transformers")
    config = t.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=4,
    )

    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x).logits

    return Case(t.ViTForImageClassification(config), images, output, lambda model, x, y: model(x, labels=y).loss, 12)


def resnet() -> Case:
    t = pytest.importorskip("transformers")
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=4)

    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x).logits

    return Case(t.ResNetForImageClassification(config), images, output, lambda model, x, y: model(x, labels=y).loss, 10)


def bert() -> Case:
    t = pytest.importorskip("transformers")
    config = t.BertConfig(
        vocab_size=20,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=20,
    )
    mask = torch.ones(8, 12, dtype=torch.long)
    mask[:4, 9:] = 0

    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x, attention_mask=mask).logits[:, :9]

    model = t.BertForTokenClassification(config)
    return Case(model, tokens, output, lambda model, x, y: classified(output(model, x, y), y[:, :9]), 12)


# --- torch -----------------------------------------------------------------------------------------------------------


def transformer() -> Case:
    model = nn.Transformer(16, 2, 2, 2, dim_feedforward=32, dropout=0.1, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(10)

    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True)

    return Case(model, vectors, output, lambda model, x, y: F.mse_loss(output(model, x, y)[..., :8], y), 17)


def encoder() -> Case:
    """Post-norm, without dropout and batch first: what the fast path of evaluation takes."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 8))

    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x)

    return Case(model, vectors, output, lambda model, x, y: F.mse_loss(model(x), y), 8)


class UNet(nn.Module):
    """Down, up and a skip between, with group normalisation and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self._block(3, 16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.bottom = self._block(32, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.last = self._block(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    @staticmethod
    def _block(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, padding="same", bias=False),
            nn.GroupNorm(4, out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=2, dilation=2, groups=2, padding_mode="circular"),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = self.up(self.bottom(self.down(skip)))
        out: Tensor = self.head(self.last(torch.cat((x, skip), 1)))
        return out


def unet() -> Case:
    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        brightest = x.argmax(1)
        return F.cross_entropy(model(x), brightest)

    return Case(UNet(), images, output, loss, 6)


class Recurrent(nn.Module):
    """An LSTM, which has no low-rank form here, between linear layers that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.mix = nn.Linear(16, 24)
        self.lstm = nn.LSTM(24, 24, num_layers=2, batch_first=True)
        self.project = nn.Linear(24, 24)
        self.head = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(F.relu(self.mix(self.embed(x))))
        out: Tensor = self.head(F.relu(self.project(hidden)))
        return out


def lstm() -> Case:
    def output(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x)

    return Case(Recurrent(), tokens, output, lambda model, x, y: classified(model(x), y), 2)


ZOO = {build.__name__: build for build in (gpt2, vit, resnet, bert, transformer, encoder, unet, lstm)}


# --- the tests -------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    case: Case
    oialr: OIALR
    losses: list[float]


def train(name: str, seed: int = 0) -> Trained:
    torch.manual_seed(seed)
    case = ZOO[name]()
    case.model.train()
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=3e-3)
    oialr = OIALR(case.model, optimizer, delay=DELAY, every=EVERY, cutoff=0.3, layer_fraction=0.5)
    g = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = case.loss(case.model, *case.inputs(g))
        loss.backward()
        optimizer.step()
        oialr.step()
        losses.append(loss.item())
    return Trained(case, oialr, losses)


@pytest.fixture(scope="module", params=ZOO)
def trained(request: pytest.FixtureRequest) -> tuple[str, Trained]:
    return request.param, train(request.param)


def evaluate(model: nn.Module, case: Case) -> Tensor:
    model.eval()
    with torch.no_grad():
        return case.output(model, *case.inputs(torch.Generator().manual_seed(123)))


def assert_close(one: Tensor, other: Tensor) -> None:
    error, size = (torch.linalg.vector_norm(x.detach()).item() for x in (one - other, other))
    assert error <= 1e-4 * size


def test_it_trains_through_conversion_and_cuts(trained):
    _, (case, oialr, losses) = trained
    assert all(torch.tensor(losses).isfinite())
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(oialr.frozen.values())
    assert len(oialr.ranks) >= case.converted
    full = {site.name: min(site.shape) for site in select(case.model).eligible}
    assert any(rank < full[name] for name, rank in oialr.ranks.items())
    assert oialr.failures == 0
    assert set(oialr.stability) == set(oialr.ranks)


def test_densified_it_gives_the_same_output(trained):
    _, (case, _, _) = trained
    output = evaluate(case.model, case)
    dense = densify(copy.deepcopy(case.model))
    assert not any(name.endswith("sigma") for name, _ in dense.named_parameters())
    assert_close(evaluate(dense, case), output)
    with torch.enable_grad():  # the fast paths of evaluation are for passes without gradients
        assert_close(case.output(case.model, *case.inputs(torch.Generator().manual_seed(123))), output)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_the_same_model(trained, duplicate):
    _, (case, _, _) = trained
    again = duplicate(case.model)
    assert torch.equal(evaluate(again, case), evaluate(case.model, case))
    assert list(again.state_dict()) == list(case.model.state_dict())
    assert {id(p) for p in again.parameters()}.isdisjoint({id(p) for p in case.model.parameters()})


def test_two_runs_with_one_seed_are_identical_to_the_bit(trained):
    name, (case, oialr, losses) = trained
    again = train(name)
    assert again.losses == losses
    assert again.oialr.ranks == oialr.ranks
    for (key, one), (_, other) in zip(
        case.model.state_dict().items(), again.case.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), key


def test_the_tied_head_of_gpt2_is_left_alone():
    case, oialr, _ = train("gpt2")
    assert "tied" in oialr.report["lm_head"]
    assert case.model.lm_head.weight is case.model.transformer.wte.weight
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"} <= set(oialr.ranks)


def test_the_encoder_is_evaluated_like_its_dense_form_with_padding():
    case, _, _ = train("encoder")
    x, _ = case.inputs(torch.Generator().manual_seed(5))
    padding = torch.zeros(8, 10, dtype=torch.bool)
    padding[:, 7:] = True
    dense = densify(copy.deepcopy(case.model))
    with torch.no_grad():
        ours, theirs = (m.eval()[0](x, src_key_padding_mask=padding)[:, :7] for m in (case.model, dense))
    assert_close(ours, theirs)


def test_what_has_no_low_rank_form_is_listed():
    _, oialr, _ = train("lstm")
    assert set(oialr.ranks) == {"mix", "project"}
    assert "LSTM has no low-rank form" in oialr.report["lstm"]
    _, oialr, _ = train("unet")
    assert "ConvTranspose2d has no low-rank form" in oialr.report["up"]
    assert "head" not in oialr.ranks
