"""LightningCallback in two processes, under DistributedDataParallel of Lightning's."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow

PROGRAM = """
import os
import sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from hpclr import OIALR, SVDTraining, Truncate
from hpclr.integrations.lightning import LightningCallback

METHODS = {
    "oialr": (OIALR, {"delay": 3, "every": 3, "cutoff": 0.4, "layer_fraction": 0.5}),
    "svd_training": (SVDTraining, {"prune_at": 6, "energy": 0.2, "sparsity": 0.05}),
    "truncate": (Truncate, {"at": 6, "rank": 0.25}),
}

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

def fit(name, devices, folder, resume=None):
    method, settings = METHODS[name]
    callback = LightningCallback(method, **settings)
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(96, 16, generator=draw), torch.randint(4, (96,), generator=draw)
    mine = slice(int(os.environ.get("LOCAL_RANK", 0)), None, devices)
    data = DataLoader(TensorDataset(x[mine], y[mine]), 16 // devices)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=12, accelerator="cpu", devices=devices, accumulate_grad_batches=2, gradient_clip_val=0.5,
        strategy="ddp" if devices > 1 else "auto", callbacks=[callback, saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )
    net = Net()
    trainer.fit(net, data, ckpt_path=resume)
    torch.save({"net": net.state_dict(), "ranks": callback.method.ranks}, f"{folder}/{trainer.global_rank}.pt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, devices, folder, *resume = sys.argv[1:]
    fit(name, int(devices), folder, *resume)
"""


def run(out, name, devices, folder, *resume):
    program = out / "program.py"
    program.write_text(PROGRAM)
    (out / folder).mkdir()
    done = subprocess.run(
        [sys.executable, program, name, str(devices), out / folder, *resume],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / folder / f"{rank}.pt", weights_only=True) for rank in range(devices)]


@pytest.mark.parametrize("name", ["oialr", "svd_training", "truncate"])
def test_two_processes_have_one_model_which_is_that_of_one_process(out, name):
    (alone,) = run(out, name, 1, "alone")
    first, second = run(out, name, 2, "two")
    assert first["ranks"] == second["ranks"] == alone["ranks"]
    assert min(first["ranks"].values()) < 16
    assert all(torch.equal(first["net"][key], second["net"][key]) for key in first["net"])
    for key, value in product(first["net"]).items():
        assert torch.allclose(value, product(alone["net"])[key], atol=1e-4), key


def product(state):
    """The weights of a state dict, dense: signs of singular vectors are anybody's."""
    found = {}
    for key, value in state.items():
        stem = key.rpartition(".")[0]
        if key.endswith(".u"):
            inner = state.get(f"{stem}.sigma", state.get(f"{stem}.s"))
            found[stem] = (value @ inner if inner.ndim == 2 else value * inner) @ state[f"{stem}.vh"]
        elif not key.endswith((".sigma", ".s", ".vh")):
            found[key] = value
    return found


def test_two_processes_go_on_to_the_bit(out):
    whole, _ = run(out, "oialr", 2, "two")
    for step in (3, 9):
        resumed = run(out, "oialr", 2, f"again{step}", out / "two" / f"step={step}.ckpt")
        assert all(torch.equal(whole["net"][key], one["net"][key]) for one in resumed for key in one["net"])
