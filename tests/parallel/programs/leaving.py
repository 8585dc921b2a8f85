"""The end of a program of several processes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist


def leave(result: Any) -> None:
    """Leaves this process's result where `together` looks for it, and ends the process at once, as hpclr's own do.

    DDP keeps the process group, and with it gloo's threads, to the end of the process. One that has yet to let go of a
    tensor then asks for an interpreter that is being taken down, and the process aborts: rarely, on a busy machine.
    """
    (Path(os.environ["RESULTS"]) / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
