"""Programs in several processes, started by torchrun, for the tests of this folder."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


def together(processes: int, program: str, *arguments: str, timeout: float = 120) -> list[dict]:
    """What each process of a program left as RESULTS/RANK.json, by rank."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as results:
        done = subprocess.run(
            [*torchrun, str(PROGRAMS / program), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RESULTS": results},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((Path(results) / f"{rank}.json").read_text()) for rank in range(processes)]
