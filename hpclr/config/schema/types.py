"""The types of values, and what every section of a run file has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
BetweenZeroAndOne = Annotated[float, Meta(gt=0, lt=1)]
_MOMENT = Meta(title="a whole number of steps >= 0, or a fraction of the run >= 0 and < 1")
_INTERVAL = Meta(title="a whole number of steps >= 1, or a fraction of the run > 0 and < 1")
Moment = Annotated[Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0, lt=1)], _MOMENT]
Interval = Annotated[Annotated[int, Meta(ge=1)] | Annotated[float, Meta(gt=0, lt=1)], _INTERVAL]
MomentUnlessDecided = Annotated[Moment | None, _MOMENT]  # null: another key decides it
IntervalUnlessDecided = Annotated[Interval | None, _INTERVAL]
RunName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z",
        max_length=128,
        title="a name of at most 128 letters, digits, '.', '_' and '-' that starts with a letter or digit",
    ),
]
FactoryName = Annotated[
    str,
    Meta(
        pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*\Z",
        title="text of the form package.module:factory",
    ),
]
Keep = Annotated[
    int,
    Meta(
        ge=2,
        title="a whole number >= 2 (the newest may be the one being written when the job dies)",
    ),
]
FilePath = Annotated[str, Meta(min_length=1, title="the path of a file")]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1, title="a whole number >= 0 and < 2^63")]


def doc(text: str) -> Meta:
    """The meaning of a key, as it stands in the reference."""
    return Meta(description=text)


class Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A mapping of the run file whose keys are known.

    Attributes:
        needed_unless: a key → the keys that must be there unless it is true.
    """

    needed_unless: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """Raises ValueError if keys that the run file gives, defaults or not, exclude one another."""
