"""The most memory that training has held, as the device or the operating system knows it."""

import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_THE_PEAK = "5"  # proc(5): VmHWM becomes what is resident now


class PeakMemory:
    """Measures from when it is made.

    Args:
        device: where this process trains.

    Attributes:
        of: what is measured: "cuda", the tensors on the device; "process", all of the process in main memory;
            "process since its start", the same, where the system does not let a peak begin anew.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.of = "cuda"
        else:
            self.of = "process" if _begin_anew() else "process since its start"

    def bytes(self) -> int:
        """The peak so far."""
        if self.of == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return (_high_water_mark() or since_start) if self.of == "process" else since_start


def _begin_anew() -> bool:
    """Whether the system has set the peak to what is resident now."""
    try:
        _RESET.write_text(_RESET_THE_PEAK)
    except OSError:
        return False
    return _high_water_mark() is not None


def _high_water_mark() -> int | None:
    """Bytes; None where the system does not tell."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
