"""OIALR under the Trainer of Hugging Face's transformers.

    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[HuggingFaceCallback(delay=0.2, every=0.1)])

The Trainer makes the optimiser, loads checkpoints and steps; a callback is told when it has. On resuming it loads the
weights before there is an optimiser, and the optimiser's state before any callback hears of it: factors therefore wait
(`DeferredWeights`), and the method's state travels within the optimiser's, in the first parameter group.

Adapters (SARA, Mo-SARA, EDoRA) have nothing to do in a step and need no callback: give the model its adapters before
the Trainer is made, also of one that resumes.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hpclr.errors import UsageError
from hpclr.integrations.deferred import DeferredWeights
from hpclr.integrations.metrics import Metrics
from hpclr.lowrank import densify
from hpclr.methods import OIALR

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as _error:
    raise UsageError(
        f"HuggingFaceCallback needs transformers, which cannot be imported ({_error}); install the extra `trainer`: "
        "pip install 'hpclr[trainer]'"
    ) from _error

_KEY = "hpclr"


class HuggingFaceCallback(TrainerCallback):
    """Trains the Trainer's model with OIALR.

    Give it to the Trainer when that is made. One process on one device.

    Args:
        dense_at_end: make the model dense again when training has ended, so that what is saved after that, with
            `trainer.save_model()`, loads without hpclr. Checkpoints hold factors in any case.
        settings: of `hpclr.OIALR`; delay and every may be fractions of the Trainer's steps.

    Attributes:
        method: the OIALR at work; None before training.

    Raises:
        UsageError: if transformers is missing, for settings that OIALR has not, for `tied`, for several processes or
            devices, or for a checkpoint that cannot be resumed from.
    """

    def __init__(self, *, dense_at_end: bool = False, **settings: Any) -> None:
        _refuse_other_settings(settings)
        self.method: OIALR | None = None
        self._dense_at_end, self._settings = dense_at_end, settings
        self._deferred: DeferredWeights | None = None
        self._optimizer: Optimizer | None = None
        self._metrics: Metrics | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Weights that are loaded from now on may have to wait."""
        _refuse_several(args)
        self._deferred = DeferredWeights(about["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any
    ) -> None:
        """Model and optimiser are there, with what a checkpoint held for them."""
        _refuse_several(args)
        model, optimizer = about["model"], _innermost(about["optimizer"])
        saved = optimizer.param_groups[0].pop(_KEY, None)
        if self.method is not None:
            self._check_going_on(optimizer, saved)
            return
        if saved is None and state.global_step > 0:
            raise UsageError(
                f"the Trainer resumes at step {state.global_step} from a checkpoint without the state of OIALR: it was "
                "saved without this callback, or with save_only_model. Resume from one that has it, or begin a new "
                "training from its weights, with from_pretrained."
            )
        if self._deferred is None or self._deferred.model is not model:
            self._deferred = _unless_resumed(model, saved)
        self._begin(self._deferred, optimizer, state.max_steps, saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """After every step of the optimiser, and before the Trainer logs and saves."""
        if self.method is not None:
            self.method.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Adds sizes and ranks to what is logged, for the history and for callbacks that come after this one."""
        if self._metrics is None:
            return
        news = self._metrics.news() if "loss" in about["logs"] else self._metrics.sizes()
        about["logs"].update(news)
        state.log_history[-1].update(news)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Makes the model dense, if asked to."""
        if self._dense_at_end:
            densify(about["model"])

    def _begin(
        self, weights: DeferredWeights, optimizer: Optimizer, steps: int, saved: Mapping[str, Any] | None
    ) -> None:
        settings = {"total_steps": steps} | self._settings
        _refuse_lost(weights, saved)
        if saved is None:
            self.method = OIALR(weights.model, optimizer, **settings)
        else:
            self.method = _resumed(weights, optimizer, settings, saved)
        weights.remove()
        self._optimizer, self._metrics = optimizer, Metrics(weights.model, self.method)
        optimizer.register_state_dict_post_hook(self._add_state)

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        assert self.method is not None
        state["param_groups"][0][_KEY] = self.method.state_dict()

    def _check_going_on(self, optimizer: Optimizer, saved: Mapping[str, Any] | None) -> None:
        """A second `train()` may go on where the first ended, and nowhere else."""
        assert self.method is not None
        if optimizer is not self._optimizer or (saved is not None and saved["steps"] != self.method.steps):
            raise UsageError(
                "this HuggingFaceCallback has trained already, another optimiser or up to another step; resume a "
                "checkpoint with a new model, Trainer and callback"
            )


def _resumed(
    weights: DeferredWeights, optimizer: Optimizer, settings: Mapping[str, Any], saved: Mapping[str, Any]
) -> OIALR:
    """In the order in which states are to be loaded: method, model, optimiser."""
    moments = optimizer.state_dict()
    optimizer.state.clear()  # of shapes that the model does not have yet
    method = OIALR(weights.model, optimizer, **settings)
    method.load_state_dict(saved)
    weights.load()
    optimizer.load_state_dict(moments)
    return method


def _refuse_lost(weights: DeferredWeights, saved: Mapping[str, Any] | None) -> None:
    """The optimiser must have been made for the dense model, and what was loaded must be of use."""
    if saved is None and weights.waiting:
        raise UsageError(
            "factored weights wait that were loaded into the Trainer's model, but this training does not resume the "
            "checkpoint that they are of. To resume it, say trainer.train(resume_from_checkpoint=…); to begin a new "
            "training from them, load them with hpclr.lowrank.load_state_dict before the Trainer is made."
        )
    if saved is not None and weights.used:
        raise UsageError(
            "a checkpoint cannot be resumed into a model that has been evaluated with factors loaded before: it has "
            "their form already. Resume with a new model, Trainer and callback."
        )


def _refuse_other_settings(settings: Mapping[str, Any]) -> None:
    if others := settings.keys() - inspect.signature(OIALR).parameters:
        raise UsageError(
            f"HuggingFaceCallback takes the settings of hpclr.OIALR, found {', '.join(sorted(others))}. Adapters need "
            "no callback: give the model its adapters, with hpclr.SARA(model, …), before the Trainer is made"
        )
    if settings.get("tied"):
        raise UsageError(
            "HuggingFaceCallback takes no tied=True: the Trainer's checkpoints cannot hold factors that a head and its "
            "embedding share, transformers knows the weight as shared and nothing else. Leave it out, or train in a "
            "loop of your own."
        )


def _refuse_several(args: TrainingArguments) -> None:
    """The Trainer wraps the model in ways that fix the shapes of parameters."""
    if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
        raise UsageError(
            f"HuggingFaceCallback trains on one device in one process, found {args.world_size} processes with "
            f"{args.n_gpu} GPUs each{', DeepSpeed' if args.deepspeed else ''}{', FSDP' if args.fsdp else ''}: the "
            "Trainer wraps the model so that the shapes of its parameters are fixed. Let it see one GPU "
            "(CUDA_VISIBLE_DEVICES=0), or train on several with `hpclr launch` or hpclr.parallel.Replica in a loop of "
            "your own."
        )


def _innermost(optimizer: Any) -> Optimizer:
    """The optimiser itself: accelerate's stands around it."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    return optimizer


def _unless_resumed(model: nn.Module, saved: Mapping[str, Any] | None) -> DeferredWeights:
    """For a model that was not there when the Trainer was made: nothing has been kept of what was loaded into it."""
    if saved is not None:
        raise UsageError(
            "HuggingFaceCallback cannot resume a model that model_init has made after the Trainer, nor be added to a "
            "Trainer that is there: give the Trainer model= and callbacks= when it is made"
        )
    return DeferredWeights(model)
