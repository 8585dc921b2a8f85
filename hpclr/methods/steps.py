"""Watching an optimiser: how many steps it has really taken, how large those of Σ are, and without weight decay."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class OptimizerSteps:
    """Counts the steps that an optimiser really takes, and scales those of some parameters.

    A gradient scaler that finds infinite gradients does not call `step`, or (fused optimisers) calls it with
    `found_inf` set; neither is a step. Evaluation and accumulation do not come here at all.

    Args:
        optimizer: the optimiser to watch.
        scaled: the parameters whose every update is multiplied by `factor`, asked anew at each step.
        factor: 1.0 leaves the updates as they are. For optimisers whose update is proportional to the learning
            rate this is a factor on it, for these parameters alone and under any schedule.
        watched: the parameters that a method changes by these steps; no second method may change them too.

    Raises:
        ValueError: if another method already changes one of them through this optimiser.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scaled: Callable[[], Sequence[nn.Parameter]],
        factor: float,
        watched: Sequence[nn.Parameter] = (),
    ) -> None:
        self.taken = 0
        self._watched = {id(parameter) for parameter in watched}
        _refuse_second(optimizer, self._watched)
        self._scaled, self._factor = scaled, factor
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        if factor != 1.0:
            optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._after)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a method is bound to its optimiser by hooks, which copies and pickles lose; "
            "make a new one and give it the state_dict() of this one"
        )

    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = [(p, p.detach().clone()) for p in self._scaled()]

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self.taken += 1
        for parameter, before in self._before:
            parameter.copy_(before + self._factor * (parameter - before))
        self._before = []


class WithoutDecay:
    """Has an optimiser take its steps of some parameters without weight decay.

    For the time of a step they have a parameter group of their own, with the settings of the one they come from but
    for that. At all other times the groups are as they were, so that learning-rate schedulers, which refuse groups that
    were not there when they were made, find theirs, and what they set holds for all. A step that raises an error leaves
    them parted until the next one, or until the optimiser's state is saved or loaded.

    Args:
        optimizer: the optimiser.
        spared: the parameters without weight decay, asked anew at each step.
    """

    def __init__(self, optimizer: Optimizer, spared: Callable[[], Sequence[nn.Parameter]]) -> None:
        self._spared = spared
        self._parted: list[tuple[dict[str, Any], list[nn.Parameter], dict[str, Any]]] = []
        # not traced: a compiled step would see the new group without its settings
        part, join = torch.compiler.disable(self._part), torch.compiler.disable(self._join)
        optimizer.register_step_pre_hook(part)
        handle = optimizer.register_step_post_hook(join)
        optimizer.register_state_dict_pre_hook(join)
        optimizer.register_load_state_dict_pre_hook(join)
        # of several, the last to part is the first to join
        cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks).move_to_end(handle.id, last=False)

    def _part(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._join(optimizer)  # if the last step has raised an error
        spared = {id(parameter) for parameter in self._spared()}
        for group in list(optimizer.param_groups):
            whole = group["params"]
            held = [p for p in whole if id(p) in spared]
            if held and group.get("weight_decay"):
                group["params"] = [p for p in whole if id(p) not in spared]
                own = group | {"params": held, "weight_decay": 0.0}
                optimizer.param_groups.append(own)
                self._parted.append((group, whole, own))

    def _join(self, optimizer: Optimizer, *_: Any) -> None:
        for group, whole, own in self._parted:
            group["params"] = whole
            optimizer.param_groups[:] = [one for one in optimizer.param_groups if one is not own]
        self._parted = []


def _refuse_second(optimizer: Optimizer, watched: set[int]) -> None:
    for hook in optimizer._optimizer_step_post_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, OptimizerSteps) and other._watched & watched:
            raise ValueError(
                "another method already trains layers of this model through this optimiser; give the two different "
                "layers (include=, exclude=), or make model and optimiser anew"
            )
