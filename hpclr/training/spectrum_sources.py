"""Where `hpclr spectrum` finds weights: in a model that is built, or in a file of weights alone."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import structs
from torch import Tensor, nn

from hpclr.config import RunFile, load_run_file, parse_run_file, yaml12
from hpclr.config.overrides import parse as parse_override
from hpclr.config.schema import Target
from hpclr.config.schema.types import FactoryName
from hpclr.data import Dataset, open_dataset
from hpclr.errors import UsageError, usage_errors
from hpclr.lowrank import RankRule, WeightSite, load_state_dict, rank_rule, select
from hpclr.lowrank.factors import FactorizationError
from hpclr.lowrank.product import Factors
from hpclr.lowrank.regression import decompose_in
from hpclr.lowrank.spectra import core_of, singular_values
from hpclr.training.assembly import data_files, plain_batches
from hpclr.training.environment import choose_device
from hpclr.training.evaluation import load_checkpoint, load_run, malformed_named, subject_of
from hpclr.training.informed import Sample, sample_of, start
from hpclr.training.inspection import factored_layers
from hpclr.training.model import build_model, import_target
from hpclr.training.precision import Precision
from hpclr.training.run_directory import reading
from hpclr.training.spectrum_data import Asked, Judged, LinearView, judge, labelled_sample
from hpclr.training.state import from_tree
from hpclr.training.stored_weights import place_of, stored_weights
from hpclr.training.tasks import task_of
from hpclr.training.weights import read_stored

_HDF5 = b"\x89HDF\r\n\x1a\n"
_RUN_FILES = (".yaml", ".yml")
_SCALES = ("_scale", "_scale_inv")  # by which files call what eight-bit weights are to be multiplied with
_NO_DATA = Asked()
_CHOICES = ("include", "exclude", "max_aspect", "keep_first", "keep_last", "tied")


@dataclass(frozen=True)
class Weight:
    """One weight that is, or may become, low-rank.

    Attributes:
        name: of its layer.
        shape: (m, n) as a matrix.
        factored: whether it is held as factors.
        values: computes its singular values, descending, float64, on the host.
        seen: those of W C^½, of the second moment C of its inputs; None where no data is given, or reaches it.
    """

    name: str
    shape: tuple[int, int]
    factored: bool
    values: Callable[[], Tensor]
    seen: Callable[[], Tensor] | None = None

    @property
    def cost(self) -> int:
        """About how many operations its singular values take."""
        m, n = self.shape
        return m * n * min(m, n)


@dataclass(frozen=True)
class Subject:
    """What is to be looked at.

    Attributes:
        source: what the user called it.
        weights: in the model's order.
        left_alone: layer → why it stays dense.
        rules: by which its own run file judges.
        views: what linear maps make of the data, if there is any.
    """

    source: str
    weights: Sequence[Weight]
    left_alone: Mapping[str, str]
    rules: Sequence[RankRule] = ()
    views: Sequence[LinearView] = ()


def find_subject(
    source: str,
    settings: Sequence[str] = (),
    *,
    layers: Sequence[str] = (),
    best: bool = False,
    untrusted: bool = False,
    asked: Asked = _NO_DATA,
) -> Subject:
    """The weights that a word of the user's means.

    Args:
        source: `package.module:factory`, which is imported and called; a run file, whose model is built; a checkpoint,
            a run directory or a file of weights, of which nothing is imported.
        settings: `key=value`: arguments of the factory, or overrides of the run file.
        layers: patterns of layer names; none: all.
        best: of a run directory, the best checkpoint on validation instead of the newest.
        untrusted: as `load_checkpoint`.
        asked: data to judge by; then the model of a checkpoint is built, too.

    Raises:
        UsageError: if there is no such thing, it cannot be used, or a pattern matches no layer of it.
    """
    path = Path(source)
    with reading(path):
        is_there, is_directory = path.exists(), path.is_dir()
    if best and not is_directory:
        raise UsageError(
            f"{source} is no run directory: --best chooses among the checkpoints of one; leave it out, or name the "
            "directory, such as runs/digits"
        )
    if not is_there:
        found = _of_factory(source, settings, asked)
    elif path.suffix in _RUN_FILES:
        found = _of_run_file(path, settings, asked)
    elif settings:
        raise UsageError(
            f"{source} holds weights, which take no settings, found {settings[0]!r}: settings are for a run file or "
            "for package.module:factory"
        )
    else:
        found = _of_weights(path, best, untrusted, asked)
    return _limited(found, layers)


def _limited(subject: Subject, patterns: Sequence[str]) -> Subject:
    names = [*(weight.name for weight in subject.weights), *subject.left_alone]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
            raise UsageError(f"--layers '{pattern}' matches no layer of {subject.source}; its layers are {known}")

    def wanted(name: str) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    return replace(
        subject,
        weights=[weight for weight in subject.weights if wanted(weight.name)],
        views=[view for view in subject.views if view.name not in names or wanted(view.name)],
        left_alone={name: why for name, why in subject.left_alone.items() if wanted(name)},
    )


# --- models that are built -------------------------------------------------------------------------------------------


def _of_factory(source: str, settings: Sequence[str], asked: Asked) -> Subject:
    try:
        name: str = msgspec.convert(source, FactoryName)
    except msgspec.ValidationError:
        raise UsageError(
            f"{source}: expected package.module:factory, a run file (.yaml), a checkpoint, a run directory, or a file "
            "of weights (.safetensors, .pt); there is no file or directory of that name"
        ) from None
    arguments: dict[str, Any] = {}
    for setting in settings:
        given = parse_override(setting)
        arguments[".".join(given.path)] = given.document.value
    model = import_target(Target(target=name, args=arguments))
    if asked.data is None:
        return _of_model(source, model)
    precision = Precision("float32", choose_device("auto"))
    return _of_model(source, model.to(precision.device), (labelled_sample(source, asked), precision))


def _of_run_file(path: Path, overrides: Sequence[str], asked: Asked) -> Subject:
    run = load_run_file(path, overrides)
    if asked.data is not None:
        run = structs.replace(run, data=structs.replace(run.data, path=str(asked.data)))
    needs_data = asked.data is not None or run.model.init is not None or not isinstance(run.model, Target)
    dataset = open_dataset(data_files(run)) if needs_data else None
    model = build_model(run, None if dataset is None else task_of(run, dataset).samples(run.data, dataset))
    sample = None
    if dataset is not None and (asked.data is not None or run.model.init is not None):
        model, sample = _with_samples(run, model, dataset, asked)
    choices = {key: getattr(run.method, key) for key in _CHOICES if hasattr(run.method, key)}
    with usage_errors("method"):
        return _of_model(str(path), model, sample, rules=_rules_of(run), **choices)


def _with_samples(
    run: RunFile, model: nn.Module, dataset: Dataset, asked: Asked
) -> tuple[nn.Module, tuple[Sample, Precision] | None]:
    """The model as the run starts with it, and what to judge it by, if that is asked for."""
    precision = Precision(run.train.precision, choose_device(run.train.device))
    model, batches = model.to(precision.device, precision.dtype), plain_batches(run, dataset, precision.dtype)
    if run.model.init is not None:
        start(run, model, sample_of(run, batches))
    return model, None if asked.data is None else (Sample(batches, asked.samples), precision)


def _rules_of(run: RunFile) -> list[RankRule]:
    cutoff = getattr(run.method, "cutoff", None)
    return [] if cutoff is None else [rank_rule(msgspec.to_builtins(cutoff))]


def _of_model(
    source: str,
    model: nn.Module,
    sample: tuple[Sample, Precision] | None = None,
    *,
    rules: Sequence[RankRule] = (),
    **choices: Any,
) -> Subject:
    selection = select(model, **choices)
    judged = Judged({}, ()) if sample is None else judge(source, model, selection.eligible, *sample)
    weights = [
        Weight(site.name, site.shape, site.is_lowrank, _values_of(site), _seen_of(site, judged.moments.get(site.name)))
        for site in selection.eligible
    ]
    return Subject(source, weights, selection.left_alone, rules, judged.views)


def _seen_of(site: WeightSite, moment: Tensor | None) -> Callable[[], Tensor] | None:
    if moment is None:
        return None
    return lambda: decompose_in(_matrix_of(site), moment).s.cpu()


def _matrix_of(site: WeightSite) -> Tensor:
    if not site.is_lowrank:
        return _widened(site.core())
    u, core, vh = map(_widened, site.factors)
    return (u * core) @ vh if core.ndim == 1 else u @ core @ vh


def _values_of(site: WeightSite) -> Callable[[], Tensor]:
    return lambda: _values_of_factors(*site.factors) if site.is_lowrank else _values_of_matrix(site.core())


def _values_of_matrix(matrix: Tensor) -> Tensor:
    return singular_values(_widened(matrix))


def _values_of_factors(*factors: Tensor) -> Tensor:
    return singular_values(core_of(*map(_widened, factors)))


def _widened(tensor: Tensor) -> Tensor:
    """Numbers of eight bits, with which torch does not compute, in float32."""
    if tensor.dtype.itemsize > 1:
        return tensor
    try:
        return tensor.float()
    except NotImplementedError:
        raise FactorizationError(f"its numbers are {_name_of(tensor.dtype)}, which torch cannot convert") from None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- weights alone ---------------------------------------------------------------------------------------------------


def _of_weights(path: Path, best: bool, untrusted: bool, asked: Asked) -> Subject:
    with reading(path):
        is_checkpoint = path.is_dir() or (path.is_file() and _starts_as_hdf5(path))
    if asked.data is not None:
        return _of_checkpoint(path, best, untrusted, asked, is_checkpoint=is_checkpoint)
    if not is_checkpoint:
        return _of_state(str(path), read_stored(path, str(path)).state)
    loaded = load_checkpoint(path, best=best, untrusted=untrusted)
    with malformed_named(loaded.path):
        state = stored_weights(loaded.tree, loaded.path).state
        described = loaded.tree.get("run")
        rules = [] if described is None else _rules_of(parse_run_file(from_tree(described)["yaml"], str(loaded.path)))
    return replace(_of_state(str(loaded.path), state), rules=rules)


def _of_checkpoint(path: Path, best: bool, untrusted: bool, asked: Asked, *, is_checkpoint: bool) -> Subject:
    """Of a model that is built, since data is to go through it."""
    if not is_checkpoint:
        raise UsageError(
            f"{path} holds weights and no model that --data could go through; name a checkpoint or a run directory of "
            "hpclr, or a run file with this file as model.weights"
        )
    loaded, run = load_run(path, best=best, untrusted=untrusted)
    scored = subject_of(loaded, run, split="train", data=asked.data, trust=asked.trust)
    with malformed_named(loaded.path):
        load_state_dict(scored.model, stored_weights(loaded.tree, loaded.path).state)
    sample = Sample(plain_batches(run, scored.dataset, scored.precision.dtype), asked.samples)
    return _of_model(str(loaded.path), scored.model, (sample, scored.precision), rules=_rules_of(run))


def _starts_as_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_HDF5)) == _HDF5


def _of_state(source: str, state: Mapping[str, Tensor]) -> Subject:
    """Of a state dict only names and shapes say what is a layer's weight."""
    factored = {name: factors for name, factors in factored_layers(state) if _fit(*factors)}
    weights, left_alone = list[Weight](), dict[str, str]()
    known: dict[tuple[int, torch.Size], str] = {}
    for name, factors in factored.items():
        if why := _why_the_same(name, factors.sigma, known):
            left_alone[name] = why
        else:
            weights.append(_factored(name, factors))
    inside = {id(factor) for factors in factored.values() for factor in factors}
    for key, tensor in state.items():
        if id(tensor) in inside:
            continue
        why = _why_no_weight(key, tensor) or _why_scaled(key, tensor, state) or _why_the_same(key, tensor, known)
        if why is None:
            weights.append(_dense(_layer(key), tensor))
        else:
            left_alone[key] = why
    return Subject(source, _in_order(weights, state), left_alone)


