"""`hpclr verify`: whether checkpoints are what they say, and whether what they say makes sense together."""

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import msgspec

from hpclr.checkpoint.digest import sidecar_of
from hpclr.checkpoint.sandbox import Item, Survey, examine
from hpclr.checkpoint.store import CheckpointStore
from hpclr.config import parse_run_file
from hpclr.errors import UsageError
from hpclr.lowrank.adapters import AdaptedWeight, adapter_names, check_adapters, looks_adapted, rank_stored
from hpclr.lowrank.interchange import fits
from hpclr.training.run_directory import reading

T = TypeVar("T")
Shape = tuple[int, ...]
Progress = Callable[[int, int], None]

_STATE_OF_A_RUN = {"method", "optimizer", "position", "run", "sampler"}
_NAME = re.compile(r"step-(\d+)\.h5")
_NAME_OR_SIDECAR = re.compile(_NAME.pattern + r"(\.sha256)?")
_DELETION_SECONDS = 1.0  # between a checkpoint's data and its digest; really some milliseconds
_BASIS = "ortho_matrix"  # GaLore's, into whose directions the other state of a parameter is projected
_OF_OTHER_SHAPES = ("row_var", "col_var", _BASIS)  # Adafactor's and GaLore's, to be smaller than the parameter
_MOST_NAMED = 3
_MOST_OF_A_REASON = 4096  # bytes


@dataclass(frozen=True)
class Verdict:
    """What was found out about one file.

    Attributes:
        path: the file.
        survey: what is in it; None if it is not even in order, or was deleted meanwhile.
        faults: why it is not good; none if it is.
        notes: what else a reader should know.
    """

    path: Path
    survey: Survey | None
    faults: list[str]
    notes: list[str]

    def __str__(self) -> str:
        """One line."""
        notes = f" ({'; '.join(self.notes)})" if self.notes else ""
        if self.survey is None and not self.faults:
            return f"{self.path}: was deleted meanwhile"
        if self.faults or self.survey is None:
            return f"{self.path}: not good: {'; '.join(self.faults)}{notes}"
        tensors = sum(item.kind == "tensor" for item in self.survey.entries)
        size = f"{self.survey.bytes / 1e6:,.1f} MB"
        return f"{self.path}: good, {tensors:,} tensors, {size}, sha256 {self.survey.sha256[:12]}…{notes}"


def verify_file(path: Path, *, without_digest: bool = False, progress: Progress | None = None) -> Verdict:
    """Looks at all of one checkpoint, in a process of its own with little time and memory; imports nothing it names.

    Args:
        path: the file.
        without_digest: do not ask for its sidecar.
        progress: called now and then with the number of bytes done and in all.
    """
    try:
        with reading(path):
            survey = examine(path, without_digest=without_digest, progress=progress)
    except UsageError as error:
        fault = _missing_data(path) if not os.path.exists(path) else str(error).removeprefix(f"{path}: ")
        return Verdict(path, None, [fault] if fault else [], [])
    return Verdict(path, survey, *_judge(path, survey))


def _missing_data(path: Path) -> str:
    """Training goes on meanwhile, keeps only the newest, and deletes a checkpoint's data first, then its digest."""
    if sidecar_of(path).exists():
        time.sleep(_DELETION_SECONDS)
    found = f"its data is missing, only {sidecar_of(path).name} is there: fetch it again, or delete that"
    return found if sidecar_of(path).exists() and not path.exists() else ""


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoints that a path means: itself, or all of a run directory, oldest first.

    Those without their data or without their digest are among them, but for one that may be about to be committed.

    Raises:
        UsageError: there is none, or it cannot be looked at.
    """
    with reading(path):
        if path.exists() and not path.is_dir():
            return [path]
        store = store_of(path)
        if store is None:
            raise UsageError(f"{path}: no such checkpoint file or run directory")
        listed = {_NAME_OR_SIDECAR.fullmatch(entry.name) for entry in store.directory.iterdir()}
        steps = {int(match[1]) for match in listed if match}
        steps.discard(_uncommitted(store))
    if not steps:
        raise UsageError(f"{store.directory} holds no checkpoint. Name a run that has saved one.")
    return [store.path(step) for step in sorted(steps)]


def _uncommitted(store: CheckpointStore) -> int:
    """The step of the newest data file, if it has no digest; -1 if it has."""
    found = [int(match[1]) for entry in store.directory.iterdir() if (match := _NAME.fullmatch(entry.name))]
    newest = max(found, default=-1)
    return -1 if sidecar_of(store.path(newest)).exists() else newest


def store_of(path: Path) -> CheckpointStore | None:
    """The checkpoints of a run directory; None if it is no directory."""
    with reading(path):
        directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        return CheckpointStore(directory) if directory.is_dir() else None


def remarks_on(store: CheckpointStore, verdicts: list[Verdict]) -> Iterator[str]:
    """What else there is to say about a run's checkpoints: set aside and why, not committed, the best one."""
    with reading(store.directory):
        yield from _remarks_on(store, verdicts)


