"""`optimizer` and `schedule`: how the weights move."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from hpclr.config.schema.types import BelowOne, BetweenZeroAndOne, Interval, NonNegative, Positive, Section, doc


class Optimizer(Section, kw_only=True, frozen=True):
    """A class of torch.optim, or GaLore, and its options; an absent option takes that class's own default."""

    name: Annotated[
        Annotated[str, Meta(min_length=1, title="the name of a class of torch.optim")],
        doc("Class of torch.optim, in its own spelling or in lower case; or galore_adamw (docs/galore.md)."),
    ] = "adamw"
    lr: Annotated[Positive, doc("Learning rate.")]
    weight_decay: Annotated[NonNegative | None, doc("Weight decay.")] = None
    momentum: Annotated[NonNegative | None, doc("Momentum (SGD, RMSprop).")] = None
    nesterov: Annotated[bool | None, doc("Nesterov's form of momentum (SGD).")] = None
    betas: Annotated[
        tuple[BelowOne, BelowOne] | None, doc("Decay of the two running averages (Adam and its relatives).")
    ] = None
    eps: Annotated[NonNegative | None, doc("Term added to the denominator.")] = None
    args: Annotated[dict[str, Any], doc("Any other keyword argument of the class.")] = {}  # noqa: RUF012 - msgspec copies it


Warmup = Annotated[Annotated[int, Meta(ge=0)], doc("Steps over which the learning rate rises linearly to its value.")]


class Constant(Section, kw_only=True, frozen=True):
    """The learning rate stays as it is."""

    name: Annotated[Literal["constant"], doc("This kind of schedule.")] = "constant"
    warmup_steps: Warmup = 0


class Cosine(Section, kw_only=True, frozen=True):
    """The learning rate falls along half a cosine until the last step."""

    name: Annotated[Literal["cosine"], doc("This kind of schedule.")] = "cosine"
    warmup_steps: Warmup = 0
    min_lr: Annotated[NonNegative, doc("Learning rate at the end of the run.")] = 0.0


class Step(Section, kw_only=True, frozen=True):
    """The learning rate is multiplied by `gamma` at every milestone."""

    name: Annotated[Literal["step"], doc("This kind of schedule.")] = "step"
    milestones: Annotated[tuple[Interval, ...], doc("When; in rising order, all steps or all fractions.")]
    gamma: Annotated[Positive, doc("Factor on the learning rate.")] = 0.1
    warmup_steps: Warmup = 0

    def __post_init__(self) -> None:
        kinds = {type(moment) for moment in self.milestones}
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if len(kinds) > 1 or not rising:
            raise ValueError(
                "schedule.milestones must rise from one to the next and be either all whole numbers of steps "
                f"or all fractions of the run, found {list(self.milestones)}"
            )


class OneCycle(Section, kw_only=True, frozen=True):
    """The learning rate rises to its maximum and falls to almost nothing (Smith and Topin's one cycle)."""

    name: Annotated[Literal["one_cycle"], doc("This kind of schedule.")] = "one_cycle"
    max_lr: Annotated[Positive | None, doc("Highest learning rate; null: `optimizer.lr`.")] = None
    warmup_fraction: Annotated[BetweenZeroAndOne, doc("Fraction of the run spent rising.")] = 0.3
    final_div: Annotated[Annotated[float, Meta(ge=1)], doc("First learning rate divided by the last.")] = 1e4
