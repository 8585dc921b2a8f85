"""The path of ranks of an earlier run, from the check records of its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from hpclr.config import RunFile, load_run_file
from hpclr.errors import UsageError
from hpclr.files import open_regular
from hpclr.planning.forms import Layer
from hpclr.planning.ranks import Path as RankPath
from hpclr.planning.ranks import Stage, merged


class _Record(msgspec.Struct):
    """What is wanted of a record."""

    kind: str
    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    ranks: dict[str, int] | None = None
    frozen: dict[str, bool] | None = None
    rank_share: float | None = None


def path_like(directory: Path, run: RunFile, layers: Sequence[Layer], steps: int) -> RankPath:
    """The ranks of a run of the same model, layer by layer; of another model, their mean share of full rank.

    Steps are stretched where that run was longer or shorter.

    Raises:
        UsageError: if there is no such run, or no check in it.
    """
    records = _records(directory / "metrics.jsonl")
    checks = [record for record in records if record.kind == "check" and record.ranks is not None]
    if not checks:
        raise UsageError(f"--like {directory}: its metrics.jsonl has no check, so no path of ranks; name another run")
    length = max(record.step for record in records)
    same = load_run_file(directory / "run.yaml").model == run.model
    stages, begin = [], 0
    ranks: dict[str, int] = {}
    for record in checks:
        first = min(steps, round(record.step / length * steps)) if length else 0
        if first > begin:
            stages.append(Stage(begin, first, ranks))
        begin, ranks = first, _ranks(record, layers, same=same)
    if begin < steps:
        stages.append(Stage(begin, steps, ranks))
    whose = "its own ranks, layer by layer" if same else "the mean share of full rank of another model, for all layers"
    text = f"as in {directory}, {length:,} steps: {whose}"
    moments = tuple(min(steps - 1, round(record.step / length * steps)) for record in checks) if length else ()
    return RankPath(merged(stages), moments, False, text)


def _ranks(record: _Record, layers: Sequence[Layer], *, same: bool) -> dict[str, int]:
    found = record.ranks or {}
    if not same:
        share = record.rank_share
        return {} if share is None else {layer.name: max(1, round(min(1.0, share) * layer.full)) for layer in layers}
    ranks = {layer.name: max(1, min(layer.full, found[layer.name])) for layer in layers if layer.name in found}
    full = {layer.name: layer.full for layer in layers}
    converted = {name: rank < full[name] for name, rank in ranks.items()} | (record.frozen or {})
    return {name: rank for name, rank in ranks.items() if converted[name]}


def _records(path: Path) -> list[_Record]:
    """All but a last line that is just being written."""
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UsageError(
            f"--like: cannot read {path}: {error.strerror}; name the directory of a run, with its metrics.jsonl"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(msgspec.json.decode(line, type=_Record))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            if number < len(lines):
                raise UsageError(f"--like: line {number} of {path} is no record: {error}") from None
    return records
