"""From the `method` section to the method, and to what it needs of the processes."""

from typing import Any

import msgspec
from torch import nn
from torch.optim import Optimizer

from hpclr.config import RunFile
from hpclr.config.schema import Cuttlefish as CuttlefishSection
from hpclr.config.schema import Dense as DenseSection
from hpclr.config.schema import FixedRank as FixedRankSection
from hpclr.config.schema import Oialr, Section, SvdTraining
from hpclr.config.schema import Truncate as TruncateSection
from hpclr.methods import OIALR, Cuttlefish, Dense, FixedRank, Method, SVDTraining, Truncate
from hpclr.parallel.replica import Replica
from hpclr.training.job import Job
from hpclr.training.lengths import check_length


def build_replica(run: RunFile, model: nn.Module, job: Job) -> Replica:
    """The model on all processes, with what the method asks of them."""
    section, options = run.method, {}
    if isinstance(section, Oialr):
        options = {"svd": section.svd, "heat_rank": section.heat_rank}
    return Replica(
        model,
        broadcast_buffers=False,  # not in every step: before they are read, that is, scored or saved
        unused_parameters=run.parallel.unused_parameters,
        doing=job.doing,
        **options,  # type: ignore[arg-type]
    )


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


def _options(section: Section, *of_others: str) -> dict[str, Any]:
    """A method's arguments, without its name and those that are the replica's."""
    options = {key: msgspec.to_builtins(value) for key, value in msgspec.structs.asdict(section).items()}
    return {key: value for key, value in options.items() if key not in ("name", *of_others)}
