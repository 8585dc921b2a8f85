"""What training costs: operations, bytes reduced over the processes, optimiser state, memory."""

import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from hpclr.data import Batch
from hpclr.lowrank import count_gradient_flops, count_training_flops, optimizer_bytes
from hpclr.lowrank.layers import lowrank_modules
from hpclr.training.assembly import Assembly
from hpclr.training.environment import random_states, set_random_states
from hpclr.training.memory import PeakMemory
from hpclr.training.state import Position

Shapes = tuple[tuple[torch.Size, bool], ...]
Drawn = tuple[tuple[str, int], ...]  # layer name and how many directions a step takes of it


class Meter:
    """Adds up in a run's position what its steps cost.

    Operations are counted by a pass without data, once for each form that the model takes and each number of samples
    that it sees at once; after that a step costs no more than a look at the shapes. All processes come to the same.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: Assembly) -> None:
        self._parts = parts
        self._memory = PeakMemory(parts.device)
        self._shapes: Shapes | None = None
        self._dense: dict[int, int] = {}  # samples at once → operations of a pass and its gradients
        self._own: dict[int, int] = {}  # the same of the model as it is now
        self._parts_of: dict[Drawn, dict[int, int]] = {}  # the same for each draw of a nested model
        self._penalty: int | None = None
        self._gradient_bytes = 0

    def add(self, position: Position) -> None:
        """Adds the step number `position.step`, which has just been taken; the model has yet the form it had in it."""
        self._look_at_form()
        flops, dense = (None, None) if position.flops is None else self._flops(position.step)
        position.flops, position.dense_flops = _sum(position.flops, flops), _sum(position.dense_flops, dense)
        position.reduced_bytes = _sum(position.reduced_bytes, self._gradient_bytes)
        position.optimizer_bytes = _largest(position.optimizer_bytes, optimizer_bytes(self._parts.optimizer))

    def take_memory(self, position: Position) -> None:
        """Notes the most memory that any of the processes has held so far; collective."""
        self._parts.job.doing("comparing memory", position.step, waiting=True)
        held = self._parts.job.group.gather(self._memory.bytes())
        if position.peak_memory == 0:
            position.peak_memory_of = self._memory.of
        if position.peak_memory_of == self._memory.of:
            position.peak_memory = _largest(position.peak_memory, max(held))
        else:  # that of an earlier attempt is of other memory
            position.peak_memory = position.peak_memory_of = None

    def memory(self) -> int:
        """The most bytes that this process has held so far."""
        return self._memory.bytes()

    def totals(self, position: Position) -> dict[str, Any]:
        """What a summary says of the cost of a run; None for what is not known."""
        reduced, steps = position.reduced_bytes, position.step
        return {
            "training_flops": position.flops,
            "dense_training_flops": position.dense_flops,
            "gradient_bytes_mean": reduced / steps if reduced is not None and steps else None,
            "optimizer_bytes_peak": position.optimizer_bytes,
            "peak_memory_bytes": position.peak_memory,
            "peak_memory_of": position.peak_memory_of,
        }

    def _look_at_form(self) -> None:
        model = self._parts.model
        shapes = tuple((parameter.shape, parameter.requires_grad) for parameter in model.parameters())
        if shapes != self._shapes:
            begins_dense = self._shapes is None and not any(lowrank_modules(model)) and not self._parts.method.adapts
            self._own, self._parts_of = self._dense if begins_dense else {}, {}
            self._shapes, self._penalty = shapes, None
            self._gradient_bytes = self._parts.replica.gradient_bytes
        if drawn := tuple(getattr(self._parts.method, "drawn", {}).items()):
            self._own = self._parts_of.setdefault(drawn, {})

    def _flops(self, step: int) -> tuple[int, int] | tuple[None, None]:
        """Operations of a step on all processes together, and of the same step with dense weights."""
        try:
            return self._counted(self._pieces(step))
        except Exception as error:  # whatever a model raises that looks at its data
            warnings.warn(f"the operations of this model could not be counted: {error}", stacklevel=2)
            return None, None

    def _counted(self, pieces: Counter[int]) -> tuple[int, int]:
        for size in pieces.keys() - self._own.keys():
            self._own[size] = self._undisturbed(partial(self._training_flops, size))
        for size in pieces.keys() - self._dense.keys():
            self._dense[size] = self._undisturbed(partial(self._training_flops, size, dense=True))
        if self._penalty is None:
            of_penalty = partial(count_gradient_flops, self._parts.method.penalty, self._parts.model)
            self._penalty = self._undisturbed(of_penalty)
        own, dense = (sum(count[size] * times for size, times in pieces.items()) for count in (self._own, self._dense))
        return own + self._penalty * pieces.total(), dense

    def _pieces(self, step: int) -> Counter[int]:
        """The pieces in which a step's batch is trained on."""
        parts = self._parts
        in_step = parts.sharded is not None
        return pieces_of(parts.loader.samples(step), parts.job.group.size, parts.run.train.micro_batch, in_step)

    def _undisturbed(self, count: Callable[[], int]) -> int:
        """Counts; whatever a model draws on the way is given back."""
        self._parts.job.doing("counting operations")
        random = random_states()
        try:
            return count()
        finally:
            set_random_states(random)
            self._parts.job.doing("adding up losses over the processes", waiting=True)  # which comes next

    def _training_flops(self, size: int, *, dense: bool = False) -> int:
        loader, task = self._parts.loader, self._parts.task
        x, y = (
            torch.empty(size, *form.shape, dtype=form.dtype, device="meta") for form in (loader.x_form, loader.y_form)
        )
        batch = Batch(x, y, torch.empty(size, dtype=torch.int64, device="meta"))
        form = self._parts.method.dense_form
        return count_training_flops(
            self._parts.countable, lambda model: task.loss(model(x), batch), dense=dense, dense_form=form
        )


@cache
def pieces_of(batch: int, processes: int, most: int | None, in_step: bool = False) -> Counter[int]:
    """Samples that the model sees at once → how often, over all processes, in a step.

    Args:
        batch: samples of the global batch; each process has at least one that stands in.
        processes: how many share it.
        most: samples at once, None for all of a process's part.
        in_step: whether all make equally many passes, some in vain over their first piece.
    """
    pieces: Counter[int] = Counter()
    for rank in range(processes):
        part = max(1, batch * (rank + 1) // processes - batch * rank // processes)
        whole, rest = divmod(part, most or part)
        pieces[most or part] += whole
        pieces[rest] += 1
        if in_step:
            pieces[min(most or part, part)] += passes_of(batch, processes, most) - whole - (rest > 0)
    del pieces[0]
    return +pieces


def passes_of(batch: int, processes: int, most: int | None) -> int:
    """How many passes the process with the largest part of a batch makes; arguments as for `pieces_of`."""
    largest = max(1, -(-batch // processes))
    return -(-largest // (most or largest))


def _sum(total: int | None, more: int | None) -> int | None:
    """None if either is not known."""
    return None if total is None or more is None else total + more


def _largest(before: int | None, now: int) -> int | None:
    """None if what was before is not known."""
    return None if before is None else max(before, now)