def _remarks_on(store: CheckpointStore, verdicts: list[Verdict]) -> Iterator[str]:
    newest = store.path(_uncommitted(store))
    if newest.exists() and newest not in [verdict.path for verdict in verdicts]:
        yield f"{newest}: not committed (yet): it has no {sidecar_of(newest).name}; the next start sets it aside"
    for reason in filter(Path.is_file, sorted(store.directory.glob("*.bad*.reason"))):
        with reason.open("rb") as file:
            text = file.read(_MOST_OF_A_REASON).decode(errors="replace").strip()
        yield f"{reason.with_suffix('')}: set aside: {text}"
    if (store.directory / "best.json").is_file():
        best = store.best()
        good = [verdict.path for verdict in verdicts if not verdict.faults]
        found = "names no checkpoint that is there" if best is None else f"the best checkpoint is {best.name}"
        yield f"{store.directory / 'best.json'}: {found}{'' if best is None or best in good else ', which is not good'}"


# The meaning of what a file holds


class _Layer(msgspec.Struct, frozen=True):
    weight: str
    factors: tuple[str, str, str]
    shape: Shape | None = None
    transposed: bool = False
    spatial: bool = False


class _Step(msgspec.Struct):
    step: int


class _RunText(msgspec.Struct):
    yaml: str


class _MethodState(msgspec.Struct):
    ranks: dict[str, int] | None = None


class _Method(msgspec.Struct):
    state: _MethodState


class _ParameterGroup(msgspec.Struct):
    params: list[str]


class _Facts:
    """A survey by the parts of a training run's state."""

    def __init__(self, path: Path, survey: Survey) -> None:
        self.path, self.survey = path, survey
        self.tensors: dict[tuple[str, ...], Item] = {i.path: i for i in survey.entries if i.kind == "tensor"}
        self.parts = {item.path[0] for item in survey.entries}
        self.model: dict[str, Shape] = {p[1]: i.shape for p, i in self.tensors.items() if p[0] == "model" and p[1:]}
        self._texts = dict(survey.json)

    def value(self, kind: type[T], *path: str) -> T | None:
        """A JSON value, which must be of this type; None if there is none."""
        try:
            return msgspec.json.decode(self._texts[path], type=kind) if path in self._texts else None
        except msgspec.MsgspecError as error:
            raise UsageError(f"{'/'.join(path)} is not what `hpclr train` writes: {error}") from error

    def below(self, *prefix: str) -> Iterator[tuple[tuple[str, ...], Item]]:
        """The tensors in a group, by the rest of their paths."""
        count = len(prefix)
        return ((path[count:], item) for path, item in self.tensors.items() if path[:count] == prefix)

    @cached_property
    def layers(self) -> dict[str, _Layer]:
        """The low-rank layers by name; files without a list of them tell by the names of their tensors."""
        listed = self.value(dict[str, _Layer], "layers")
        return self._layers_by_names() if listed is None else listed

    @cached_property
    def adapters(self) -> dict[str, AdaptedWeight]:
        """The layers with adapters by name."""
        return self.value(dict[str, AdaptedWeight], "adapters") or {}

    @cached_property
    def undescribed(self) -> list[str]:
        """Parameters of adapters, by their names, of which it is not said what they adapt."""
        known = set(adapter_names(self.adapters))
        return [name for name in looks_adapted(self.model) if name not in known]

    def _layers_by_names(self) -> dict[str, _Layer]:
        named = [match for name in self.model if (match := re.fullmatch(r"((?:.*[._])?)(?:sigma|s)", name))]
        whole = {match[1]: match[0] for match in named if {match[1] + "u", match[1] + "vh"} <= self.model.keys()}
        return {stem.rstrip("._"): _Layer(stem + "weight", (stem + "u", s, stem + "vh")) for stem, s in whole.items()}

    @cached_property
    def ranks(self) -> dict[str, int] | None:
        """The ranks that the method remembers, if it is one that does."""
        whole = self.value(_Method, "method")
        return whole.state.ranks if whole else self.value(dict[str, int], "method", "state", "ranks")

    @cached_property
    def trained(self) -> list[str]:
        """The parameters that the optimiser has."""
        groups = self.value(list[_ParameterGroup], "optimizer", "groups") or []
        return [name for group in groups for name in group.params]

    @cached_property
    def is_run(self) -> bool:
        """Whether it is the state of a run rather than its weights alone."""
        return bool(_STATE_OF_A_RUN & self.parts)


