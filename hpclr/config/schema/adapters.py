"""`method`: the kinds that fine-tune a pretrained model, whose own weights stay as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from hpclr.config.schema.method import Exclude, Include, KeepFirst, MaxAspect
from hpclr.config.schema.types import BelowOne, Count, NonNegative, Positive, Section, Share, doc

KeepLast = Annotated[bool, doc("Leave the last layer, the head, without an adapter and train it whole.")]
Train = Annotated[tuple[str, ...], doc("Patterns of parameter names that train beside adapters and head.")]
Proportion = Annotated[Share, doc("Share of the sum of a layer's singular values that its rank covers.")]


class _Adapters(Section, kw_only=True, frozen=True):
    """What all of them have."""

    name: str
    train: Train = ()
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()


class Sara(_Adapters, kw_only=True, frozen=True):
    """Adapters A diag(Λ) B whose rank follows from the spectrum of each weight (arXiv 2408.03290)."""

    name: Annotated[Literal["sara"], doc("This method.")] = "sara"
    proportion: Proportion


class MoSara(_Adapters, kw_only=True, frozen=True):
    """Several diagonals between the singular vectors of each weight, mixed by the input (arXiv 2408.03290)."""

    name: Annotated[Literal["mo_sara"], doc("This method.")] = "mo_sara"
    proportion: Proportion
    experts: Annotated[Count, doc("Diagonals of each layer.")] = 5


class Edora(_Adapters, kw_only=True, frozen=True):
    """A small core between singular vectors, and magnitudes of the outputs (arXiv 2501.12067)."""

    name: Annotated[Literal["edora"], doc("This method.")] = "edora"
    rank: Annotated[Count, doc("Side r of the core; layers with a shorter side get no adapter.")]
    alpha: Annotated[Positive, doc("The update is scaled by α/r.")] = 16.0
    init_std: Annotated[NonNegative, doc("σ of the core at the start; 0 leaves the function as it is.")] = 0.0


class Lora(_Adapters, kw_only=True, frozen=True):
    """LoRA (arXiv 2106.09685), as PEFT has it, to compare with; needs the extra `peft`."""

    name: Annotated[Literal["lora"], doc("This method.")] = "lora"
    rank: Annotated[Count, doc("Rank of every update.")] = 8
    alpha: Annotated[Positive, doc("The update is scaled by α/rank.")] = 16.0
    dropout: Annotated[BelowOne, doc("Probability of dropping an input of the update.")] = 0.0
