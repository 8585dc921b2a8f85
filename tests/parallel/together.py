"""Programs in several processes, as torchrun starts them but with torch imported already; for tests of this folder."""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"


def together(processes: int, program: str, *arguments: str, timeout: float = 120) -> list[dict]:
    """What each process of a program left as RESULTS/RANK.json, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpclr.parallel.sharded", "hpclr.methods"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    with tempfile.TemporaryDirectory() as results:
        started = [
            context.Process(target=_run, args=(rank, processes, store.port, results, program, arguments), daemon=True)
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout)
            process.kill()
        said = "\n".join(file.read_text()[-3000:] for file in sorted(Path(results).glob("*.err")))
        assert [process.exitcode for process in started] == [0] * processes, said
        return [json.loads((Path(results) / f"{rank}.json").read_text()) for rank in range(processes)]


def _run(rank: int, size: int, port: int, results: str, program: str, arguments: tuple[str, ...]) -> None:
    os.dup2(os.open(Path(results) / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "RESULTS": results, "OMP_NUM_THREADS": "1"}
    # the store is there already, as that of torchrun's own process is
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(PROGRAMS))
    runpy.run_path(str(PROGRAMS / program), run_name="__main__")