def _judge(path: Path, survey: Survey) -> tuple[list[str], list[str]]:
    """Faults and notes."""
    facts = _Facts(path, survey)
    if "model" not in facts.parts:
        return [], ["not written by `hpclr train`, it has no model: judged by its structure alone"]
    faults: list[str] = []
    for check in (_missing, _steps, _factors, _adapters, _ranks, _optimizer, _averages, _not_finite, _run_file):
        try:
            faults += check(facts)
        except UsageError as error:
            faults.append(str(error))
    return list(dict.fromkeys(faults)), [] if faults else _notes(facts)


def _missing(facts: _Facts) -> Iterator[str]:
    missing = _STATE_OF_A_RUN - facts.parts
    if facts.is_run and missing:
        yield f"expected the state of a run, found no {', '.join(sorted(missing))}"


def _steps(facts: _Facts) -> Iterator[str]:
    """The file, its name, the run and the sampler must be at one step."""
    name = _NAME.fullmatch(facts.path.name)
    found = {"its name": int(name[1]) if name else None}
    for part in ("position", "sampler"):
        value = facts.value(_Step, part)
        found[part] = value.step if value else None
    for what, step in found.items():
        if step is not None and step != facts.survey.step:
            yield f"expected step {facts.survey.step} everywhere, as the file's attribute says, found {step} in {what}"


def _factors(facts: _Facts) -> Iterator[str]:
    for name, layer in facts.layers.items():
        shapes = [facts.model.get(key) for key in layer.factors]
        if not _fit(shapes, layer):
            of = f" that make up {'the transpose of ' * layer.transposed}{layer.shape}" if layer.shape else ""
            yield f"layer {name!r}: expected factors m×k, k×k or k, k×n{of}, found {', '.join(map(str, shapes))}"
        if layer.weight in facts.model:
            yield f"layer {name!r}: expected factors in place of {layer.weight}, found both"


def _fit(shapes: list[Shape | None], layer: _Layer) -> bool:
    """Whether these are U, Σ and Vᵀ, of one rank, of this weight."""
    u, core, vh = shapes
    if u is None or vh is None or len(u) != 2 or len(vh) != 2:
        return False
    (m, k), (rank, n) = u, vh
    if core not in ((k, k), (k,)) or rank != k:
        return False
    return layer.shape is None or fits(layer.shape, (m, n), transposed=layer.transposed, spatial=layer.spatial)


def _adapters(facts: _Facts) -> Iterator[str]:
    if facts.undescribed:
        yield f"expected a description of every adapter in 'adapters', found none of {_named(facts.undescribed)}"
    if facts.adapters:
        import torch

        try:
            check_adapters(
                {name: torch.empty(shape, device="meta") for name, shape in facts.model.items()}, facts.adapters
            )
        except ValueError as error:
            yield str(error)


