"""The batch script of a job array whose elements are runs, each with a batch script and logs of its own."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpclr.slurm.client import ask
from hpclr.slurm.script import BatchScript

_ELEMENT = r"""
RUN=${RUNS[SLURM_ARRAY_TASK_ID]}
mkdir -p "$RUN/logs"
# Its output goes to where that of a job of its own would; what Slurm says of it stays here.
exec >>"$RUN/logs/${SLURM_JOB_ID}_0_log.out" 2>>"$RUN/logs/${SLURM_JOB_ID}_0_log.err"
exec bash "$RUN/submission/job.sh"
"""


def array_script(name: str, directory: Path, scripts: Sequence[BatchScript], at_once: int | None = None) -> str:
    """The text of a batch script that is submitted once for all of these.

    Args:
        name: of the array.
        directory: absolute; `logs/` in it, which must be there, takes what is not the output of a run.
        scripts: those of the runs, which ask for the same resources.
        at_once: how many may run at a time; None: as many as there is room for.

    Raises:
        UsageError: as `BatchScript.text`.
    """
    limit = "" if at_once is None else f"%{at_once}"
    warning = max(script.warning for script in scripts)
    head, _, _ = (
        replace(scripts[0], name=name, run=directory, warning=warning).text().partition("\nset -euo pipefail\n")
    )
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {len(scripts)} runs of hpclr, each an element of a job array, which requeues itself.",
            "# `sbatch` this file, and they begin, or go on where they are.",
            *(line for line in head.splitlines() if line.startswith("#SBATCH ")),
            f"#SBATCH --array=0-{len(scripts) - 1}{limit}",
            "set -euo pipefail",
            "",
            "RUNS=(",
            *(f"  {shlex.quote(str(script.run))}" for script in scripts),
            ")",
            _ELEMENT.lstrip(),
        ]
    )


def most_elements() -> int | None:
    """How many elements an array may have on this cluster; None if Slurm does not say."""
    try:
        answer = ask("scontrol", "show", "config")
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*([0-9]+)", answer.stdout, re.MULTILINE)
    return int(found[1]) if found is not None else None
