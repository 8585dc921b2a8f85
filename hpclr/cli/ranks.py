"""The options of the commands that look at a model at lower ranks."""

from collections.abc import Callable
from typing import Any

import click


def fractions(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    """Shares above 0 and at most 1 with commas between them."""
    return None if value is None else [_share(part) for part in value.split(",")]


def one_fraction(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """One share above 0 and at most 1."""
    return None if value is None else _share(value)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise click.BadParameter(f"{text!r} is no share of full rank: a number above 0 and at most 1, such as 0.25")
    return share


def rank_options(text: str, read: Callable[..., Any], metavar: str = "F") -> Callable[[Any], Any]:
    """`--rank-fraction`, of which `text` is the help, and `--calibrate`."""

    def with_options(command: Any) -> Any:
        calibrate = click.option(
            "--calibrate",
            type=click.IntRange(min=1),
            metavar="N",
            help="With --rank-fraction: order directions by what they do to outputs on N training samples.",
        )
        return click.option("--rank-fraction", callback=read, metavar=metavar, help=text)(calibrate(command))

    return with_options


def check_calibrated(rank_fraction: object, calibrate: int | None) -> None:
    """Raises a usage error for samples that would be used for nothing."""
    if calibrate is not None and rank_fraction is None:
        raise click.UsageError("--calibrate orders what --rank-fraction cuts: give both, such as --rank-fraction 0.25")