def _ranks(facts: _Facts) -> Iterator[str]:
    """The method must remember exactly the layers that are there, each with its rank."""
    if facts.ranks is None or facts.undescribed:
        return
    tied = facts.value(dict[str, str], "tied") or {}
    by_sigma: dict[str, str] = {}  # several layers may share one; the method names one of them
    for name, layer in facts.layers.items():
        first = tied.get(layer.factors[1], layer.factors[1])
        by_sigma[first] = name if name in facts.ranks else by_sigma.get(first, name)
    sigmas = {name: sigma for sigma, name in by_sigma.items()}
    found: dict[str, tuple[int | None, ...]]
    found = {name: facts.model.get(sigma, ())[:1] for name, sigma in sigmas.items()}
    found |= {name: (rank_stored(entry, facts.model),) for name, entry in facts.adapters.items()}
    unnamed = facts.ranks.keys() - found.keys()
    if "" in found and len(unnamed) == 1:  # the model is itself a layer, and goes by the name of its class
        found[unnamed.pop()] = found.pop("")
    for name in sorted(facts.ranks.keys() | found.keys()):
        expected, rank = facts.ranks.get(name), found.get(name)
        if rank != (expected,):
            said = f"rank {expected}" if expected else "no rank"
            yield f"layer {name!r}: expected {said}, as the method says, found {rank[0] if rank else 'no factors'}"


def _optimizer(facts: _Facts) -> Iterator[str]:
    """What the optimiser remembers of a parameter has the parameter's shape, counts aside."""
    for name in facts.trained:
        if name not in facts.model:
            yield f"optimizer: expected the parameter {name!r} in the model, found none"
    state = list(facts.below("optimizer", "state"))
    bases = {path[0]: item.shape for path, item in state if path[-1] == _BASIS}
    for path, item in state:
        if not item.shape or path[-1] in _OF_OTHER_SHAPES:
            continue
        if path[0] not in bases:
            yield from _differs(f"optimizer, {path[-1]} of", path[0], item.shape, facts)
        elif not _is_projected(item.shape, bases[path[0]], facts.model.get(path[0], ())):
            basis = f"projected by {bases[path[0]]}"
            yield f"optimizer, {path[-1]} of {path[0]!r}: expected a shape {basis}, found {item.shape}"


def _is_projected(found: Shape, basis: Shape, whole: Shape) -> bool:
    """Whether moments are of a gradient (m×n) on one side of a basis of GaLore's: (r, n) for m×r, (m, r) for r×n."""
    if len(basis) != 2 or len(whole) != 2:
        return False
    (m, n), (a, b) = whole, basis
    return (a == m and found == (b, n)) or (b == n and found == (m, a))


def _averages(facts: _Facts) -> Iterator[str]:
    for path, item in facts.below("ema", "averages"):
        yield from _differs("average of", path[0], item.shape, facts)


def _differs(what: str, name: str, found: Shape, facts: _Facts) -> Iterator[str]:
    expected = facts.model.get(name)
    if found != expected:
        yield f"{what} {name!r}: expected the parameter's shape {expected or 'nothing'}, found {found}"


def _not_finite(facts: _Facts) -> Iterator[str]:
    """Weights, moments and averages are numbers; a buffer may be a mask of -inf."""
    weights = {*facts.trained, *(key for layer in facts.layers.values() for key in layer.factors)}
    weights |= {key for entry in facts.adapters.values() for key in (entry.weight, *entry.parts.values())}
    bad = [
        "/".join(path)
        for path, item in facts.tensors.items()
        if not item.finite and (path[0] in ("optimizer", "ema") or (path[0] == "model" and path[1] in weights))
    ]
    if bad:
        yield f"expected finite numbers, found NaN or infinity in {_named(bad)}"


def _run_file(facts: _Facts) -> Iterator[str]:
    run = facts.value(_RunText, "run")
    if run is not None:
        parse_run_file(run.yaml, "its run file")
    yield from ()


def _notes(facts: _Facts) -> list[str]:
    bad = ["/".join(path) for path, item in facts.tensors.items() if not item.finite]
    notes = [f"NaN or infinity in {_named(bad)}, which no optimiser trains"] if bad else []
    return notes if facts.is_run else ["weights alone, not the state of a run", *notes]


def _named(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
