"""The page: one file that needs nothing else, and in which nothing runs."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone

from hpclr.report.canvas import Plot, data_uri
from hpclr.report.figures import cost_plots, headline, layer_plots, training_plots
from hpclr.report.markup import Markup, element, joined
from hpclr.report.runs import Run
from hpclr.report.style import PAGE_CSS
from hpclr.report.table import settings_table, summary_table
from hpclr.version import __version__


def page_of(runs: Sequence[Run]) -> bytes:
    """A page on runs, in HTML.

    There is no script in it, and its policy has the browser run none whatever is in names and files: of pictures it
    may show those within the page, of styles use the one at its top.

    Args:
        runs: as they are to be shown, in this order.
    """
    title = f"hpclr report: {', '.join(run.name for run in runs)}"
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        Markup(f"<style>{PAGE_CSS}</style>"),
    )
    body = element("body", _heading(runs), _warnings(runs), element("main", *_sections(runs)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n".encode()


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(PAGE_CSS.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _heading(runs: Sequence[Run]) -> Markup:
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    records = sum(run.records.lines for run in runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    text = f"Made by hpclr {__version__} on {made}, from {records:,} records."
    return element("header", element("h1", title), element("p", text, class_="quiet"))


def _warnings(runs: Sequence[Run]) -> Markup | None:
    """What could not be read; the rest is drawn."""
    faults = [fault for run in runs for fault in run.faults]
    faults += [
        f"{run.name}: losses that are not finite, and not drawn: {run.records.not_finite:,}"
        for run in runs
        if run.records.not_finite
    ]
    if not faults:
        return None
    return element(
        "div", element("strong", "Not all could be read"), element("ul", *(element("li", fault) for fault in faults)),
        class_="warning", role="note",
    )  # fmt: skip


def _sections(runs: Sequence[Run]) -> list[Markup]:
    first = headline(runs)
    summary = element(
        "section",
        element("h2", "Summary"),
        element("div", summary_table(runs), None if first is None else _figure(first), id="summary"),
        element("details", element("summary", "All settings"), settings_table(runs)),
    )
    training = _section("Training", training_plots(runs), [] if _has_records(runs) else ["No step is recorded yet."])
    cost = _section("What it costs", cost_plots(runs), [])
    alone = len(runs) == 1
    layers = [
        _section("Layers" if alone else f"Layers of {run.name}", *layer_plots(run, number, alone=alone))
        for number, run in enumerate(runs)
    ]
    return [summary, training, cost, *layers]


def _has_records(runs: Sequence[Run]) -> bool:
    return any(len(run.table("train")) for run in runs)


def _section(title: str, plots: Sequence[Plot], reasons: Sequence[str]) -> Markup:
    if not plots and not reasons:
        return joined()
    return element(
        "section",
        element("h2", title),
        *(element("p", reason, class_="quiet") for reason in reasons),
        element("div", *map(_figure, plots), class_="plots") if plots else None,
    )


def _figure(plot: Plot) -> Markup:
    links = [
        element(
            "a", text, href=data_uri(kind, content), download=f"{plot.name}.{ending}", title=f"{plot.name}.{ending}"
        )
        for text, kind, ending, content in (
            ("Save as SVG", "image/svg+xml", "svg", plot.svg_file()),
            ("Numbers as CSV", "text/csv", "csv", plot.csv_file()),
        )
    ]
    return element("figure", plot.svg, element("figcaption", element("div", plot.note), element("div", *links)))
