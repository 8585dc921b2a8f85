"""`hpclr spectrum`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpclr.cli.picture import plot_option
from hpclr.cli.progress import progress_shown

if TYPE_CHECKING:
    from hpclr.training.spectrum import Spectra


@click.command()
@click.argument("source", metavar="MODEL|CHECKPOINT")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--layers", multiple=True, metavar="GLOB", help="Only layers of such names; may be repeated.")
@click.option("--rule", "rules", multiple=True, metavar="RULE",
              help="A rule as at method.cutoff: 0.1, or '{rule: energy, share: 0.99}'; may be repeated.")  # fmt: skip
@plot_option("Draw the spectra: .svg, .png or .pdf.")
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE",
              help="A prepared file: what layers do to its samples, and what linear maps would.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), metavar="N",
              help="With --data: so many training samples; 2048 without.")  # fmt: skip
@click.option("--trust", is_flag=True, help="With --data: import the target: model that the checkpoint names.")
@click.option("--json", "as_json", is_flag=True, help="Everything, with all singular values, for programs.")
@click.option("--best", is_flag=True, help="Of a run directory: the best checkpoint on validation, not the newest.")
@click.option("--untrusted", is_flag=True, help="Examine a checkpoint in a process of its own; no .sha256 needed.")
def spectrum(
    source: str,
    settings: tuple[str, ...],
    layers: tuple[str, ...],
    rules: tuple[str, ...],
    plot: Path | None,
    data: Path | None,
    samples: int | None,
    trust: bool,
    as_json: bool,
    best: bool,
    untrusted: bool,
) -> None:
    """Show the singular values of all weights, and what each rank rule would keep, before anyone trains.

    Of package.module:factory, which is imported and called with KEY=VALUE; of a run file's model (KEY=VALUE overrides
    it); or of a checkpoint, a run directory, or a file of weights (.safetensors, .pt), of which nothing is imported.
    """
    if data is None and (samples is not None or trust):
        raise click.UsageError("--samples and --trust go with --data FILE")
    from hpclr.training.spectrum import analyse
    from hpclr.training.spectrum_data import Asked
    from hpclr.training.spectrum_sources import find_subject, parse_rule

    judges = [parse_rule(rule) for rule in rules]
    asked = Asked(data, samples or Asked().samples, trust)
    subject = find_subject(source, settings, layers=layers, best=best, untrusted=untrusted, asked=asked)
    with progress_shown("decomposing", lambda done, total: f"decomposed {done / total:.0%}") as progress:
        spectra = analyse(subject, judges, progress)
    _show(spectra, as_json)
    if plot is not None:
        _draw(spectra, plot)


def _show(spectra: "Spectra", as_json: bool) -> None:
    import msgspec

    from hpclr.training.spectrum_table import as_plain, show_spectra

    if as_json:
        click.echo(msgspec.json.encode(as_plain(spectra)).decode())
    else:
        show_spectra(spectra)


def _draw(spectra: "Spectra", file: Path) -> None:
    from hpclr.files import write_asked
    from hpclr.report.spectrum_picture import Curve, picture_of

    curves = [
        Curve(layer.name, layer.shape, layer.values.tolist(), layer.bulk(), layer.edge, layer.ranks)
        for layer in spectra.layers
    ]
    write_asked(file, picture_of(file.suffix[1:].lower(), spectra.source, curves))
