"""How much memory training holds at its peak, to the byte."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler says when it starts

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `work` holds beyond those there before, none of which it may give back; see `Recording`."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with Recording(device) as recording:
        recording.phase("work", work)
    return recording.peaks()["work"] - before


class Recording:
    """The peaks of the phases of a program, of which all tensors are made while it is recorded.

    On the CPU the sum of all that torch's allocator gives and takes back, in order: temporary memory within operations
    too, and the same in every run. What libraries such as MKL take for themselves is not in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._peaks: dict[str, int] = {}

    def __enter__(self) -> "Recording":
        if self._device.type != "cuda":
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type != "cuda":
            self._profiler.__exit__(*error)

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        """Does the work and returns its result."""
        if self._device.type != "cuda":
            with record_function(f"phase {name}"):
                return work()
        torch.cuda.reset_peak_memory_stats(self._device)
        result = work()
        torch.cuda.synchronize(self._device)
        self._peaks[name] = max(self._peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))
        return result

    def peaks(self) -> dict[str, int]:
        """Name → the most bytes held at a time in any phase of this name; when all is done."""
        if self._device.type == "cuda":
            return self._peaks
        events = self._profiler.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        times, held = [time for time, _ in changes], list(accumulate((size for _, size in changes), initial=0))
        for event in events:
            kind, _, name = event.name().partition(" ")
            if kind == "phase":
                first, last = (bisect_left(times, time) for time in (event.start_ns(), event.end_ns()))
                self._peaks[name] = max(self._peaks.get(name, 0), *held[first : last + 1])
        return self._peaks


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, *others: Tensor) -> int:
    """Bytes of parameters, gradients, buffers, optimiser state and other tensors; memory that is shared counts once."""
    state = (v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    return _distinct([*model.parameters(), *model.buffers(), *gradients, *state, *others])


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Bytes that the forward pass keeps for the backward pass, the model's own parameters and buffers left out."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    own = [*model.parameters(), *model.buffers()]
    total = _distinct([*own, *kept]) - _distinct(own)
    del result
    return total


def _distinct(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
