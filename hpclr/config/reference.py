"""The reference of the run file, written out from the schema.

`python -m hpclr.config.reference docs/run-file.md` renews the page below its marker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from msgspec.structs import FieldInfo

from hpclr.config import compare, describe
from hpclr.config.schema import RunFile

MARKER = "<!-- From here on this page is written by `python -m hpclr.config.reference docs/run-file.md`. -->"


def reference() -> str:
    """Every key of the run file with type, default and meaning, in Markdown."""
    return "\n".join([MARKER, "", *_run_file(), *_resuming()])


def renew(page: str) -> str:
    """The page with the part from the marker on renewed."""
    introduction, _, _ = page.partition(MARKER)
    return introduction + reference()


def _run_file() -> Iterator[str]:
    plain = [field for field in describe.fields(RunFile).values() if not describe.kinds(field.type)]
    yield from ["## Keys at the top", "", *_table(plain), ""]
    for name, field in describe.fields(RunFile).items():
        if describe.kinds(field.type):
            yield from _section(name, field)


def _section(name: str, field: FieldInfo) -> Iterator[str]:
    kinds = describe.kinds(field.type)
    below = "####" if len(kinds) > 1 else "###"
    yield from [f"## {name}", "", f"{describe.meaning(field.type)} {_need(field)}", ""]
    for kind in kinds:
        if len(kinds) > 1:
            yield from [f"### {name} with {_kind(kind)}", "", *_summary(kind)]
        yield from [*_table(describe.fields(kind).values()), ""]
        for key, inner in describe.fields(kind).items():
            for rule in describe.kinds(inner.type):
                yield from [f"{below} {name}.{key} with {_kind(rule)}", ""]
                yield from [*_summary(rule), *_table(describe.fields(rule).values()), ""]


def _need(field: FieldInfo) -> str:
    if field.required:
        return "This section must be there."
    kinds = describe.kinds(field.type)
    default = describe.tag(type(field.default))[1][0] if len(kinds) > 1 else ""
    return f"Without this section: `name: {default}`." if default else "May be left out."


def _kind(kind: describe.Kind) -> str:
    key, values = describe.tag(kind)
    return f"`{key}: {' | '.join(values)}`" if values else f"`{key}`"


def _summary(kind: describe.Kind) -> list[str]:
    return [str(kind.__doc__).strip(), ""]


def _table(fields: Iterable[FieldInfo]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for field in fields:
        cells = [f"`{field.name}`", describe.expected(field.type), _default(field), describe.meaning(field.type)]
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.required:
        return "must be given"
    if field.default is msgspec.NODEFAULT:
        return "empty"
    value = field.default
    return f"`{value if isinstance(value, str) else describe.show(value)}`"


def _resuming() -> Iterator[str]:
    yield from ["## What may change when a run is resumed", ""]
    yield "A run goes on with another value of these keys; a change of any other key is refused, with the list of"
    yield from ["differences.", "", "| key | why |", "|---|---|"]
    for key, why in {**compare.FREE, **compare.MOVING, **compare.GROWING}.items():
        yield f"| `{key}` | {why} |"
    yield ""


def main(path: Path) -> None:
    """Renew the page at `path`."""
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
