"""The schema of run files as a JSON schema, by which editors complete and check them.

`python -m hpclr.config.json_schema docs/run-file.schema.json` renews the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from hpclr.config import describe
from hpclr.config.schema import RunFile, Section
from hpclr.files import write_whole


def json_schema() -> dict[str, Any]:
    """The whole schema (JSON Schema, draft 2020-12).

    It tells the form of every key, not what fits together, as `hpclr` does. An editor that reads YAML 1.1 finds `1e-3`
    wrong, which to it is text.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hpclr run file",
        **_section(RunFile, among=1),
    }


def _section(kind: describe.Kind, among: int) -> dict[str, Any]:
    """One kind of a section; among several, the key that tells them apart must be there."""
    fields = describe.fields(kind)
    needed = [name for name, field in fields.items() if field.required]
    key = describe.tag(kind)[0]
    if among > 1 and key not in needed:
        needed.insert(0, key)
    return {
        "type": "object",
        "properties": {name: _key(field) for name, field in fields.items()},
        "required": needed,
        "additionalProperties": False,
        **_alternatives(kind),
    }


def _alternatives(kind: describe.Kind) -> dict[str, Any]:
    """That some keys must be there unless another is true."""
    unless = kind.needed_unless if issubclass(kind, Section) else {}
    either = [
        {"anyOf": [{"required": list(keys)}, {"properties": {switch: {"const": True}}, "required": [switch]}]}
        for switch, keys in unless.items()
    ]
    return {"allOf": either} if either else {}


def _key(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    kinds, plain = describe.kinds(field.type), describe.plain(field.type)
    found = [_section(kind, len(kinds)) for kind in kinds]
    if plain is not None:
        found.insert(0, msgspec.json.schema(plain))
    value = found[0] if len(found) == 1 else {"anyOf": found}
    described = value | {"description": describe.meaning(field.type)}
    if field.required or field.default is msgspec.NODEFAULT or isinstance(field.default, msgspec.Struct):
        return described
    return described | {"default": msgspec.to_builtins(field.default)}


def as_text() -> str:
    """The file's contents."""
    text = json.dumps(json_schema(), indent=1, ensure_ascii=False)
    return text.replace(r"\\Z", "$") + "\n"  # the end of a text in JavaScript, by whose expressions schemas go


def main(path: Path) -> None:
    """Renew the file at `path`."""
    write_whole(path, as_text().encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
