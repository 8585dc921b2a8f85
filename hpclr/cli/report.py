"""`hpclr report`."""

from pathlib import Path

import click


def _page(ctx: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """A slip must not replace a file of a run."""
    if value.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{value} must end in .html")
    return value


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default="report.html", callback=_page,
              metavar="FILE", help="The page, which is replaced if it is there [report.html].")  # fmt: skip
@click.option(
    "--spectra/--no-spectra", default=True, help="Read the newest checkpoints, too, for singular values [yes]."
)
def report(runs: tuple[Path, ...], output: Path, spectra: bool) -> None:
    """Show what training has done in RUNS (run directories), on one page for any browser, also while it goes on."""
    from hpclr.files import write_asked
    from hpclr.output import printable, say
    from hpclr.report.page import page_of
    from hpclr.report.runs import read_runs

    found = read_runs(runs, spectra=spectra)
    for run in found:
        for fault in run.faults:
            say(printable(f"hpclr: warning: {fault}"))
    content = page_of(found)
    write_asked(output, content)
    click.echo(printable(f"{output}: {len(content) / 1e6:.1f} MB"))
