"""From the `model` section to a model that fits the data and can be trained and saved."""

import importlib
import sys
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from hpclr import models
from hpclr.config import RunFile
from hpclr.config.schema import Section, Target
from hpclr.data import BatchLoader
from hpclr.errors import UsageError, usage_errors
from hpclr.models import Samples
from hpclr.training.environment import random_states, seed_everything, set_random_states
from hpclr.training.precision import Precision
from hpclr.training.tasks import TASKS
from hpclr.training.weights import load_initial_weights


def build_model(run: RunFile, samples: Samples | None, *, weights: bool = True) -> nn.Module:
    """The model of a run file with its initial weights, which depend on the seed alone, or are those it names.

    A `target:` is imported and called: only for run files of the user's own, or with their word for it.

    Args:
        run: the run file.
        samples: what it is for; None: not known, which does for a `target:` alone.
        weights: whether to read `model.weights`; not where all weights are about to be replaced.

    Raises:
        UsageError: if there is no such model, or the weights cannot be read or do not fit.
    """
    seed_everything(run.train.seed)
    section = run.model
    if isinstance(section, Target):
        model = import_target(section)
    else:
        assert samples is not None
        model = _built_in(section, samples)
    if weights and section.weights is not None:
        load_initial_weights(model, section.weights, section.weights_except)
    return model


def _built_in(section: Section, samples: Samples) -> nn.Module:
    options = msgspec.structs.asdict(section)
    name = options.pop("name")
    del options["init"], options["weights"], options["weights_except"]
    with usage_errors("model"):
        return models.build(name, samples, **options)


def import_target(section: Target) -> nn.Module:
    """Imports and calls the factory of a `target:`.

    Raises:
        UsageError: if it cannot be imported, cannot be called so, or does not return a module.
    """
    module_name, _, attribute = section.target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the console script lacks what `python -m` has: the current directory
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UsageError(f"model.target: cannot import '{section.target}': {_described(error)}") from error
    try:
        model = found(**section.args)
    except Exception as error:
        raise UsageError(
            f"model.target: {section.target} cannot be called with {section.args}: {_described(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model.target: {section.target} must return a torch.nn.Module, found {type(model).__name__}")
    return model


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (hpclr --debug … shows where)"


@torch.no_grad()
def check_outputs(model: nn.Module, x: Tensor, samples: Samples, precision: Precision) -> None:
    """Runs a model on a few of its samples (N, *inputs), which also gives lazy layers their shapes.

    Raises:
        UsageError: if it does not fit the data.
    """
    model.eval()
    try:
        with precision.context():
            outputs = model(x)
    except Exception as error:
        raise UsageError(
            f"model: it does not take samples of shape {tuple(x.shape[1:])}: {_described(error)}"
        ) from error
    finally:
        model.train()
    found = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != samples.outputs:
        raise UsageError(
            f"model: for each sample it must give {TASKS[samples.task].outputs.format(*samples.outputs)}, "
            f"that is, shape {samples.outputs}; found {found}"
        )


def check_extra_state(model: nn.Module) -> None:
    """Raises UsageError for a module with state that a checkpoint does not hold."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UsageError(
                f"model: {type(module).__name__} ('{name or 'the model itself'}') keeps state of its own kind "
                "(get_extra_state), which a checkpoint does not hold; keep it in buffers (register_buffer)"
            )


def smallest_piece(run: RunFile, loader: BatchLoader, total: int, processes: int) -> int:
    """The fewest samples that the model will see at once in training, on any process."""
    size, last = run.data.batch_size, loader.size % run.data.batch_size
    batches = {size, last} if last and total >= len(loader) else {size}
    most = run.train.micro_batch or size
    parts = {max(1, part) for batch in batches for part in (batch // processes, -(-batch // processes))}
    return min(part % most or most for part in parts)


@torch.no_grad()
def check_smallest_piece(model: nn.Module, x: Tensor, run: RunFile, precision: Precision) -> None:
    """A model that cannot train on so few samples, such as one under BatchNorm, is found now, and left as it was."""
    random, buffers = random_states(), _copies_of_buffers(model)
    try:
        with precision.context():
            model(x)
    except Exception as error:
        raise UsageError(
            f"model: in training it does not take {len(x)} of the samples at once, which is the smallest part of a "
            f"batch here (data.batch_size {run.data.batch_size} over all processes, train.micro_batch "
            f"{run.train.micro_batch}, and what is left at the end of an epoch): {_described(error)}. If it needs "
            "more, choose other sizes."
        ) from error
    finally:
        set_random_states(random)
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer if torch.equal(buffer, content) else buffer.copy_(content)


def _copies_of_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def with_batch_statistics(run: RunFile, model: nn.Module, device: torch.device) -> nn.Module:
    """Batch norms that take their statistics from all processes, if the run file asks for them."""
    if not run.parallel.sync_batchnorm:
        return model
    if device.type != "cuda":
        raise UsageError(
            "parallel.sync_batchnorm: true needs CUDA devices, this run is on the CPU, where torch has no such layer; "
            "take it out, or choose a model without batch normalisation"
        )
    synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return synchronised
