"""Which plots a page has, and from which records they are drawn."""

import re
from collections.abc import Callable, Iterable, Sequence
from math import isfinite, nan

from hpclr.report.axes import compact, percent
from hpclr.report.canvas import Plot
from hpclr.report.heat import MOST_ROWS, Row, heat_map
from hpclr.report.lines import Line, Mark, Spot, Words, line_plot, scatter_plot
from hpclr.report.raster import colour
from hpclr.report.records import Point, Table
from hpclr.report.runs import Run
from hpclr.report.shares import Bar, share_plot
from hpclr.report.table import metric_of, score, size
from hpclr.report.thinning import thinned
from hpclr.training.scores import METRICS

_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_PARTS = ("data", "check", "save", "valid")  # of a pace record; what remains is computing, and adding up over processes
_PART_NAMES = ("computing", "data", "checks", "saving", "validation")
_SPECTRA = 48  # lines in a plot of spectra
_SPECTRUM_COLUMNS = 40
_DARKEST, _LIGHTEST = 0.22, 0.85  # of the scale of colours: what is seen on white and on black
_WITHOUT_TIME = "Of records without times: seconds of training, by checks and validations."


def headline(runs: Sequence[Run]) -> Plot | None:
    """What the method is for: the score against parameters, or of a single run its parameters over the steps."""
    return _against_parameters(runs) if len(runs) > 1 else _parameters(runs[0], "run1")


def training_plots(runs: Sequence[Run]) -> list[Plot]:
    """Loss, metrics and learning rate, over steps and over time."""
    metrics = [name for name in METRICS if any(run.table("valid").points("step", name) for run in runs)]
    return [
        *_twice(runs, "loss", "Training loss", "train", "loss", noisy=True),
        *(
            plot
            for name in metrics
            for plot in _twice(runs, f"valid-{name}", f"Validation {name}", "valid", name, form=_form_of(name))
        ),
        *_twice(runs, "lr", "Learning rate", "train", "lr"),
    ]


def cost_plots(runs: Sequence[Run]) -> list[Plot]:
    """What the score has cost: parameters, time, memory, and what is sent between processes."""
    note = "Host time of the first process."
    times = Words("step-time", "Milliseconds a step", "step", note)
    shares = Words("shares", "What the time went into", "share", f"{note} Computing includes adding up gradients.")
    memory = Words("memory", "Memory, bytes (the most until then)", "step")
    reduced = Words("gradient-bytes", "Gradients added up over processes, bytes a step", "step")
    state = Words("optimizer-bytes", "Optimiser state, bytes", "step")
    return _known(
        line_plot(times, _lines(runs, _milliseconds), from_zero=True),
        share_plot(shares, [Bar(run.name, _parts(run.table("pace"))) for run in runs]),
        line_plot(memory, _lines(runs, lambda run: run.table("pace").points("step", "memory")), from_zero=True),
        line_plot(reduced, _size_lines(runs, "gradient_bytes"), from_zero=True),
        line_plot(state, _size_lines(runs, "optimizer_bytes"), from_zero=True),
    )


def layer_plots(run: Run, number: int, *, alone: bool) -> tuple[list[Plot], list[str]]:
    """Of one run: its parameters; basis, rank and spectrum of every layer; and why some of these are missing."""
    prefix = f"run{number + 1}-{slug(run.name)}"
    plots = _known(
        None if alone else _parameters(run, prefix),
        _stability(run, prefix),
        _outside(run, prefix),
        _ranks(run, prefix),
        _relative_ranks(run, prefix),
        _spectra(run, prefix),
    )
    reasons = []
    if not run.records.layers["ranks"]:
        reasons.append("No check of the layers has been recorded: the method has none, or has not come to one yet.")
    elif not run.records.layers["stability"]:
        reasons.append("The method does not measure the stability of bases, or has not done so twice yet.")
    elif not run.records.layers["outside"]:
        reasons.append("No gradients outside frozen bases: none was frozen at a check, or they were not measured.")
    if run.records.layers["ranks"] and not run.full_ranks:
        reasons.append("No relative ranks: the shapes of the layers are not known before a checkpoint can be read.")
    if run.spectra.why:
        reasons.append(f"No spectra: {run.spectra.why}")
    return plots, reasons


