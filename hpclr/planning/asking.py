"""From what a user asks to a plan on the screen."""

import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, cast

from hpclr.cluster.profiles import load_profile
from hpclr.config import RunFile
from hpclr.config.schema import Section
from hpclr.errors import UsageError
from hpclr.output import Unfailing
from hpclr.planning.checking import CheckPace, CheckRange
from hpclr.planning.counting import Counts, share_of
from hpclr.planning.estimate import Means, Plan, plan_of
from hpclr.planning.forms import layers_of
from hpclr.planning.hardware import Hardware, hardware_of
from hpclr.planning.like import path_like
from hpclr.planning.measuring import Measured, measured
from hpclr.planning.pace import assumed_paces
from hpclr.planning.page import show
from hpclr.planning.ranks import Assumed, assumed_of, path_of
from hpclr.planning.subject import Said, blank_model, subject_of

_MOST_ROWS = 100  # of a table
_MOST_NUMBERS = 10**9  # in a sample
_LONGEST = 60  # characters of what was asked for that an error repeats
# Of the device's operations a second in float64, what examinations reach, and the seconds that each layer takes at
# least: assumed, in LAPACK and on GPUs, at worst and at best.
_CHECKS_ON_CPU, _CHECKS_ON_GPU = ((0.05, 2e-3), (0.6, 2e-4)), ((0.01, 1e-2), (0.3, 1e-3))


@dataclass(frozen=True)
class Wishes:
    """The options of `hpclr plan`, as they were written."""

    nodes: str = "1"
    gpu: str | None = None
    gpus_per_node: int | None = None
    profile: str | None = None
    partition: str | None = None
    hardware: tuple[str, ...] = ()
    path: str | None = None
    like: Path | None = None
    measure: bool = False
    samples: int | None = None
    shape: str | None = None
    classes: int | None = None
    as_json: bool = False


def answer(run: RunFile, wishes: Wishes) -> None:
    """Plans a run, and prints that.

    Raises:
        UsageError: for wishes that cannot be, or a run that could not be either.
    """
    found, measurement = planned(run, wishes)
    if wishes.as_json:
        print(json.dumps(as_json(found, measurement), indent=2), file=Unfailing(sys.stdout))
    else:
        show(found, measurement)


def planned(run: RunFile, wishes: Wishes) -> tuple[Plan, Measured | None]:
    """The plan, and what was measured for it."""
    nodes, hardware = _nodes(wishes.nodes), _hardware(wishes)
    subject = subject_of(run, _said(wishes))
    model, section = blank_model(subject), cast(Section, run.method)
    layers = layers_of(section, model)
    if wishes.like is not None and wishes.path is not None:
        raise UsageError("--like and --path are two answers to one question, the path of ranks; give one of them")
    if not layers and (wishes.like is not None or wishes.path is not None):
        raise UsageError("--like and --path tell the path of ranks, and method dense has none; leave them out")
    if wishes.like is not None:
        path = path_like(wishes.like, run, layers, subject.steps)
    else:
        path = path_of(section, layers, subject.steps, assumed_of(wishes.path) if wishes.path else Assumed())
    counts = Counts(subject, model)
    paces = assumed_paces(hardware, run.train.precision)
    means = Means(counts, layers, path, hardware, paces, _check_range(hardware))
    if not wishes.measure:
        return plan_of(means, nodes), None
    processes = nodes[0] * hardware.per_node
    if run.data.batch_size % processes:
        raise UsageError(
            f"--measure takes a process's part of the batch on the first number of --nodes, but {processes} processes "
            f"cannot share data.batch_size {run.data.batch_size} equally; begin with another number"
        )
    found = measured(counts, layers, path, share_of(subject, processes))
    paces_found = found.paces([pace.reached for pace in paces])
    return plan_of(replace(means, paces=paces_found, check=found.check), nodes), found


def as_json(plan: Plan, measurement: Measured | None) -> dict[str, Any]:
    """Plain numbers; ranges have `low` and `high`; times in seconds, sizes in bytes, energy in kWh."""
    return asdict(plan) | {"measured": None if measurement is None else asdict(measurement)}


def _nodes(text: str) -> list[int]:
    words = text.split(",")
    if not all(re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*", word, re.ASCII) for word in words) or len(words) > _MOST_ROWS:
        raise UsageError(
            f"--nodes {_cut(text)}: expected whole numbers from 1 to 999,999 with commas between them, at most "
            f"{_MOST_ROWS} of them, such as 1,2,4,8"
        )
    return [int(word) for word in words]


def _cut(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def _hardware(wishes: Wishes) -> Hardware:
    per_node = wishes.gpus_per_node or _of_profile(wishes)
    name = wishes.gpu or ("cpu" if wishes.measure and not _has_gpu() else "a100")
    found = hardware_of(name, per_node, wishes.hardware)
    if wishes.measure and found.queues != _has_gpu():
        raise UsageError(
            f"--measure takes steps on this machine, which has {'a GPU' if _has_gpu() else 'no GPU'}, so it says "
            f"nothing of --gpu {name}; run it on a node of the target, or plan without it"
        )
    return found


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _of_profile(wishes: Wishes) -> int | None:
    if wishes.profile is None:
        if wishes.partition is not None:
            raise UsageError(
                f"--partition {wishes.partition} is one of a cluster profile's; say which with --profile, or how many "
                "GPUs a node has with --gpus-per-node"
            )
        return None
    partitions = load_profile(wishes.profile).partitions
    name = wishes.partition or next(iter(partitions), None)
    if name is None or name not in partitions:
        raise UsageError(
            f"the cluster profile {wishes.profile} has no partition {name or 'at all'}; "
            f"it has {', '.join(partitions) or 'none'}. Say --gpus-per-node instead"
        )
    return partitions[name].gpus_per_node or None


def _check_range(hardware: Hardware) -> CheckRange:
    slow, fast = _CHECKS_ON_GPU if hardware.queues else _CHECKS_ON_CPU
    at_worst, at_best = (CheckPace(share * hardware.float64, each) for share, each in (slow, fast))
    return CheckRange(at_worst, at_best)


def _said(wishes: Wishes) -> Said | None:
    if wishes.samples is None:
        if wishes.shape or wishes.classes:
            raise UsageError("--shape and --classes describe data that is not here; add --samples, how many there are")
        return None
    words = wishes.shape.split("x") if wishes.shape else []
    if not all(re.fullmatch("[1-9][0-9]{0,9}", word, re.ASCII) for word in words) or _product(words) > _MOST_NUMBERS:
        raise UsageError(
            f"--shape {_cut(wishes.shape or '')}: expected sizes with x between them, such as 3x32x32, and at most "
            f"{_MOST_NUMBERS:,} numbers in a sample"
        )
    return Said(wishes.samples, tuple(map(int, words)), wishes.classes or 0)


def _product(words: list[str]) -> int:
    return prod(map(int, words))
