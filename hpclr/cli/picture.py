"""The option of the commands that draw a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hpclr.report.comparison import FORMATS


def _drawable(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix[1:].lower() not in FORMATS:
        raise click.BadParameter(f"{value} must end in one of {', '.join(f'.{kind}' for kind in FORMATS)}")
    return value


def plot_option(text: str) -> Callable[[Any], Any]:
    """`--plot FILE`, whose suffix is one that can be drawn; `text` is its help."""
    file = click.Path(path_type=Path, dir_okay=False)
    return click.option("--plot", type=file, callback=_drawable, metavar="FILE", help=text)