def _layer(key: str) -> str:
    return re.sub(r"[._]weight$", "", key) or key


def _in_order(weights: Iterable[Weight], state: Mapping[str, Tensor]) -> list[Weight]:
    """As in the state dict, where the factors of a layer stand in its weight's place."""
    places: dict[str, int] = {}
    for place, key in enumerate(state):
        for name in (_layer(key), re.sub(r"[._](u|s|sigma|vh)$", "", key)):
            places.setdefault(name, place)
    return sorted(weights, key=lambda weight: places.get(weight.name, 0))


def _fit(u: Tensor, core: Tensor, vh: Tensor) -> bool:
    """Whether three entries with the names of factors are factors."""
    if not all(factor.is_floating_point() and factor.numel() for factor in (u, core, vh)):
        return False
    k = core.shape[0]
    return core.shape in ((k,), (k, k)) and u.ndim == vh.ndim == 2 and u.shape[1] == vh.shape[0] == k


def _factored(name: str, factors: Factors) -> Weight:
    shape = (factors.u.shape[0], factors.vh.shape[1])
    return Weight(name, shape, True, lambda: _values_of_factors(*factors))


def _dense(name: str, tensor: Tensor) -> Weight:
    matrix = tensor.flatten(1)
    return Weight(name, (matrix.shape[0], matrix.shape[1]), False, lambda: _values_of_matrix(matrix))


