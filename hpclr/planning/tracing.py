"""The memory of a training step, from a step that is taken without data: every operation of torch's, none computed."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpclr.config.schema import Section
from hpclr.errors import UsageError
from hpclr.lowrank import optimizer_bytes
from hpclr.planning.forms import Ranks, formed
from hpclr.planning.subject import Subject, copied
from hpclr.training.optimizers import optimizer_of
from hpclr.training.precision import Precision


@dataclass(frozen=True)
class Traced:
    """A step, with so many samples at once.

    Attributes:
        saved: bytes that the forward pass leaves for the backward pass.
        activations: the most that is held at a time beside weights, gradients, optimiser state and samples.
        peak: the same with the gradients that are there by then.
        optimizer: bytes of the optimiser's state.
        updating: the most that the optimiser holds beside gradients and state.
        calls: operations of torch's in forward and backward pass.
    """

    saved: int
    activations: int
    peak: int
    optimizer: int
    updating: int
    calls: int


def traced(subject: Subject, model: nn.Module, ranks: Ranks, size: int) -> Traced:
    """Takes a step of a copy of a model, with factors of these ranks.

    Raises:
        UsageError: for a model that cannot run without data.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    form = formed(model, cast(Section, subject.run.method), ranks)
    with mode:
        twin = copied(form, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)).train()
        batch = subject.batch(size)
        optimizer = optimizer_of(subject.run, twin)
        try:
            return _step(subject, twin, optimizer, batch)
        except Exception as error:  # whatever a model raises that looks at its data
            raise UsageError(
                f"model: it cannot be counted without data ({type(error).__name__}: {error}). Either it does not take "
                "such samples, which `hpclr train` would say too, or its forward pass depends on the values of its "
                "input, as `if x.sum() > 0` does"
            ) from error


def _step(subject: Subject, model: nn.Module, optimizer: Optimizer, batch: Any) -> Traced:
    precision = Precision(subject.run.train.precision, torch.device("cpu"))
    ledger = _Ledger([*model.parameters(), *model.buffers(), batch.x, batch.y])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ledger.has_gradient)
    with ledger:
        with precision.context():
            loss = subject.loss(model, batch)
        saved = ledger.held
        loss.backward()
        activations, peak, calls = ledger.highest_without, ledger.highest, ledger.calls
        del loss
        before = ledger.held
        ledger.highest = before
        with suppress(
            DataDependentOutputException
        ):  # Adafactor, which looks at its weights; its state is there by then
            optimizer.step()
    state = optimizer_bytes(optimizer)
    return Traced(saved, activations, peak, state, max(0, ledger.highest - before - state), calls)


class _Ledger(TorchDispatchMode):
    """What is held: every piece of memory from the operation that makes it to the end of its last tensor.

    Args:
        there_before: tensors of which views may be made, and which do not count.
    """

    def __init__(self, there_before: Sequence[Tensor]) -> None:
        super().__init__()
        self._there_before = {tensor.untyped_storage()._cdata for tensor in there_before}
        self.held = self.gradients = self.highest = self.highest_without = self.calls = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **cast(Mapping[str, Any], kwargs or {}))
        self.calls += func.namespace != "prim"  # questions, such as where a tensor is
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def has_gradient(self, parameter: Tensor) -> None:
        """Its gradient is there to stay."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._there_before:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.held += size
        self.highest = max(self.highest, self.held)
        self.highest_without = max(self.highest_without, self.held - self.gradients)

    def _gone(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.held -= size