def slug(text: str) -> str:
    """Part of a file's name, whatever the text."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40] or "run"


def _lines(runs: Sequence[Run], points: Callable[[Run], list[Point]]) -> list[Line]:
    """One a run, over steps."""
    return [Line(run.name, points(run), number, _marks(run)) for number, run in enumerate(runs)]


def _size_lines(runs: Sequence[Run], name: str) -> list[Line]:
    return _lines(runs, lambda run: _size_points(run, name))


def _size_points(run: Run, name: str) -> list[Point]:
    """A size at the checks, and what it has come to."""
    points, last = run.table("check").points("step", name), size(run, name)
    return points if last is None else [*points, (float(run.records.last_step), float(last))]


def _milliseconds(run: Run) -> list[Point]:
    return sorted((lap.step, 1000 * lap.seconds / lap.steps) for lap in run.laps)


def _twice(
    runs: Sequence[Run], name: str, title: str, kind: str, column: str, *,
    noisy: bool = False, form: Callable[[float], str] = compact,
) -> list[Plot]:  # fmt: skip
    """Over steps and over time."""
    seconds, unit, label = _times(runs, kind, column)
    words = [Words(f"{name}-steps", title, "step", form=form), Words(f"{name}-time", title, *label, form=form)]
    steps = [run.table(kind).points("step", column) for run in runs]
    over_steps, over_time = (
        [Line(run.name, each[number], number, _marks(run, by), noisy) for number, run in enumerate(runs)]
        for each, by in ((steps, None), (seconds, unit))
    )
    from_zero = column == "lr"
    return _known(
        line_plot(words[0], over_steps, from_zero=from_zero),
        line_plot(words[1], over_time, from_zero=from_zero, apart_at_marks=True),
    )


def _times(runs: Sequence[Run], kind: str, column: str) -> tuple[list[list[Point]], float, tuple[str, str]]:
    """The points of each run over time, in a unit that suits; that unit in seconds; label and note of the axis."""
    points = [run.clock.points(run.table(kind), column) for run in runs]
    longest = max((of_run[-1][0] for of_run in points if of_run), default=0.0)
    unit, name = next((pair for pair in _UNITS if longest >= 2 * pair[0]), _UNITS[-1])
    scaled = [[(second / unit, value) for second, value in of_run] for of_run in points]
    older = any(of_run and run.clock.start is None for run, of_run in zip(runs, points, strict=True))
    return scaled, unit, (f"{name} since the start", _WITHOUT_TIME if older else "")


def _marks(run: Run, unit: float | None = None) -> list[Mark]:
    """Of the attempts after the first: over steps, or over time in this unit."""
    places = [(one, one.step if unit is None else one.seconds / unit) for one in run.attempts[1:]]
    return [
        Mark(place, f"attempt {one.number:g}", f"{run.name}: attempt {one.number:g}, after step {one.step:,.0f}")
        for one, place in places
        if isfinite(place)
    ]


def _form_of(metric: str) -> Callable[[float], str]:
    return percent if "%" in METRICS[metric].form else compact


def _parts(pace: Table) -> dict[str, float]:
    """Seconds by what they went into."""
    known = {name: sum(value for value in pace[name] if value > 0) for name in _PARTS}
    whole = sum(value for value in pace["seconds"] if value > 0)
    values = [max(0.0, whole - sum(known.values())), *known.values()]
    return dict(zip(_PART_NAMES, values, strict=True))


def _against_parameters(runs: Sequence[Run]) -> Plot | None:
    """Scores against sizes."""
    split = "test" if metric_of(runs, "test") else "best_validation"
    metric = metric_of(runs, split)
    if metric is None:
        return None
    rows = [(run, score(run, split, metric), size(run, "stored"), size(run, "trainable")) for run in runs]
    spots = [
        Spot(run.name, number, y, stored, trainable)
        for number, (run, y, stored, trainable) in enumerate(rows)
        if y is not None and stored is not None and trainable is not None
    ]
    left_out = [run.name for run, *values in rows if None in values]
    note = "Full circle: stored. Hollow: trained at the end."
    missing = f" Not known: {', '.join(left_out)}." if left_out else ""
    of = "test" if split == "test" else "best validation"
    words = Words("score-parameters", f"{of.capitalize()} {metric}", "parameters", note + missing, _form_of(metric))
    return scatter_plot(words, spots) if spots else None


def _parameters(run: Run, prefix: str) -> Plot | None:
    names = ("trainable", "stored", "dense")
    lines = [Line(name, _size_points(run, name), number, _marks(run)) for number, name in enumerate(names)]
    return line_plot(Words(f"{prefix}-parameters", "Parameters", "step"), lines, from_zero=True)


def _rows(run: Run, what: str, change: Callable[[str, float], float] = lambda name, value: value) -> list[Row]:
    """Layers in the order of the model, each value changed."""
    frozen = {name: _first(points) for name, points in run.records.layers["frozen"].items()}
    known = run.records.layers[what]
    return [
        Row(name, [(step, change(name, value)) for step, value in sorted(known[name])], frozen.get(name))
        for name in known
    ]


def _first(frozen: Iterable[Point]) -> float | None:
    return min((step for step, value in frozen if value), default=None)


def _stability(run: Run, prefix: str) -> Plot | None:
    rows = _rows(run, "stability")
    low = min((value for row in rows for _, value in row.points), default=0.0)
    note = "How much of the basis U Vᵀ is as it was at the check before; each value holds from its check to the next."
    words = Words(f"{prefix}-stability", "Stability of every layer's basis", "step", note + _frozen_note(rows))
    return heat_map(words, rows, run.records.last_step, (min(0.9, low) if low < 1 else 0.9, 1.0))


def _outside(run: Run, prefix: str) -> Plot | None:
    rows = _rows(run, "outside")
    note = "The share of the whole weight's gradient, by its norm, that nothing between the frozen bases can follow."
    words = Words(f"{prefix}-outside", "Gradient outside the frozen basis", "step", note + _frozen_note(rows))
    return heat_map(words, rows, run.records.last_step, (0.0, 1.0))


def _ranks(run: Run, prefix: str) -> Plot | None:
    rows = _rows(run, "ranks")
    most = max((value for row in rows for _, value in row.points), default=1.0)
    words = Words(f"{prefix}-rank", "Rank of every layer", "step", _frozen_note(rows))
    return heat_map(words, rows, run.records.last_step, (0.0, max(most, 1.0)))


def _relative_ranks(run: Run, prefix: str) -> Plot | None:
    """Relative to the smaller side of a layer's weight, as far as shapes are known."""
    full = run.full_ranks
    rows = _rows(run, "ranks", lambda name, value: value / full[name] if full.get(name) else nan)
    known = [row for row in rows if full.get(row.name)]
    words = Words(f"{prefix}-relative-rank", "Rank relative to full rank", "step", _frozen_note(known), percent)
    return heat_map(words, known, run.records.last_step, (0.0, 1.0))


