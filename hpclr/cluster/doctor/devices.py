"""torch, the devices that it computes on, and what it sends tensors with. Loads torch: for a process of its own."""

import os
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hpclr.cluster.doctor.circumstances import Circumstances
from hpclr.cluster.doctor.finding import Finding, failure, ok, warning
from hpclr.errors import UsageError
from hpclr.parallel.launch import visible_gpus
from hpclr.parallel.meeting.layout import check_gpus

if TYPE_CHECKING:
    import torch

_DRIVER = Path("/proc/driver/nvidia/version")
_MOST_USED = 0.1  # of a GPU's memory before a run begins; CUDA itself takes some hundred MB


def examine(here: Circumstances) -> Iterator[Finding]:
    """torch's build, this process's devices, and the backends of torch.distributed."""
    import torch

    yield ok("torch", f"{_build()}, Python {platform.python_version()}", same=f"torch {_build()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about drivers; said below
        count = torch.cuda.device_count()
    if problem := _mismatch(here, count):
        yield problem
    if count:
        yield ok("driver", _driver(), same=f"driver {_driver()}")
    else:
        yield _without_gpu()
    for index in _mine(here, count):
        yield _gpu(index)
    yield _gloo()
    yield from _nccl() if count else ()


def _build() -> str:
    import torch

    made_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    made_for = f"ROCm {torch.version.hip}" if torch.version.hip else made_for
    return f"{torch.__version__} ({made_for})"


def _mismatch(here: Circumstances, count: int) -> Finding | None:
    """Whether the processes of the node and its GPUs fit together, as a run would judge it."""
    if here.layout.world_size == 1 and count:
        return None
    try:
        check_gpus(here.layout, count, task_gpus=here.gpus, wanted="auto")
    except UsageError as error:
        found, _, advice = str(error).partition(". ")
        return failure("devices", found, advice)
    return None


def _mine(here: Circumstances, count: int) -> list[int]:
    """The devices to try: of several processes each tries its own."""
    alone = here.layout.local_size == 1 or count < here.layout.local_size
    return list(range(count)) if alone else [here.layout.local_rank]


def _without_gpu() -> Finding:
    """No CUDA device: as it should be, or not."""
    import torch

    there = visible_gpus()
    if not there and not Path("/dev/kfd").exists():
        return ok("devices", f"no GPU; {len(os.sched_getaffinity(0))} cores")
    seen = f"{there} GPUs" if there else "an AMD GPU"
    if torch.version.cuda is None and torch.version.hip is None:
        return failure(
            "devices", f"this machine has {seen}, but this torch is for CPUs only", "Install torch with CUDA or ROCm."
        )
    try:
        torch.cuda.init()
        reason = "without a reason"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    return failure(
        "devices",
        f"this machine has {seen}, but torch sees none: {reason}",
        "Look with nvidia-smi or rocm-smi whether the driver answers and is new enough for this torch; in a container "
        "apptainer needs --nv or --rocm.",
    )


def _driver() -> str:
    """`NVIDIA 550.54.15`; "unknown" where the driver does not say."""
    if not _DRIVER.exists():
        return "unknown"
    found = re.search(r"Kernel Module.*?\s([0-9]+(?:\.[0-9]+)+)\s", _DRIVER.read_text())
    return f"NVIDIA {found[1]}" if found else "unknown"


def _gpu(index: int) -> Finding:
    """Computes something whose result is known to the bit, and looks at the memory."""
    import torch

    about = f"device {index}"
    try:
        name = torch.cuda.get_device_name(index)
        numbers = torch.arange(256 * 256, dtype=torch.float32).reshape(256, 256) % 7
        right = torch.equal((numbers.to(f"cuda:{index}") @ numbers.to(f"cuda:{index}")).cpu(), numbers @ numbers)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return failure(about, f"it does not compute: {str(error).splitlines()[0]}", _LEAVE_OUT)
    if not right:
        return failure(about, f"{name} computes wrongly", _LEAVE_OUT)
    return _memory(about, name, free, total)


_LEAVE_OUT = "Leave this node out (--exclude), and tell the administrators."


def _memory(about: str, name: str, free: int, total: int) -> Finding:
    text = f"{name} computes; {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < (1 - _MOST_USED) * total:
        return warning(
            about, text, "Another process has memory there: see nvidia-smi; wait for it, or leave this node out."
        )
    return ok(about, text, same=name)


def _gloo() -> Finding:
    import torch

    try:
        right = _sum_alone("gloo", torch.device("cpu"))
    except RuntimeError as error:
        return failure(
            "gloo",
            f"it does not start: {str(error).splitlines()[0]}",
            "See the lines on the network: this host's name needs an address, or GLOO_SOCKET_IFNAME an interface.",
        )
    return ok("gloo", "works") if right else failure("gloo", "adds wrongly", "Install torch again.")


def _nccl() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        yield failure("nccl", "not in this build of torch", "Install torch with it; processes with GPUs need it.")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        right = _sum_alone("nccl", torch.device("cuda", 0))
    except RuntimeError as error:
        yield failure("nccl", f"it does not start: {str(error).splitlines()[0]}", "NCCL_DEBUG=INFO makes it say more.")
        return
    if right:
        yield ok("nccl", f"{version} works", same=f"nccl {version}")
    else:
        yield failure("nccl", "adds wrongly", _LEAVE_OUT)


def _sum_alone(backend: str, device: "torch.device") -> bool:
    """An all-reduce of this process alone."""
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    tensor = torch.arange(8.0, device=device)
    dist.all_reduce(tensor)
    result = torch.equal(tensor.cpu(), torch.arange(8.0))
    dist.destroy_process_group()
    return result
