"""`hpclr data`: preparing datasets and looking at them."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from hpclr.data.readers import READERS
from hpclr.errors import UsageError

_READERS = "\n\n\b\nREADER         SOURCE\n" + "\n".join(
    f"{name:14} {reader.source or 'none: they come with scikit-learn'}" for name, reader in READERS.items()
)
_SECONDS_BETWEEN_LINES = 10.0


@click.group()
def data() -> None:
    """Prepare datasets for training, and look at them."""


@data.command()
@click.argument("reader", type=click.Choice(list(READERS)), metavar="READER")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[SOURCE] OUT")
@click.option(
    "--valid-fraction",
    type=float,
    help="Share of the training samples to validate on [0.1, or 0 if SOURCE has its own].",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the samples to validate on.")
@click.option("--image-size", type=click.IntRange(min=1), help="Bring pictures to this many pixels square.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many samples of each split, for a trial.")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
def prepare(
    reader: str,
    paths: tuple[Path, ...],
    valid_fraction: float | None,
    seed: int,
    image_size: int | None,
    limit: int | None,
    force: bool,
) -> None:
    """Write the data that READER finds at SOURCE as one HDF5 file OUT, whole or not at all."""
    source, out = _source_and_out(reader, paths)
    from hpclr.data import prepare as prepare_data

    with _progress_shown() as progress:
        sizes = prepare_data(
            reader,
            source,
            out,
            valid_fraction=valid_fraction,
            seed=seed,
            image_size=image_size,
            limit=limit,
            force=force,
            progress=progress,
        )
    click.echo(f"{out}: {', '.join(f'{split} {size:,}' for split, size in sizes.items())}")


prepare.help = f"{prepare.help}{_READERS}"


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
def inspect(file: Path) -> None:
    """Show what a dataset FILE holds, after checking that training can use it."""
    from hpclr.data import open_dataset
    from hpclr.output import printable

    with open_dataset(file) as dataset:
        facts = {
            "task": dataset.task,
            "samples": ", ".join(f"{split} {size:,}" for split, size in dataset.sizes.items()),
            "shape": f"{' x '.join(map(str, dataset.sample_shape))} {dataset.dtype}",
            "classes" if dataset.task == "classification" else "columns": _listed(dataset.classes),
            "mean": _listed([f"{value:.6g}" for value in dataset.mean]),
            "std": _listed([f"{value:.6g}" for value in dataset.std]),
            "checked": "when written" if dataset.trusted else "now; every value was read",
            "digest": dataset.digest,
            "size": f"{file.stat().st_size / 1e6:,.1f} MB",
        }
    for name, value in facts.items():
        click.echo(printable(f"{name:8} {value}"))


def _source_and_out(reader: str, paths: tuple[Path, ...]) -> tuple[Path | None, Path]:
    expected = 2 if READERS[reader].source else 1
    if len(paths) != expected:
        form = "SOURCE OUT" if expected == 2 else "OUT"
        raise UsageError(
            f"hpclr data prepare {reader}: expected {form}, found {' '.join(map(str, paths)) or 'nothing'}. "
            f"{'SOURCE is a ' + READERS[reader].source if expected == 2 else 'The data comes with scikit-learn'}; "
            "OUT is the HDF5 file to write."
        )
    return (paths[0] if expected == 2 else None), paths[-1]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")


@contextmanager
def _progress_shown() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; in a log a line now and then."""
    if not sys.stderr.isatty():
        yield _lines_now_and_then()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines_now_and_then() -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            click.echo(f"prepared {done:,} of {total:,} samples ({done / total:.0%})", err=True)

    return show
