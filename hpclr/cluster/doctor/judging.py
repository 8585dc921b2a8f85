"""What the notes of all processes come to: lines that name nodes, a table of what was measured, whom to leave out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

import msgspec

from hpclr.cluster.doctor.finding import Finding, Level, failure, ok, warning, worst
from hpclr.cluster.doctor.notes import Note
from hpclr.parallel.meeting.consultation import ranks_text

_SLOW = 0.6  # of the median
_CLOCKS_APART = 1.0  # seconds
_MOST_NAMED = 16
_AGAIN = "Measure again to be sure, then leave the node out and tell the administrators."
_UNDECIDED = "Of so few nodes nobody can say which is as it should be: measure again, on three or more."
_FEWEST = 3  # nodes, of which a slow one can be told

# What is compared over all processes: name, in words, unit. Reading is not:
# memory may have kept what was written.
SPEEDS = (
    ("product", "matrix products", "GFLOP/s"),
    ("pair", "exchange with another", "MB/s"),
    ("run disk write", "writing where runs live", "MB/s"),
    ("own disk write", "writing to TMPDIR", "MB/s"),
)


@dataclass(frozen=True)
class Line:
    """A finding, and the nodes that it is about."""

    finding: Finding
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All that there is to say of a job.

    Attributes:
        processes: how many have been heard.
        nodes: their nodes.
        lines: what was found.
        table: what was measured, by node; the slowest process of each counts.
        bad: nodes to leave out.
    """

    processes: int
    nodes: tuple[str, ...]
    lines: tuple[Line, ...]
    table: dict[str, dict[str, float]]
    bad: tuple[str, ...]

    @property
    def level(self) -> Level:
        """The worst of its lines."""
        return worst([line.finding.level for line in self.lines])

    def exclusion(self) -> str:
        """The words that leave the bad nodes out; "" if there is nobody to leave out, or nobody would be left."""
        return f"--exclude={','.join(self.bad)}" if self.bad and set(self.nodes) - set(self.bad) else ""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        lines = [msgspec.to_builtins(line.finding) | {"nodes": line.nodes} for line in self.lines]
        return {
            "level": self.level,
            "processes": self.processes,
            "nodes": self.nodes,
            "findings": lines,
            "measured": self.table,
            "exclude": self.exclusion(),
        }


def report(notes: Sequence[Note], problems: Sequence[Line]) -> Report:
    """Puts the notes of all processes together.

    Args:
        notes: by rank.
        problems: what else is known.
    """
    lines = [*_merged(notes), *_differences(notes), *problems, *_in_common(notes), *_slow(notes), *_clocks(notes)]
    nodes = tuple(dict.fromkeys(note.host for note in notes))
    singled_out = [line for line in lines if _singles_out(line, nodes)]
    bad = dict.fromkeys(node for line in singled_out for node in line.nodes)
    return Report(len(notes), nodes, tuple(lines), _table(notes), tuple(bad))


def _singles_out(line: Line, nodes: Sequence[str]) -> bool:
    """Whether a line speaks against its nodes: a failure that others do not have, or slowness."""
    alone = bool(line.nodes) and not set(nodes) <= set(line.nodes)
    return alone and (line.finding.level == "failure" or line.finding.advice == _AGAIN)


def _merged(notes: Sequence[Note]) -> Iterator[Line]:
    """Each check once: what is fine in the words of the first node; what is not, for each remedy once."""
    groups: dict[tuple[str, ...], list[tuple[Note, Finding]]] = {}
    for note in notes:
        for finding in note.findings:
            groups.setdefault((finding.about, finding.level, finding.advice), []).append((note, finding))
    for members in groups.values():
        nodes = tuple(dict.fromkeys(note.host for note, _ in members))
        yield Line(members[0][1], nodes)


