"""What a process has to do in a step, and what it holds, for each form of the model; each is counted once."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import cast

import torch
from torch import nn

from hpclr.config.schema import Section
from hpclr.errors import UsageError
from hpclr.lowrank import count_flops, count_training_flops
from hpclr.planning.forms import Ranks, formed
from hpclr.planning.steps import Work
from hpclr.planning.subject import Subject
from hpclr.planning.tracing import Traced, traced

Key = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Sizes:
    """Of a form of the model.

    Attributes:
        trained: parameters that are trained.
        stored: all of them, frozen factors included.
        gradient_bytes: what a step reduces.
        weight_bytes: of all parameters and buffers.
        largest: bytes of the largest weight.
    """

    trained: int
    stored: int
    gradient_bytes: int
    weight_bytes: int
    largest: int


@dataclass(frozen=True)
class Share:
    """A process's part of a batch: so many samples in a step, at most `at_once` of them at a time."""

    samples: int
    at_once: int

    @property
    def passes(self) -> int:
        """Forward and backward passes in a step."""
        return ceil(self.samples / self.at_once)


def share_of(subject: Subject, processes: int) -> Share:
    """Of the global batch, which so many processes share equally."""
    samples = subject.run.data.batch_size // processes
    return Share(samples, min(samples, subject.run.train.micro_batch or samples))


class Counts:
    """Counts the forms of a model without data.

    Args:
        subject: what is to be trained.
        model: its model, dense, as `blank_model` gives it.
    """

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        self.subject, self.model = subject, model
        self._sizes: dict[Key, Sizes] = {}
        self._traced: dict[tuple[Key, int], Traced] = {}
        self._flops: dict[tuple[Key, int], tuple[int, int]] = {}

    def sizes(self, ranks: Ranks) -> Sizes:
        """Parameters and bytes with these ranks."""
        key = _key(ranks)
        if key not in self._sizes:
            self._sizes[key] = _sizes_of(self._form(ranks))
        return self._sizes[key]

    def traced(self, ranks: Ranks, size: int) -> Traced:
        """A step with these ranks and so many samples at once."""
        key = _key(ranks), size
        if key not in self._traced:
            self._traced[key] = traced(self.subject, self.model, ranks, size)
        return self._traced[key]

    def flops(self, ranks: Ranks, size: int) -> tuple[int, int]:
        """Operations of forward and backward pass together, and of the forward pass."""
        key = _key(ranks), size
        if key not in self._flops:
            self._flops[key] = self._counted(ranks, size)
        return self._flops[key]

    def work(self, ranks: Ranks, share: Share) -> Work:
        """A step of one process; calls are counted with dense weights, or with factors of any rank."""
        sizes, times = self.sizes(ranks), share.samples / share.at_once
        flops, forward = self.flops(ranks, share.at_once)
        dense = self.traced({}, share.at_once)
        alike = self.traced(self._like(ranks), share.at_once)
        return Work(
            flops=flops * times,
            forward=forward * times,
            trained=sizes.trained,
            stored=sizes.stored,
            gradient_bytes=sizes.gradient_bytes,
            saved_bytes=alike.saved,
            moved_bytes=dense.saved * times,
            calls=alike.calls * share.passes,
        )

    def _like(self, ranks: Ranks) -> Ranks:
        """Ranks that are traced already for as many factored layers, where there are any."""
        for key, _ in self._traced:
            if len(key) == len(ranks):
                return dict(key)
        return ranks

    def _form(self, ranks: Ranks) -> nn.Module:
        return formed(self.model, cast(Section, self.subject.run.method), ranks)

    def _counted(self, ranks: Ranks, size: int) -> tuple[int, int]:
        form, batch = self._form(ranks), self.subject.batch(size, "meta")
        try:
            training = count_training_flops(form, lambda twin: self.subject.loss(twin, batch))
            return training, count_flops(form, batch.x)
        except Exception as error:  # whatever a model raises that looks at its data
            raise UsageError(f"model: its operations cannot be counted: {type(error).__name__}: {error}") from error


def _sizes_of(model: nn.Module) -> Sizes:
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Sizes(
        trained=sum(p.numel() for p in trained),
        stored=sum(p.numel() for p in parameters),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        weight_bytes=sum(t.numel() * t.element_size() for t in (*parameters, *model.buffers())),
        largest=max((p.numel() * p.element_size() for p in parameters), default=0),
    )


def _key(ranks: Mapping[str, int]) -> Key:
    return tuple(ranks.items())


def sample_bytes(subject: Subject) -> int:
    """Of a sample and of what is wanted of it."""
    with torch.device("meta"):
        batch = subject.batch(1)
    return batch.x.nbytes + batch.y.nbytes
