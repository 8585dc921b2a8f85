"""What `hpclr spectrum` has found, for people and for programs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hpclr.output import on_one_line
from hpclr.training.inspection import sparkline
from hpclr.training.spectrum import LayerSpectrum, Spectra, total_of
from hpclr.training.spectrum_data import LinearView

_BARS = 16
_NAMED = 3  # layers left alone for one reason
_WIDEST = 1000  # columns


def show_spectra(spectra: Spectra, console: Console | None = None) -> None:
    """Prints the spectra, what each rule would keep of them, and what is left alone.

    Args:
        spectra: of a model.
        console: where to print; None: standard output, as wide as the tables are where it is no terminal.
    """
    tables = (
        [_spectra(spectra), _ranks("directions that each rule would keep", spectra.layers)] if spectra.layers else []
    )
    tables += [_ranks("directions of the outputs that each rule would keep", spectra.seen)] if spectra.seen else []
    tables += [_views(spectra.views)] if spectra.views else []
    tables += [_left_alone(spectra)] if spectra.left_alone else []
    console = console or _console(tables or [Table()])
    for table in tables:
        console.print(table)


def _console(tables: list[Table]) -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDEST
        console.width = max(console.measure(table).maximum for table in tables)
    return console


def _spectra(spectra: Spectra) -> Table:
    table = Table(title=on_one_line(spectra.source), title_justify="left")
    for column in ("layer", "shape", "σ₁", "σ_k/σ₁", "stable\nrank", "effective\nrank", "noise\nedge/σ₁", "spectrum"):
        table.add_column(column, justify="left" if column in ("layer", "spectrum") else "right")
    for layer in spectra.layers:
        table.add_row(on_one_line(layer.name), _shape(layer), *_numbers(layer))
    return table


def _shape(layer: LayerSpectrum) -> str:
    return f"{layer.shape[0]}×{layer.shape[1]}" + (f", rank {len(layer.values)}" if layer.factored else "")


def _numbers(layer: LayerSpectrum) -> tuple[str, ...]:
    top = layer.largest or 1.0
    return (
        f"{layer.largest:.4g}",
        f"{float(layer.values[-1]) / top:.3f}",
        f"{layer.stable_rank:.1f}",
        f"{layer.effective_rank:.1f}",
        f"{layer.edge / top:.3f}" if layer.noise else "–",
        sparkline(layer.values, _BARS),
    )


def _ranks(title: str, layers: Sequence[LayerSpectrum]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer")
    table.add_column("of", justify="right")
    rules = list(layers[0].kept)
    for rule in rules:
        table.add_column(_heading(rule), justify="right")
    for layer in layers:
        table.add_row(on_one_line(layer.name), str(min(layer.shape)), *map(str, layer.ranks.values()))
    table.add_section()
    totals = [total_of(layers, rule) for rule in rules]
    table.add_row("parameters stored", "", *(f"{total.stored:.1%}" for total in totals))
    table.add_row("parameters trained", "", *(f"{total.trained:.1%}" for total in totals))
    table.add_row("energy, mean", "", *(f"{total.energy:.1%}" for total in totals))
    return table


def _views(views: Sequence[LinearView]) -> Table:
    table = Table(title="the targets as linear maps of the inputs", title_justify="left")
    for column in ("of", "inputs", "outputs", "rank", "explained", "hidden units"):
        table.add_column(column, justify="left" if column in ("of", "hidden units") else "right")
    for view in views:
        rank = "–" if view.rank is None else str(view.rank)
        table.add_row(
            on_one_line(view.name), str(view.inputs), str(view.outputs), rank, f"{view.explained:.1%}", _units(view)
        )
    return table


def _units(view: LinearView) -> str:
    """Widths with the activations that need them."""
    widths: dict[int, list[str]] = {}
    for name, width in view.units.items():
        widths.setdefault(width, []).append(name)
    return ", ".join(f"{width} ({', '.join(names)})" for width, names in widths.items() if width)


def _heading(rule: str) -> str:
    """Over several lines: ranks are narrow."""
    return on_one_line(rule).replace("_", "\n").replace(" ", "\n")


def _left_alone(spectra: Spectra) -> Table:
    table = Table(title="left alone", title_justify="left")
    for column in ("why", "layers", "such as"):
        table.add_column(column, justify="right" if column == "layers" else "left")
    reasons: dict[str, list[str]] = {}
    for name, why in spectra.left_alone.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = " …" if len(names) > _NAMED else ""
        table.add_row(on_one_line(why), str(len(names)), on_one_line(", ".join(names[:_NAMED]) + more))
    return table


def as_plain(spectra: Spectra) -> dict[str, Any]:
    """Everything, as it goes into JSON."""
    return {
        "source": spectra.source,
        "rules": {rule: vars(spectra.total(rule)) for rule in spectra.rules},
        "layers": [_plain(layer) for layer in spectra.layers],
        "left_alone": dict(spectra.left_alone),
    } | ({"outputs": _outputs(spectra), "linear": list(map(_view, spectra.views))} if spectra.with_data else {})


def _outputs(spectra: Spectra) -> dict[str, Any]:
    keys = ("name", "shape", "kept", "singular_values")
    return {
        "rules": {rule: vars(total_of(spectra.seen, rule)) for rule in spectra.rules} if spectra.seen else {},
        "layers": [{key: _plain(layer)[key] for key in keys} for layer in spectra.seen],
    }


def _view(view: LinearView) -> dict[str, Any]:
    return vars(view) | {"units": view.units}


def _plain(layer: LayerSpectrum) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": layer.shape,
        "factored": layer.factored,
        "stable_rank": layer.stable_rank,
        "effective_rank": layer.effective_rank,
        "noise": layer.noise or None,
        "noise_edge": layer.edge or None,
        "kept": {rule: vars(kept) for rule, kept in layer.kept.items()},
        "singular_values": layer.values.tolist(),
    }