def _differences(notes: Sequence[Note]) -> Iterator[Line]:
    """Versions and the like that are not the same on all nodes; the most frequent counts as right."""
    by_subject: dict[str, dict[str, str]] = {}
    for note in notes:
        for finding in note.findings:
            if finding.same:
                by_subject.setdefault(finding.about, {}).setdefault(note.host, finding.same)
    for about, by_node in by_subject.items():
        values = list(by_node.values())
        usual = max(dict.fromkeys(values), key=values.count)
        for other in dict.fromkeys(value for value in values if value != usual):
            nodes = tuple(node for node, value in by_node.items() if value == other)
            yield Line(warning(about, f"{other}, elsewhere {usual}", "Nodes of one job should be alike."), nodes)


def _in_common(notes: Sequence[Note]) -> Iterator[Line]:
    """What the processes have measured all together."""
    found = notes[0].measured
    if "bandwidth" in found:
        text = f"8 B in {found['latency']:.0f} µs; large ones at {found['bandwidth']:.0f} MB/s on each link of a ring"
        yield Line(ok("all-reduce", text), ())


def _slow(notes: Sequence[Note]) -> Iterator[Line]:
    advice = _AGAIN if len({note.host for note in notes}) >= _FEWEST else _UNDECIDED
    for name, words, unit in SPEEDS:
        speeds = {note.rank: speed for note in notes if (speed := _measured(note).get(name)) is not None}
        usual = median_high(speeds.values()) if speeds else 0.0
        slow = [note for note in notes if note.rank in speeds and speeds[note.rank] < _SLOW * usual]
        for host in dict.fromkeys(note.host for note in slow):
            ranks = [note.rank for note in slow if note.host == host]
            speed = min(speeds[rank] for rank in ranks)
            text = f"{words}: {speed:.3g} {unit} ({ranks_text(ranks)}); the median is {usual:.3g}"
            yield Line(warning("slow", text, advice), (host,))


def _clocks(notes: Sequence[Note]) -> Iterator[Line]:
    for note in {note.host: note for note in notes}.values():
        offset = note.measured.get("clock", 0.0)
        if abs(offset) > _CLOCKS_APART + note.measured.get("clock error", 0.0):
            text = f"its clock is {offset:+.1f} s from that of {notes[0].host}"
            yield Line(warning("clock", text, "Tell the administrators (NTP)."), (note.host,))


def _measured(note: Note) -> dict[str, float]:
    """What a process has measured, its checks included."""
    return {k: v for finding in note.findings for k, v in finding.measured.items()} | note.measured


