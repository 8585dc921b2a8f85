"""YAML 1.2 for run files: PyYAML's parser under the core schema, with the line of every key.

PyYAML by itself reads YAML 1.1, where `1e-3` is a string, `yes` a boolean and `12:30` a number.
Nothing but mappings with text keys, lists, text, numbers, booleans and null comes out, in bounded size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from hpclr.errors import UsageError

MAX_TEXT = 256 * 1024
MAX_VALUES = 10_000
MAX_DEPTH = 32
MAX_DIGITS = 64

Path = tuple[str | int, ...]

_PREFIX = "tag:yaml.org,2002:"
_TEXT, _LIST, _MAPPING = _PREFIX + "str", _PREFIX + "seq", _PREFIX + "map"
_CORE_SCHEMA = {
    _PREFIX + tag: re.compile(pattern)
    for tag, pattern in {
        "null": r"null|Null|NULL|~|",
        "bool": r"true|True|TRUE|false|False|FALSE",
        "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    }.items()
}
_VALUE: dict[str, Callable[[str], Any]] = {
    _PREFIX + "null": lambda text: None,
    _PREFIX + "bool": lambda text: text.lower() == "true",
    _PREFIX + "int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    _PREFIX + "float": lambda text: float(re.sub(r"\.(?=[ina])", "", text.lower())),
    _TEXT: str,
}


@dataclass(frozen=True)
class Document:
    """A YAML document and where its parts stand.

    Attributes:
        value: What the document holds.
        places: The place of the key at each path, in words, such as "run.yaml line 7".
        source: What the document is called in messages.
    """

    value: Any
    places: dict[Path, str]
    source: str

    def place(self, path: Path) -> str:
        """The place of the key at `path`, or of the nearest section around it that stands somewhere."""
        ends = range(len(path), 0, -1)
        return next((self.places[path[:end]] for end in ends if path[:end] in self.places), self.source)


def read(text: str, source: str) -> Document:
    """Read one YAML document.

    Raises:
        UsageError: It is no YAML, repeats a key, is too large, or holds what a run file cannot hold.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"{source} is too long for a run file: {len(text)} characters, at most {MAX_TEXT}")
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        _refuse(source, error.problem_mark or error.context_mark, _why(error))
    except yaml.reader.ReaderError as error:
        line, column = line_and_column(text, int(error.position))
        raise UsageError(
            f"{source} line {line} column {column}: the character U+{int(error.character):04X} "
            "cannot stand in YAML; remove it"
        ) from None
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{source} cannot be read as YAML: {error}") from None
    builder = _Builder(source)
    value = None if node is None else builder.value(node, ())
    return Document(value, builder.places, source)


def write(value: Any) -> str:
    """Text that `read` turns back into `value`, and that readers of YAML 1.1 understand alike."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def line_and_column(text: str, position: int) -> tuple[int, int]:
    """Line and column, both from 1, of the character at `position`."""
    before = text[:position]
    return before.count("\n") + 1, position - before.rfind("\n")


def _core_tag(text: str) -> str | None:
    return next((tag for tag, pattern in _CORE_SCHEMA.items() if pattern.fullmatch(text)), None)


def _why(error: yaml.MarkedYAMLError) -> str:
    if "\\t" in str(error.problem):
        return "a tab; YAML is indented with spaces"
    return "cannot be read as YAML: " + ", ".join(str(part) for part in (error.context, error.problem) if part)


def _refuse(source: str, mark: yaml.Mark | None, why: str) -> NoReturn:
    place = source if mark is None else f"{source} line {mark.line + 1} column {mark.column + 1}"
    raise UsageError(f"{place}: {why}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the core schema's plain scalars and a limit on nesting."""

    depth = 0

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return (implicit[0] and _core_tag(value)) or _TEXT
        return str(super().resolve(kind, value, implicit))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which quotes whatever YAML 1.1 or 1.2 would not read as text."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        core = kind is yaml.ScalarNode and implicit[0] and _core_tag(value)
        return str(core or super().resolve(kind, value, implicit))

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def write_text(self, data: str) -> yaml.Node:
        # Plain text would lose these line breaks on the way back; escapes keep them.
        return self.represent_scalar(_TEXT, data, style='"' if re.search("[\r\x85\u2028\u2029]", data) else None)

    def write_list(self, data: Any) -> yaml.Node:
        return self.represent_sequence(_LIST, data, flow_style=True)


_Dumper.add_representer(str, _Dumper.write_text)
_Dumper.add_representer(list, _Dumper.write_list)


class _Builder:
    """Turns parsed nodes into values, noting the place of every key."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.places: dict[Path, str] = {}
        self.count = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:  # aliases repeat what they stand for
            limits = f"{MAX_VALUES} values, nested {MAX_DEPTH} deep"
            _refuse(self.source, node.start_mark, f"a run file holds at most {limits}; this one holds more")
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _VALUE:
            return self.scalar(node)
        tag = node.tag.replace(_PREFIX, "!!")
        _refuse(self.source, node.start_mark, f"the tag {tag!r} cannot be used in a run file; remove it")

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.key(key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                dotted = ".".join(map(str, (*path, key)))
                first = f"first on line {lines[key]}"
                raise UsageError(f"{self.source} line {line}: the key {dotted} is given twice ({first})")
            lines[key] = line
            self.places[(*path, key)] = f"{self.source} line {line}"
            found[key] = self.value(value_node, (*path, key))
        return found

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != _TEXT:
            what = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
            why = f"a key must be text, found {what}; put it in quotes"
            _refuse(self.source, node.start_mark, why)
        return str(self.scalar(node))

    def scalar(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        if node.tag != _TEXT and not _CORE_SCHEMA[node.tag].fullmatch(text):
            kind = node.tag.removeprefix(_PREFIX)
            _refuse(self.source, node.start_mark, f"{text!r} cannot be read as {kind}")
        if re.search("[\0\ud800-\udfff]", text):
            _refuse(self.source, node.start_mark, f"{text!r} holds a character that no text can hold")
        if node.tag == _PREFIX + "int" and len(text) > MAX_DIGITS:  # Python cannot print some of these
            _refuse(self.source, node.start_mark, f"a number of {len(text)} digits is too large")
        return _VALUE[node.tag](text)
