"""The programs and commands in the documents are run as they stand, page by page, in an empty directory."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from documents import PAGES, ROOT, blocks, commands, name, split
from torch import nn

import hpclr.cli

# These pages are run by tests of their own rooms, which know what comes out.
TESTED_ELSEWHERE = {
    "docs/checkpoint-format.md": "tests/checkpoint/test_checkpoint_format.py",
    "docs/data.md": "tests/data/test_data_page.py",
    "docs/export.md": "tests/training/test_export.py",
    "docs/rank-rules.md": "tests/lowrank/test_ranks.py",
}
RUN_HERE = [
    page
    for page in PAGES
    if any(block.file is None for block in blocks(page, "python")) and name(page) not in TESTED_ELSEWHERE
]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """One thread, an empty current directory, and nothing left behind on the import path."""
    threads, limit = torch.get_num_threads(), torch._dynamo.config.recompile_limit
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.parametrize("page", RUN_HERE, ids=name)
def test_python_blocks_run_in_order(page):
    namespace = {"__name__": "page"}
    for block in blocks(page, "python"):
        if block.file is None:  # else it is a program of its own, or a module
            exec(compile(block.text, name(page), "exec"), namespace)


@pytest.mark.parametrize(("page", "test"), TESTED_ELSEWHERE.items(), ids=TESTED_ELSEWHERE)
def test_the_other_pages_are_read_by_the_tests_named_here(page, test):
    assert page.removeprefix("docs/") in (ROOT / test).read_text(encoding="utf-8")


def test_the_commands_to_get_started_work_one_after_the_other(empty_directory, monkeypatch, capsys):
    page = ROOT / "docs" / "getting-started.md"
    for block in blocks(page):
        if block.file:
            short = re.sub(r"(epochs|depth): \d+", r"\1: 1", block.text)
            (empty_directory / block.file).write_text(short)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    for line in commands(page):
        quick = ["train.threads=1"] if line.startswith(("hpclr train", "hpclr launch")) else []
        ended = pytest.raises(SystemExit, match=r"^0$") if line.startswith("hpclr launch") else nullcontext()
        with ended:
            hpclr.cli.hpclr.main([*split(line), *quick], standalone_mode=False)
    assert {run.name for run in (empty_directory / "runs").iterdir()} == {
        "digits", "digits-dense", "digits-energy", "digits-2", "mine"
    }  # fmt: skip
    summary = json.loads((empty_directory / "runs" / "digits" / "summary.json").read_text())
    assert any(layer["converted"] for layer in summary["layers"])
    assert "runs/mine/checkpoints" in capsys.readouterr().out


def test_the_quickstart_and_the_readme_name_the_same_commands():
    script = (ROOT / "jobs" / "quickstart.sh").read_text(encoding="utf-8")
    trained = [shlex.split(line) for line in script.splitlines() if line.startswith("hpclr train")]
    assert trained == [shlex.split(line) for line in commands(ROOT / "README.md") if line.startswith("hpclr train")]


class Loop:
    """What the README's loop takes for granted: a model, a loader and a criterion."""

    def __init__(self, steps):
        torch.manual_seed(0)
        self.namespace = {
            "torch": torch,
            "dist": dist,
            "DistributedDataParallel": nn.parallel.DistributedDataParallel,
            "make_model": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
            "loader": [(torch.randn(2, 4), torch.tensor([0, 1]))] * steps,
            "criterion": nn.CrossEntropyLoss(),
        }

    def run(self, lines):
        exec("\n".join(line[1:] for line in lines), self.namespace)
        return self.namespace


def test_the_three_lines_of_the_readme_are_all_it_takes():
    (diff,) = blocks(ROOT / "README.md", "diff")
    lines = diff.text.splitlines()
    assert [line[0] for line in lines].count("+") == 3
    plain = Loop(steps=3).run([line for line in lines if line[0] == " "])
    assert type(plain["model"][0]) is nn.Linear
    trained = Loop(steps=1000).run(lines)
    assert trained["oialr"].frozen == {"0": True}


def test_what_a_parallel_loop_changes(monkeypatch):
    (diff,) = blocks(ROOT / "docs" / "library.md", "diff")
    lines = diff.text.splitlines()
    for variable, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(variable, str(value))
    try:
        plain = Loop(steps=3).run([line for line in lines if line[0] in " -"])
        assert type(plain["model"]) is nn.parallel.DistributedDataParallel
    finally:
        dist.destroy_process_group()
    try:
        trained = Loop(steps=1000).run([line for line in lines if line[0] in " +"])
        assert trained["oialr"].frozen == {"0": True}
    finally:
        dist.destroy_process_group()


def in_processes(number, directory, *, epochs):
    """Runs the parallel program of the library's page; returns what it saves and what it prints."""
    (program,) = [
        block for block in blocks(ROOT / "docs" / "library.md", "python") if block.file == "train_parallel.py"
    ]
    (directory / program.file).write_text(re.sub(r"(?<=^EPOCHS = )\d+", str(epochs), program.text, flags=re.MULTILINE))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, program.file], capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(directory / "parallel.pt", weights_only=True), done.stdout


def test_the_parallel_program_on_one_process_goes_on_with_two(empty_directory):
    half, printed = in_processes(1, empty_directory, epochs=6)
    assert half["oialr"]["steps"] == 6 * 22
    assert "1 processes" in printed
    whole, printed = in_processes(2, empty_directory, epochs=12)
    assert whole["oialr"]["steps"] == 12 * 22
    assert whole["oialr"]["stability"].keys() == half["oialr"]["stability"].keys()
    assert sum(whole["oialr"]["ranks"].values()) < sum(half["oialr"]["ranks"].values())
    assert float(re.search(r"2 processes, .*accuracy ([\d.]+)", printed)[1]) > 0.85
    now, dense = (int(found.replace(",", "")) for found in re.findall(r"[\d,]{5,}", printed))
    assert now < 0.4 * dense
