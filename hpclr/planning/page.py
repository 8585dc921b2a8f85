"""A plan for people: tables of 100 columns, and what they rest on."""

from collections.abc import Iterator, Sequence
from math import floor, log10

from rich import box
from rich.console import Console
from rich.table import Table

from hpclr.output import printable
from hpclr.planning.estimate import Plan, Range, Row
from hpclr.planning.hardware import Hardware
from hpclr.planning.measuring import Measured

WIDTH = 100
_TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNTS = ((1e18, "·10¹⁸"), (1e15, "·10¹⁵"), (1e12, "·10¹²"), (1e9, "·10⁹"), (1e6, "·10⁶"), (1.0, ""))
_ENERGY = ((1e3, "MWh"), (1.0, "kWh"), (1e-3, "Wh"), (1e-6, "mWh"))
_TIGHT = 1.25  # times what is reckoned may be needed: allocator, libraries, what torch takes for itself
_OUTSIDE = 1.5e9  # bytes of CUDA's and NCCL's own

Units = Sequence[tuple[float, str]]


def show(plan: Plan, measured: Measured | None, console: Console | None = None) -> None:
    """Prints it; a log gets 100 columns."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal or console.width > WIDTH:
        console = Console(highlight=False, markup=False, emoji=False, width=WIDTH, file=console.file)
    console.print(printable(f"{plan.name}: {plan.method}, {plan.steps:,} steps\nfor {plan.hardware.what}"))
    console.print(printable(f"ranks ({'known' if plan.path.known else 'assumed'}): {plan.path.text}"))
    for table in (_phases(plan), _memory(plan), _times(plan), _gains(plan), _shapes(plan)):
        if table.row_count:
            console.print(table)
    for line in _notes(plan, measured):
        console.print(printable(f"* {line}"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _phases(plan: Plan) -> Table:
    table = _table(
        f"Parameters and work ({plan.dense_parameters:,} parameters dense)",
        "from step", "mean rank", "trained", "stored", "reduced a step", "FLOPs a step",
    )  # fmt: skip
    for phase in plan.phases:
        rank = "dense" if phase.rank_share is None else f"{phase.rank_share:.0%}"
        table.add_row(
            f"{phase.first:,}", rank, f"{phase.trained:,}", f"{phase.stored:,}",
            number(phase.gradient_bytes, _BYTES), number(phase.flops, _COUNTS),
        )  # fmt: skip
    return table


def _memory(plan: Plan) -> Table:
    row = next((row for row in plan.rows if row.memory), None)
    of = f", one of {row.processes:,}, with {row.samples:,.0f} samples a step" if row else ""
    table = _table(
        f"Memory of a process{of}",
        "when", "weights", "gradients", "optimiser", "activations", "check", "other", "at its peak",
    )  # fmt: skip
    for held in row.memory if row else ():
        parts = held.weights, held.gradients, held.optimizer, held.activations, held.check, held.other, held.total
        table.add_row(held.phase, *(number(part, _BYTES) if part else "-" for part in parts))
    return table


def _times(plan: Plan) -> Table:
    table = _table(
        "Time and energy", "nodes", "processes", "step, start", "step, end", "waits", "total", "energy", "memory",
    )  # fmt: skip
    for row in plan.rows:
        table.add_row(f"{row.nodes:,}", f"{row.processes:,}", *_time_cells(row, plan.hardware))
    return table


def _time_cells(row: Row, hardware: Hardware) -> list[str]:
    if row.impossible is not None:
        return [row.impossible]
    assert row.waits is not None
    return [
        *(between(found, _TIMES) for found in (row.start, row.end)),
        percent(row.waits),
        between(row.total, _TIMES),
        between(row.energy, _ENERGY),
        fits(max(held.total for held in row.memory), hardware),
    ]


def _gains(plan: Plan) -> Table:
    table = _table("Against dense training", "nodes", "dense step", "waits", "dense total", "energy", "pays from step")
    for row in plan.rows if plan.path.begins is not None else ():
        if row.dense_waits is not None:
            cells = between(row.dense, _TIMES), percent(row.dense_waits), between(row.dense_total, _TIMES)
            table.add_row(f"{row.nodes:,}", *cells, between(row.dense_energy, _ENERGY), _break_even(row))
    return table


def _break_even(row: Row) -> str:
    best, worst = ("not in this run" if step is None else f"{round_to_two(step):,}" for step in row.break_even)
    return best if best == worst else f"{best} – {worst}"


def _shapes(plan: Plan) -> Table:
    table = _table("Ranks that pay", "weight", "layers", "rank", "of full rank")
    for one in plan.shapes:
        m, n = one.shape
        table.add_row(f"{m} x {n}", f"{one.layers}", f"{one.pays_up_to}", f"{one.pays_up_to / min(m, n):.0%}")
    return table


def _notes(plan: Plan, measured: Measured | None) -> Iterator[str]:
    saved = 1 - plan.flops / plan.dense_flops if plan.dense_flops else 0.0
    yield (
        f"Counted: parameters, bytes reduced, and operations ({number(plan.flops, _COUNTS)} in all, "
        f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} than dense), for these ranks."
    )
    yield "Traced, to about a tenth (on CPUs): memory, from a step without data. CUDA and NCCL take 0.5 to 2 GB more."
    yield from (_measured(measured) if measured else _assumed(plan))
    yield (
        "Assumed: 60 to 85 % of the links' bandwidth (CPUs: 50 to 80 %), hidden behind 50 to 90 % of the backward pass "
        "(CPUs: not hidden); a device draws 50 to 100 % of its power, the rest of its node a fifth to four fifths more."
    )
    if not plan.path.known and plan.path.begins is not None:
        yield (
            "Least sure: the ranks. They show in training only; --path cut=0.2,final=0.25 assumes others, "
            "--like RUN takes those of an earlier run."
        )
    if any(row.remembered for row in plan.rows):
        most = max(row.remembered for row in plan.rows)
        yield f"In host memory: up to {number(most, _BYTES)} of remembered bases, on the process that examines them."
    yield "Left out: penalties of the method, validation, checkpoints, reading data, starting, waiting in the queue."


def _assumed(plan: Plan) -> Iterator[str]:
    speeds = ("25 to 70 %", "4 to 20 µs") if not plan.hardware.queues else ("25 to 60 %", "4 to 15 µs")
    yield (
        f"Assumed: products reach {speeds[0]} of the device's operations a second, activations go 4 to 8 times through "
        f"its memory, torch takes {speeds[1]} to call an operation. --measure, on the target, replaces these."
    )


def _measured(found: Measured) -> Iterator[str]:
    each = ", ".join(f"{name} {between(Range(*one.passes), _TIMES)}" for name, one in found.timed.items())
    yield (
        f"Measured on {found.device}, {found.share.samples} samples a step of {found.data}: passes take {each}. Forms "
        "in between are interpolated by operations, other batches by samples; a run may take 0.85 to 1.35 as long."
    )
    yield f"Measured: a peak of {number(found.peak, _BYTES)} ({found.peak_of}), dense."


def fits(total: float, hardware: Hardware) -> str:
    """Whether so many bytes go on a device."""
    outside = _OUTSIDE if hardware.queues else 0.0
    if total + outside > hardware.memory:
        return f"too much ({number(total, _BYTES)})"
    return "tight" if total * _TIGHT + outside > hardware.memory else "fits"


def between(found: Range | None, units: Units) -> str:
    """No more digits than are known, and one unit: 1.2–3.4 s."""
    if found is None:
        return "-"
    size, unit = next((one for one in units if found.high >= one[0]), units[-1])
    low, high = (_digits(end / size) for end in (found.low, found.high))
    return f"{low} {unit}" if low == high else f"{low}–{high} {unit}"


def number(value: float, units: Units) -> str:
    """Three digits of something that is counted."""
    size, unit = next((one for one in units if value >= one[0]), units[-1])
    text = f"{value / size:.3g}"
    return f"{text}{unit}" if unit.startswith("·") else f"{text} {unit}".strip()


def percent(found: Range) -> str:
    """A share between two."""
    low, high = f"{found.low:.0%}", f"{found.high:.0%}"
    return low if low == high else f"{low[:-1]}–{high}"


def _digits(value: float) -> str:
    return f"{round_to_two(value):,}" if value >= 10 else f"{value:.2g}"


def round_to_two(value: float) -> int:
    """Two leading digits of a number of 10 or more; smaller ones whole."""
    if value < 10:
        return round(value)
    unit: int = 10 ** (floor(log10(value)) - 1)
    return round(value / unit) * unit
