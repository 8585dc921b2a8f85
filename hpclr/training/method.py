"""From the `method` section to the method, and to what it needs of the processes."""

from collections.abc import Callable
from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from hpclr.config import RunFile
from hpclr.config.schema import Cuttlefish as CuttlefishSection
from hpclr.config.schema import Dense as DenseSection
from hpclr.config.schema import Edora, Lora, MoSara, Oialr, Sara, Section, SvdTraining
from hpclr.config.schema import FixedRank as FixedRankSection
from hpclr.config.schema import Nested as NestedSection
from hpclr.config.schema import Truncate as TruncateSection
from hpclr.errors import usage_errors
from hpclr.methods import (
    OIALR,
    SARA,
    Cuttlefish,
    Dense,
    EDoRA,
    FixedRank,
    Method,
    MoSARA,
    Nested,
    SVDTraining,
    Truncate,
)
from hpclr.parallel.replica import Replica
from hpclr.parallel.sharded import Sharded
from hpclr.training.job import Job
from hpclr.training.lengths import check_length
from hpclr.training.lora import LoRA


def build_replica(run: RunFile, model: nn.Module, job: Job) -> Replica | Sharded:
    """The model on all processes, whole on each or shared out over them, with what the method asks of them."""
    section, options = run.method, dict[str, Any](doing=job.doing)
    options["broadcast_buffers"] = False  # not in every step: before they are read, that is, scored or saved
    if isinstance(section, Oialr):
        options["svd"] = section.svd
    if run.parallel.shard:
        with usage_errors("parallel.shard"):
            return Sharded(model, device_type=job.device.type, **options)
    if isinstance(section, Oialr):
        options["heat_rank"] = section.heat_rank
    return Replica(model, unused_parameters=run.parallel.unused_parameters, **options)


def build_method(run: RunFile, model: nn.Module, optimizer: Optimizer, total: int) -> Method:
    """The method of a run file, bound to a model and an optimiser.

    Raises:
        ValueError: for settings that fit neither the model nor the length of the run.
    """
    section = run.method
    check_length(section, total)
    match section:
        case DenseSection():
            return Dense(model)
        case Oialr():
            return OIALR(model, optimizer, total_steps=total, **_options(section, "svd", "heat_rank"))
        case SvdTraining():
            return SVDTraining(model, optimizer, total_steps=total, **_options(section))
        case TruncateSection():
            return Truncate(model, optimizer, total_steps=total, **_options(section))
        case FixedRankSection():
            return FixedRank(model, optimizer, **_options(section))
        case CuttlefishSection():
            return Cuttlefish(model, optimizer, total_steps=total, **_options(section))
        case NestedSection():
            return Nested(model, optimizer, seed=run.train.seed, total_steps=total, **_options(section))
        case Lora():
            return LoRA(model, optimizer, section, run.train.seed)
        case Sara() | MoSara() | Edora():
            return _ADAPTERS[type(section)](model, optimizer, seed=run.train.seed, **_options(section))


_ADAPTERS: dict[type[Section], Callable[..., Method]] = {Sara: SARA, MoSara: MoSARA, Edora: EDoRA}


def _options(section: Section, *of_others: str) -> dict[str, Any]:
    """A method's arguments, without its name and those that are the replica's."""
    options = {key: msgspec.to_builtins(value) for key, value in msgspec.structs.asdict(section).items()}
    return {key: value for key, value in options.items() if key not in ("name", *of_others)}