def _frozen_note(rows: Sequence[Row]) -> str:
    said = " Circle: the check at which the basis was frozen." if any(row.frozen_at is not None for row in rows) else ""
    return said + (f" The first {MOST_ROWS:,} of {len(rows):,} layers." if len(rows) > MOST_ROWS else "")


def _spectra(run: Run, prefix: str) -> Plot | None:
    layers = run.spectra.layers
    every = max(1, -(-len(layers) // _SPECTRA))
    shown = layers[::every]
    lines = [
        Line(one.name, _thinned(one.values), colour=colour(_DARKEST + (_LIGHTEST - _DARKEST) * number / len(shown)))
        for number, one in enumerate(shown)
    ]
    note = f"From the checkpoint of step {run.spectra.step:,}." if run.spectra.step is not None else ""
    if every > 1:
        note += f" {len(lines)} of {len(layers)} layers."
    cutoff = _cutoff(run)
    if cutoff is not None and lines:
        note += f" Dashed: the cutoff, {cutoff:g}."
    words = Words(f"{prefix}-spectra", "Singular values relative to the largest", "number of the value", note)
    return line_plot(words, lines, from_zero=True, guide=cutoff)


def _thinned(values: Sequence[float]) -> list[Point]:
    return thinned([(float(number), value) for number, value in enumerate(values, start=1)], _SPECTRUM_COLUMNS)


def _cutoff(run: Run) -> float | None:
    """Of the relative rule, the only one that is a level in this plot."""
    for key in ("method.cutoff", "method.cutoff.cutoff"):
        text = run.settings.get(key, "")
        if re.fullmatch(r"[0-9.eE+-]+", text):
            return float(text)
    return None


def _known(*plots: Plot | None) -> list[Plot]:
    return [plot for plot in plots if plot is not None]
