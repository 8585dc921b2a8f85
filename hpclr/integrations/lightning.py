"""OIALR, and hpclr's other methods, under the Trainer of Lightning.

    trainer = Trainer(callbacks=[LightningCallback(delay=0.2, every=0.1)])

Lightning restores a model before its optimiser is made, and the optimiser's state after `on_fit_start`, which is where
the method is built. Factors therefore wait until then (`DeferredWeights`). Several processes average gradients by
DistributedDataParallel, which fixes the shapes of parameters when it is made; Lightning makes it anew when they change.
"""

import gc
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hpclr.errors import UsageError
from hpclr.integrations.deferred import DeferredWeights, shaped_as_loaded
from hpclr.integrations.metrics import Metrics
from hpclr.lowrank import Change, densify
from hpclr.lowrank.adapters import remove_adapters
from hpclr.methods import OIALR, Method, MoSARA
from hpclr.parallel.group import Group
from hpclr.parallel.placement import Rank0

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
except ImportError as _error:
    raise UsageError(
        f"LightningCallback needs lightning, which cannot be imported ({_error}); install the extra `lightning`: "
        "pip install 'hpclr[lightning]'"
    ) from _error


class LightningCallback(Callback):
    """Trains a LightningModule with OIALR, or another method of hpclr.

    One process on one device, or several with `strategy="ddp"`, of which the first decomposes the layers. One
    optimiser, and automatic optimisation.

    Args:
        method: the class: `hpclr.OIALR`, `SVDTraining`, `Truncate`, `FixedRank`, `Cuttlefish`, `SARA`, `MoSARA` or
            `EDoRA`. Its penalty, if it has one, is added to the gradients before they are clipped.
        dense_at_end: make the model dense again when fitting has ended, adapters merged. Checkpoints hold factors and
            adapters in any case.
        settings: of the method; steps may be fractions of `trainer.estimated_stepping_batches`, where that is finite.

    Attributes:
        method: the method at work; None before fitting.

    Raises:
        UsageError: if lightning is missing, for a strategy other than one device and DDP, several optimisers, another
            callback that averages weights, or a checkpoint that cannot be resumed from.
    """

    def __init__(self, method: Callable[..., Method] = OIALR, *, dense_at_end: bool = False, **settings: Any) -> None:
        if dense_at_end and method is MoSARA:
            raise UsageError("LightningCallback: Mo-SARA cannot be merged, so that dense_at_end does not go with it")
        self.method: Method | None = None
        self._class, self._dense_at_end, self._settings = method, dense_at_end, settings
        self._deferred: DeferredWeights | None = None
        self._saved: Mapping[str, Any] | None = None
        self._metrics: Metrics | None = None
        self._shaping: RemovableHandle | None = None
        self._changed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is loaded: in fitting factors wait, else the model takes their form at once."""
        if stage != "fit":
            self._shaping = shaped_as_loaded(pl_module)
            return
        _refuse_fixed_shapes(trainer)
        if self.method is not None:
            raise UsageError(
                "this LightningCallback has trained already, with an optimiser that this fit does not have; go on with "
                "ckpt_path= and a new model, Trainer and callback"
            )
        self._deferred, self._saved = DeferredWeights(pl_module), None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Afterwards everything is loaded as ever."""
        for waiting in (self._deferred, self._shaping):
            if waiting is not None:
                waiting.remove()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the method: the optimiser is there, its state not yet."""
        assert self._deferred is not None
        optimizer = _only_optimizer(trainer, pl_module)
        settings = _length(trainer, self._class) | _placement(trainer) | self._settings
        self.method = self._class(pl_module, optimizer, **settings)
        self.method.on_change(self._note)
        if self._saved is not None:
            self.method.load_state_dict(self._saved)
            self._deferred.load()
        elif self._deferred.waiting:
            raise UsageError(
                "the checkpoint that is to be resumed holds factored weights, but no state of LightningCallback: it "
                "was saved with save_weights_only, or without it. Resume from one that has it."
            )
        self._deferred.remove()
        self._metrics = Metrics(pl_module, self.method)
        _renew(trainer.strategy, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the gradient of the penalty, once a step, to gradients that are whole, unscaled and not clipped yet."""
        assert self.method is not None
        with torch.enable_grad():
            penalty = self.method.penalty()
            if penalty.requires_grad:
                penalty.backward()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Does what is due, after a step of the optimiser and before checkpoints are saved."""
        assert self.method is not None
        assert self._metrics is not None
        self.method.step()
        if self._changed:
            self._changed = False
            _renew(trainer.strategy, pl_module)
        if self._metrics.has_news:
            news = self._metrics.news()
            for logger in trainer.loggers:
                logger.log_metrics(news, step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the model dense, if asked to."""
        if self._dense_at_end:
            remove_adapters(densify(pl_module), merge=True)

    def _note(self, change: Change) -> None:
        self._changed = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the method."""
        return {} if self.method is None else {"method": self.method.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the method is there; of use in fitting only."""
        self._saved = state_dict["method"]


def _refuse_fixed_shapes(trainer: Trainer) -> None:
    strategy, launcher = trainer.strategy, type(trainer.strategy.launcher)
    # by type: DeepSpeed's is derived from DDP's
    if type(strategy) not in (DDPStrategy, SingleDeviceStrategy) or launcher is _MultiProcessingLauncher:
        raise UsageError(
            'LightningCallback trains on one device, or on several with strategy="ddp", found '
            f"{type(strategy).__name__} with {launcher.__name__}: this fixes the shapes of parameters, or brings "
            'weights back into a model that is dense. Say devices=1 or strategy="ddp", or train with `hpclr launch`.'
        )
    others = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [one for one in others if isinstance(one, StochasticWeightAveraging | WeightAveraging)]
    if averaging:
        raise UsageError(
            f"{type(averaging[0]).__name__} keeps a copy of the model whose parameters do not change their shapes with "
            "those of LightningCallback; leave it out, or average with hpclr.EMA in a loop of your own"
        )


def _placement(trainer: Trainer) -> dict[str, Rank0]:
    """Which process decomposes the layers, if there are several."""
    return {"placement": Rank0(Group(), _unheard)} if trainer.world_size > 1 else {}


def _unheard(what: str, *, waiting: bool) -> None:
    """Nobody asks what this process does."""


def _renew(strategy: Strategy, module: LightningModule) -> None:
    """Has Lightning wrap the model anew, if it has, since parameters have other shapes."""
    if isinstance(strategy, DDPStrategy):
        strategy.model = module
        gc.collect()  # buckets as large as the gradients, which stand in circles
        strategy.configure_ddp()


def _only_optimizer(trainer: Trainer, module: LightningModule) -> Optimizer:
    if len(trainer.optimizers) != 1 or not module.automatic_optimization:
        raise UsageError(
            f"LightningCallback follows one optimiser that Lightning steps, found {len(trainer.optimizers)}"
            f"{'' if module.automatic_optimization else ' under manual optimisation'}; return one from "
            "configure_optimizers, or use the method in a loop of your own"
        )
    return trainer.optimizers[0]


def _length(trainer: Trainer, method: Callable[..., Method]) -> dict[str, int]:
    """The length of the run, for methods that ask for it, if it is known."""
    steps = trainer.estimated_stepping_batches
    asked = "total_steps" in inspect.signature(method).parameters
    return {"total_steps": int(steps)} if asked and math.isfinite(steps) else {}
