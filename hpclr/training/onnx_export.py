"""A checkpoint's model as an ONNX graph, with torch's exporter; checked with onnxruntime where it is installed."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hpclr.checkpoint import Loaded
from hpclr.config import RunFile, parse_run_file
from hpclr.errors import UsageError
from hpclr.models import Samples
from hpclr.training.evaluation import malformed_named, require_trust, saved_facts
from hpclr.training.factored import with_factors
from hpclr.training.model import build_model, check_outputs
from hpclr.training.precision import Precision
from hpclr.training.state import from_tree
from hpclr.training.tasks import task_of

_LARGEST = 2**31 - 1  # bytes of a protobuf message
_INPUT = "samples"
_OUTPUTS = {"classification": "logits", "forecasting": "forecast", "language": "logits"}


def write_onnx(
    path: Path,
    loaded: Loaded,
    state: dict[str, Tensor],
    *,
    layers: dict[str, Any],
    dtype: torch.dtype | None,
    facts: dict[str, str],
    trust: bool,
) -> str:
    """Builds the model of a checkpoint and writes what it computes; the batch may have any size.

    Args:
        path: the new file.
        loaded: a checkpoint of `hpclr train`.
        state: the weights.
        layers: which of them are factors.
        dtype: in which the graph is to compute; None: as the run.
        facts: noted in the file.
        trust: whether a `target:` may be imported.

    Returns:
        What the comparison with onnxruntime gave.

    Raises:
        UsageError: if packages are missing, or the model cannot be built or exported, or computes something else.
    """
    _check_packages()
    _check_size(state, path)
    with malformed_named(loaded.path):
        run, samples = origin(loaded)
        require_trust(run, loaded.path, trust)
        model, own = empty_model(run, samples)
        _fill(model.to(dtype or own), state, layers, loaded.path)
    output = _OUTPUTS[samples.task]
    _export(model, _draw(samples, 2, dtype or own), output, path, facts)
    return f"; {_compared(path, model, _draw(samples, 3, dtype or own), output)}"


def _draw(samples: Samples, number: int, dtype: torch.dtype) -> Tensor:
    """Random samples, always the same."""
    generator, shape = torch.Generator().manual_seed(number), (number, *samples.inputs)
    if samples.task == "language":
        return torch.randint(samples.outputs[-1], shape, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {' and '.join(missing)}, not found here: pip install 'hpclr[onnx]'")


def _check_size(state: dict[str, Tensor], path: Path) -> None:
    size = sum(value.nbytes for value in state.values())
    if size > _LARGEST:
        raise UsageError(
            f"{path}: an ONNX file holds at most {_LARGEST:,} bytes, the weights have {size:,}; "
            "try --factored or --dtype fp16"
        )


def origin(loaded: Loaded) -> tuple[RunFile, Samples]:
    """The run file of a checkpoint, and what its model is for.

    Raises:
        UsageError: if it does not say.
    """
    missing = sorted({"run", "data"} - loaded.tree.keys())
    if missing:
        raise UsageError(
            f"{loaded.path}: it holds no {' and no '.join(missing)}, so the model cannot be built; "
            "name a checkpoint of `hpclr train`"
        )
    run = parse_run_file(from_tree(loaded.tree["run"])["yaml"], f"{loaded.path} (its run file)")
    facts = saved_facts(loaded)
    return run, task_of(run, facts).samples(run.data, facts)


def empty_model(run: RunFile, samples: Samples) -> tuple[nn.Module, torch.dtype]:
    """A model of the original class, its weights still to come, and the type in which the run computes."""
    precision = Precision(run.train.precision, torch.device("cpu"))
    model = build_model(run, samples, weights=False).to(precision.dtype)
    if any(map(is_lazy, model.parameters())):
        check_outputs(model, _draw(samples, 2, precision.dtype), samples, precision)
    return model.eval(), precision.dtype


def _fill(model: nn.Module, state: dict[str, Tensor], layers: dict[str, Any], path: Path) -> None:
    try:
        with_factors(model, state, layers).eval()
    except (RuntimeError, AttributeError, ValueError) as error:  # code behind a `target:` may have changed
        raise UsageError(f"the weights in {path} do not fit the model that it names: {error}") from error


def _export(model: nn.Module, x: Tensor, output: str, path: Path, facts: dict[str, str]) -> None:
    try:
        with torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                model,
                (x,),
                dynamo=True,
                verbose=False,
                input_names=[_INPUT],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
            program.model.metadata_props.update(facts)
            program.save(path, external_data=False)
            batch = program.model.graph.inputs[0].shape[0]
    except OSError:
        raise
    except Exception as error:  # whatever torch's exporter raises for a model that it cannot follow
        raise UsageError(
            f"torch cannot export {type(model).__name__} to ONNX ({_in_brief(error)}); "
            "the other formats hold the weights alone and do not need this"
        ) from error
    if isinstance(batch, int):
        raise UsageError(
            f"torch can export {type(model).__name__} for {batch} samples at a time only, as it computes with their "
            "number; in its forward pass take that from x.shape[0], not from len(x)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on operators that are not there, and the optimiser's on what it leaves alone."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compared(path: Path, model: nn.Module, x: Tensor, output: str) -> str:
    """Runs the file on samples of another number than it was exported with.

    Raises:
        UsageError: if it computes something else than the model.
    """
    if find_spec("onnxruntime") is None:
        return "not compared: onnxruntime is not installed"
    import onnxruntime  # type: ignore[import-untyped]

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        values = x.numpy()
    except Exception as error:  # of its own classes; it may have no kernels for this type, and numpy no bfloat16
        return f"not compared: onnxruntime cannot run it here ({_in_brief(error)}); all runtimes know --dtype float32"
    try:
        (found,) = session.run([output], {_INPUT: values})
    except Exception as error:
        raise UsageError(f"{path.name}: onnxruntime fails on it, it is not written: {_in_brief(error)}") from error
    with torch.no_grad():
        outputs = model(x)
        expected = outputs.double()
    difference = float((torch.from_numpy(found).double() - expected).abs().max())
    if not difference <= torch.finfo(outputs.dtype).eps ** 0.5 * max(1.0, float(expected.abs().max())):
        raise UsageError(
            f"{path.name}: in onnxruntime its outputs differ from the model's by up to {difference:.2g}; "
            "it is not written. Export the weights in another format."
        )
    return f"onnxruntime differs by at most {difference:.2g}"


def _in_brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
