"""The learning rate as a pure function of the step: there is no state to save or lose."""

from collections.abc import Callable
from math import cos, pi

from torch.optim import Optimizer

from hpclr.config.schema import Constant, Cosine, OneCycle, Step

Schedule = Constant | Cosine | Step | OneCycle
LearningRate = Callable[[int], float]


def learning_rate(schedule: Schedule, peak: float, total: int) -> LearningRate:
    """The learning rate for the step with index 0 … total − 1.

    Args:
        schedule: kind and settings.
        peak: the optimiser's learning rate.
        total: optimiser steps of the whole run.
    """
    match schedule:
        case Constant():
            return _warmed_up(schedule.warmup_steps, lambda step: peak)
        case Cosine():
            start, span = schedule.warmup_steps, max(1, total - schedule.warmup_steps)
            low = schedule.min_lr
            return _warmed_up(start, lambda step: low + (peak - low) * _half_cosine((step - start) / span))
        case Step():
            milestones = [round(m * total) if m < 1 else int(m) for m in schedule.milestones]
            gamma = schedule.gamma
            return _warmed_up(
                schedule.warmup_steps, lambda step: peak * gamma ** sum(step >= milestone for milestone in milestones)
            )
        case OneCycle():
            return _one_cycle(schedule, schedule.max_lr or peak, total)


def _warmed_up(steps: int, then: LearningRate) -> LearningRate:
    """Rises linearly over the first `steps` steps, the first of which already moves."""
    return lambda step: then(steps) * (step + 1) / (steps + 1) if step < steps else then(step)


def _half_cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return (1 + cos(pi * min(1.0, max(0.0, progress)))) / 2


_FIRST_OF_ONE_CYCLE = 25.0  # the peak is this many times the first learning rate, as in torch's OneCycleLR


def _one_cycle(schedule: OneCycle, peak: float, total: int) -> LearningRate:
    first = peak / _FIRST_OF_ONE_CYCLE
    last = first / schedule.final_div
    turn = schedule.warmup_fraction * total - 1

    def at(step: int) -> float:
        if step <= turn:
            return peak + (first - peak) * _half_cosine(step / max(turn, 1.0))
        return last + (peak - last) * _half_cosine((step - turn) / max(total - 1 - turn, 1.0))

    return at


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
