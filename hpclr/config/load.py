"""Run files read from disk or text, and written back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpclr.config import overrides as _overrides
from hpclr.config import yaml12
from hpclr.config.check import check
from hpclr.config.describe import show
from hpclr.config.schema import RunFile
from hpclr.errors import UsageError


def load_run_file(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a run file.

    Args:
        path: The file.
        overrides: `section.key=value` each; the value is read as YAML.

    Raises:
        UsageError: The file cannot be read or it, or an override, is wrong; names every fault.
    """
    return parse_run_file(_text(path), str(path), overrides)


def parse_run_file(text: str, source: str, overrides: Sequence[str] = ()) -> RunFile:
    """Check the text of a run file; `source` is what messages call it.

    Raises:
        UsageError: It, or an override, is wrong; names every fault.
    """
    document = yaml12.read(text, source)
    if document.value is None:
        raise UsageError(f"{source} is empty; a run file has at least name, model, data, optimizer and train")
    if not isinstance(document.value, dict):
        raise UsageError(f"{source} must hold sections such as 'model:' and 'data:', found {show(document.value)}")
    return check(_overrides.apply(document, overrides))


def dump(run: RunFile) -> str:
    """A run file's text with every key spelt out; reading it gives an equal `RunFile`."""
    return yaml12.write(msgspec.to_builtins(run))


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(4 * yaml12.MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the run file {path}: {reason}") from None
    if len(content) > 4 * yaml12.MAX_TEXT:
        raise UsageError(f"{path} is too long for a run file: more than {4 * yaml12.MAX_TEXT} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        line, column = yaml12.line_and_column(before, len(before))
        raise UsageError(
            f"{path} line {line} column {column}: the byte 0x{content[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8"
        ) from None
