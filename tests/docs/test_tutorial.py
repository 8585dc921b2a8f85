"""The tutorial's commands, one after the other, and the program at its end."""

import re
import subprocess
import sys

import pytest
import torch
from documents import ROOT, blocks, commands, split

import hpclr.cli

PAGE = ROOT / "docs" / "tutorial.md"
ON_A_CLUSTER = ("hpclr status", "hpclr watch", "hpclr stop", "hpclr resume")


@pytest.mark.slow
def test_the_way_of_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    threads = torch.get_num_threads()
    for block in blocks(PAGE):
        if block.file:
            (tmp_path / block.file).write_text(re.sub(r"epochs: \d+", "epochs: 2", block.text))
    for line in commands(PAGE):
        if line.startswith(ON_A_CLUSTER) or ("submit" in line and "--dry-run" not in line):
            continue
        quick = ["train.threads=1"] if line.startswith("hpclr train") else []
        words = [word.replace("epochs=12", "epochs=3") for word in split(line)]
        hpclr.cli.hpclr.main([*words, *quick], standalone_mode=False)
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "#SBATCH" in out
    assert {run.name for run in (tmp_path / "runs").iterdir()} == {"trial", "small"}
    assert (tmp_path / "report.html").exists()
    used = subprocess.run([sys.executable, "use.py"], capture_output=True, text=True, timeout=60, check=False)
    assert used.stdout == "torch.Size([1, 10])\n", used.stderr