def _why_no_weight(key: str, tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return "sparse, quantised or without data"
    if not tensor.is_floating_point():
        return f"its numbers are {_name_of(tensor.dtype)}, not real floating point"
    if tensor.ndim < 2:
        return "no matrix: a vector or a single number"
    if not key.endswith("weight"):
        return "by its name not the weight of a layer"
    return None if tensor.numel() else f"empty: its shape is {tuple(tensor.shape)}"


def _why_scaled(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> str | None:
    """Small types often hold quotients: the weight is these times what another entry holds."""
    scale = next((end for end in _SCALES if f"{key}{end}" in state), None)
    if tensor.dtype.itemsize > 1 or scale is None:
        return None
    return f"its numbers are {_name_of(tensor.dtype)}, to be scaled by its entry '…weight{scale}'"


def _why_the_same(key: str, tensor: Tensor, known: dict[tuple[int, torch.Size], str]) -> str | None:
    first = known.setdefault(place_of(tensor), key)
    return None if first == key else f"tied: it is '{first}'"


def parse_rule(text: str) -> RankRule:
    """A rank rule as it may stand in a run file: a number, or `{rule: energy, share: 0.99}`.

    Raises:
        UsageError: if it is none.
    """
    with usage_errors(f"--rule {text!r}"):
        return rank_rule(yaml12.read(text, f"--rule {text!r}").value)
