"""`hpclr data`: preparing datasets and looking at them."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpclr.cli.progress import progress_shown
from hpclr.data.readers import READERS
from hpclr.errors import UsageError

if TYPE_CHECKING:
    from hpclr.data import Dataset
    from hpclr.data.stored_statistics import StoredStatistics
    from hpclr.parallel.team import Team

_READERS = "\n\n\b\nREADER         SOURCE\n" + "\n".join(
    f"{name:14} {reader.source or 'none: they come with scikit-learn'}" for name, reader in READERS.items()
)
_MOST_ROWS = 16  # of each table that `hpclr data stats` prints


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
    """Write the data that READER finds at SOURCE as one HDF5 file OUT, whole or not at all.

    Under mpirun all processes read the source, each its share of the blocks, and the first one writes.
    """
    source, out = _source_and_out(reader, paths)
    from hpclr.data import prepare as prepare_data
    from hpclr.data.teamwork import read_share

    team = _team_under_mpirun("hpclr data prepare with several processes")
    if team is not None and team.rank > 0:
        team.follow(lambda: read_share(reader, source, image_size, team))
    with team.leading() if team else nullcontext(), progress_shown("preparing", _prepared) as progress:
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
            team=team,
        )
    click.echo(f"{out}: {', '.join(f'{split} {size:,}' for split, size in sizes.items())}")


prepare.help = f"{prepare.help}{_READERS}"


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
def inspect(file: Path) -> None:
    """Show what a dataset FILE holds, after checking that training can use it."""
    from hpclr.data import open_dataset
    from hpclr.data.stored_statistics import read_statistics
    from hpclr.output import printable

    with open_dataset(file) as dataset:
        facts = {
            "task": dataset.task,
            **_content(dataset),
            "checked": "when written" if dataset.trusted else "now; every value was read",
            "digest": dataset.digest,
            "size": f"{file.stat().st_size / 1e6:,.1f} MB",
        }
        if stored := read_statistics(file):
            facts["statistics"] = _in_short(stored, dataset.digest)
    for name, value in facts.items():
        click.echo(printable(f"{name:10} {value}"))


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--components", type=click.IntRange(min=1), default=16, show_default=True, help="Principal components.")
@click.option("--split", default="train", show_default=True, help="Which split: train, valid or test.")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this new file, and leave FILE as it is.")
def stats(file: Path, components: int, split: str, out: Path | None) -> None:
    """Compute mean, spread, class counts and principal components of a dataset FILE with heat, and add them to it.

    Under mpirun every process reads and holds its part of the rows.
    """
    from hpclr.data.stored_statistics import StoredStatistics, check_space, check_split, write_statistics
    from hpclr.parallel.team import gather_team

    team = gather_team("hpclr data stats", os.environ)
    digest, classes = team.on_first(lambda: check_split(file, split))
    team.on_first(lambda: check_space(file, out))
    from hpclr.parallel.heat import column_statistics, label_counts, load  # imports torch: not for a wrong name

    samples = team.together(lambda: load(file, f"{split}/{'x' if classes else 'series'}"))
    labels = team.together(lambda: load(file, f"{split}/y") if classes else None)
    with team.or_none():
        found = column_statistics(samples, components)._asdict()
        if classes:
            found["class_counts"] = label_counts(labels, len(classes))
    attributes = {"split": split, "digest": digest, **{name: found.pop(name) for name in ("samples", "heat")}}
    team.on_first(lambda: write_statistics(file, StoredStatistics(found, attributes), out))
    if team.rank == 0:
        _show(StoredStatistics(found, attributes), classes)
        click.echo(f"written to /statistics in {out or file}")


def _team_under_mpirun(purpose: str) -> "Team | None":
    """The processes that mpirun started; None, and no MPI, for one process."""
    from hpclr.parallel.team import gather_team, started_together

    return gather_team(purpose, os.environ) if started_together(os.environ) > 1 else None


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


def _content(dataset: "Dataset") -> dict[str, str]:
    """What a dataset holds, in the words of its task."""
    sizes = ", ".join(f"{split} {size:,}" for split, size in dataset.sizes.items())
    if dataset.task == "language":
        return {"tokens": f"{sizes}; {dataset.dtype}", "vocabulary": _listed([repr(name) for name in dataset.classes])}
    return {
        "samples": sizes,
        "shape": f"{' x '.join(map(str, dataset.sample_shape))} {dataset.dtype}",
        "classes" if dataset.task == "classification" else "columns": _listed(dataset.classes),
        "mean": _listed([f"{value:.6g}" for value in dataset.mean]),
        "std": _listed([f"{value:.6g}" for value in dataset.std]),
    }


def _in_short(statistics: "StoredStatistics", digest: str) -> str:
    arrays, attributes = statistics
    if attributes["digest"] != digest:
        return "of another content than the file has now; run `hpclr data stats` again"
    shares = arrays["explained_variance_ratio"]
    return (
        f"of {attributes['samples']:,} samples of {attributes['split']}; {len(shares)} principal components explain "
        f"{shares.sum():.1%} of the variance ({_listed([f'{share:.1%}' for share in shares])})"
    )


def _show(statistics: "StoredStatistics", classes: list[str]) -> None:
    """The statistics as tables, long ones cut off."""
    arrays, attributes = statistics
    click.echo(f"{attributes['samples']:,} samples of the split {attributes['split']}")
    _table(("channel", "mean", "std"), range(len(arrays["mean"])), arrays["mean"], arrays["std"])
    if classes:
        counts = arrays["class_counts"]
        _table(("class", "samples", "share"), classes, counts, counts / counts.sum())
    shares = arrays["explained_variance_ratio"]
    numbers, values = range(1, len(shares) + 1), arrays["singular_values"]
    _table(("component", "singular value", "of variance", "so far"), numbers, values, shares, shares.cumsum())


def _table(names: tuple[str, ...], *columns: Iterable[Any]) -> None:
    from hpclr.output import printable

    lines = [names, *(tuple(map(_cell, row)) for row in zip(*columns, strict=True))]
    click.echo()
    for line in lines[: 1 + _MOST_ROWS]:
        click.echo(printable(f"{line[0]:24}" + "".join(f"{cell:>16}" for cell in line[1:])))
    if len(lines) > 1 + _MOST_ROWS:
        click.echo(f"… ({len(lines) - 1} in all)")


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")


def _prepared(done: int, total: int) -> str:
    return f"prepared {done:,} of {total:,} samples ({done / total:.0%})"
