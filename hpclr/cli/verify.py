"""`hpclr verify`."""

from collections.abc import Callable
from pathlib import Path

import click

from hpclr.cli.progress import progress_shown


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--without-digest", is_flag=True, help="Do not ask for the .sha256 files beside checkpoints.")
def verify(paths: tuple[Path, ...], without_digest: bool) -> None:
    """Check every byte and the sense of checkpoints: each PATH a file, or a run directory with all of its own.

    Files are read in a process of their own with little time and memory, so those of strangers may be checked. Nothing
    that they name is imported, and nothing is changed. Ends with 0 if all are good, else with 1.
    """
    from hpclr.output import printable
    from hpclr.training.verification import checkpoints_of, remarks_on, store_of, verify_file

    all_good = True
    for path, files in [(path, checkpoints_of(path)) for path in paths]:
        verdicts = []
        for file in files:
            with progress_shown("verifying", _line(file.name)) as progress:
                verdicts.append(verify_file(file, without_digest=without_digest, progress=progress))
            click.echo(printable(str(verdicts[-1])))
        store = store_of(path) if path.is_dir() else None
        for remark in remarks_on(store, verdicts) if store else ():
            click.echo(printable(remark))
        all_good = all_good and not any(verdict.faults for verdict in verdicts)
    if not all_good:
        click.get_current_context().exit(1)


def _line(name: str) -> Callable[[int, int], str]:
    return lambda done, total: f"verified {done / total:.0%} of {name}"
