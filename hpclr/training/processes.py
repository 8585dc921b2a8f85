"""Who this process is, by the environment alone: found out before torch is imported, in milliseconds."""

import os

from hpclr.parallel.meeting.layout import Layout, Task, resolve
from hpclr.slurm import environment as slurm


def who_am_i(launcher: str) -> Layout:
    """Which process of how many this is.

    Args:
        launcher: whose word counts; the run file's `parallel.launcher`.

    Raises:
        UsageError: if those who started it contradict one another.
    """
    found = None if launcher == "single" else slurm.read(os.environ)
    return resolve(os.environ, launcher=launcher, task=Task(*found) if found is not None else None)


def slurm_gpus() -> int | None:
    """GPUs that the Slurm job has on this node; None without Slurm or without GPUs."""
    found = slurm.read(os.environ)
    return found.gpus if found is not None else None