def _table(notes: Sequence[Note]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for note in notes:
        row = table.setdefault(note.host, {"processes": 0.0})
        row["processes"] += 1
        for name, value in _measured(note).items():
            row[name] = value if name.startswith("clock") else min(value, row.get(name, value))
    return table


def not_shared(directory: Path, notes: Sequence[Note], seen: set[int]) -> list[Line]:
    """Whether the first process sees the files of the others; of nodes that cannot write there nobody knows."""
    closed = {note.host for note in notes if ("files", "failure") in {(one.about, one.level) for one in note.findings}}
    unseen = dict.fromkeys(note.host for note in notes if note.rank not in seen)
    nodes = tuple(host for host in unseen if host not in closed)
    if not nodes:
        return []
    all_others = {*nodes, notes[0].host} >= {note.host for note in notes}
    where = "everywhere" if all_others else "there"
    text = f"{directory} is another directory {where} than on {notes[0].host}"
    nodes = () if all_others else nodes
    return [Line(failure("shared", text, "Let runs live on a file system that all nodes share (HPCLR_RUNS)."), nodes)]


def absent(notes: Sequence[Note], size: int, nodes: Sequence[str]) -> list[Line]:
    """Processes that did not come, by the notes of those who did; and the nodes that they must be on.

    Args:
        notes: of those who came.
        size: how many there should be.
        nodes: the nodes of the job, if they are known.
    """
    missing = sorted(set(range(size)) - {note.rank for note in notes})
    silent = [note for note in notes if note.state == "checked"]
    return [
        *([_did_not_come(missing, size, _incomplete(notes, nodes))] if missing else []),
        *([_stuck(silent)] if silent else []),
    ]


def _incomplete(notes: Sequence[Note], nodes: Sequence[str]) -> tuple[str, ...]:
    """Nodes from which fewer notes came than processes were started there."""
    came = [note.host for note in notes]
    started = {note.host: note.local_size for note in notes}
    short = {host.partition(".")[0] for host in came}
    unheard = [node for node in nodes if node.partition(".")[0] not in short]
    return (*unheard, *(host for host, count in started.items() if came.count(host) < count))


def _did_not_come(missing: list[int], size: int, nodes: tuple[str, ...]) -> Line:
    where = "" if nodes else ", on nodes that nobody can name"
    return Line(
        failure(
            "meeting",
            f"{ranks_text(missing)} of {size} did not come{where}",
            "They were not started, hang, or do not see the directory of the others: look there with ps and df, and at "
            "what the launcher says; else leave the node out.",
        ),
        nodes,
    )


def _stuck(notes: Sequence[Note]) -> Line:
    nodes = tuple(dict.fromkeys(note.host for note in notes))
    text = f"{ranks_text([note.rank for note in notes])} came, but did not answer: it hangs, is slow or has died"
    return Line(failure("meeting", text, "Look on the node for what stops it, or leave it out."), nodes)


def failed(notes: Sequence[Note]) -> list[Line]:
    """Why processes gave up, each reason once."""
    reasons: dict[str, list[str]] = {}
    for note in notes:
        if note.error:
            reasons.setdefault(note.error, []).append(note.host)
    return [Line(failure("together", text, _TOGETHER), tuple(dict.fromkeys(hosts))) for text, hosts in reasons.items()]


_TOGETHER = (
    "See the lines above; a firewall between nodes, and the wrong interface, are usual causes (parallel.interface)."
)


# ---- for people


def counted(found: Report) -> str:
    """`4 processes of 2 nodes`."""
    nodes = len(found.nodes)
    return f"{found.processes} process{'es' * (found.processes > 1)} of {nodes} node{'s' * (nodes > 1)}"


def lines(found: Report) -> Iterator[str]:
    """The page."""
    for line in found.lines:
        finding, where = line.finding, _where(line, found.nodes)
        yield f"{finding.level:<8} {finding.about:<13} {where}{finding.text}"
        if finding.advice:
            yield f"{'':<8} {'':<13} → {finding.advice}"
    if any(len(row) > 1 for row in found.table.values()):
        yield ""
        yield from _columns(found.table)
    if words := found.exclusion():
        yield ""
        yield f"to leave out {_named(found.bad)}: {words}"


def _where(line: Line, nodes: Sequence[str]) -> str:
    if line.finding.level == "ok" or not line.nodes or set(line.nodes) == set(nodes) == {nodes[0]}:
        return ""
    return "all nodes: " if set(line.nodes) >= set(nodes) else f"{_named(line.nodes)}: "


def _named(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - _MOST_NAMED} more" if len(nodes) > _MOST_NAMED else ""
    return ", ".join(nodes[:_MOST_NAMED]) + more


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("processes", "processes", "{:.0f}".format),
    ("product", "GFLOP/s", "{:.1f}".format),
    ("pair", "exchange", "{:.0f}".format),
    ("run disk write", "runs write", "{:.0f}".format),
    ("run disk read", "read", "{:.0f}".format),
    ("own disk write", "TMPDIR write", "{:.0f}".format),
    ("own disk read", "read", "{:.0f}".format),
    ("clock", "clock ms", lambda seconds: f"{1e3 * seconds:+.1f}"),
)


def _columns(table: dict[str, dict[str, float]]) -> Iterator[str]:
    """Speeds in MB/s where nothing else is said; of a node's processes the slowest."""
    rows = [["node", *(heading for _, heading, _ in _COLUMNS)]]
    for node, row in table.items():
        rows.append([node, *(form(row[name]) if name in row else "–" for name, _, form in _COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        yield "  ".join([cells[0].ljust(widths[0]), *padded]).rstrip()
