"""hpclr's methods under Lightning's Trainer: real models, real trainings, real checkpoints."""

import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset

from hpclr import OIALR, SARA, Cuttlefish, EDoRA, FixedRank, MoSARA, SVDTraining, Truncate
from hpclr.errors import UsageError
from hpclr.integrations.lightning import LightningCallback

SETTINGS = {"delay": 3, "every": 3, "cutoff": 0.4, "layer_fraction": 0.5}
METHODS = {
    "oialr": (OIALR, SETTINGS),
    "svd_training": (SVDTraining, {"prune_at": 6, "energy": 0.2, "sparsity": 0.05}),
    "fixed_rank": (FixedRank, {"rank": 0.5, "frobenius_decay": 1e-3}),
    "truncate": (Truncate, {"at": 6, "rank": {"rule": "energy", "share": 0.8}}),
    "cuttlefish": (Cuttlefish, {"every": 2, "delay": 6, "window": 2}),
}
ADAPTERS = {
    "sara": (SARA, {"proportion": 0.2}),
    "mo_sara": (MoSARA, {"proportion": 0.3}),
    "edora": (EDoRA, {"rank": 3}),
}
STEPS = 12  # of two batches each; three make an epoch


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.log("test", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(48, 16, generator=draw), torch.randint(4, (48,), generator=draw)
    return DataLoader(TensorDataset(x, y), 8)


def make_trainer(out, *callbacks, **options):
    defaults = {
        "max_steps": STEPS, "accelerator": "cpu", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5,
        "default_root_dir": out, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def fit(out, callback, *, resume=None, **options):
    saving = ModelCheckpoint(out / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer, net = make_trainer(out, callback, saving, **options), Net()
    trainer.fit(net, batches(), ckpt_path=resume)
    return trainer, net


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(out, name):
    method, settings = METHODS[name]
    callback = LightningCallback(method, **settings)
    trainer, net = fit(out, callback)
    assert callback.method.steps == STEPS
    is_cut = any(rank < full for rank, full in zip(callback.method.ranks.values(), (16, 32), strict=True))
    assert is_cut or name == "cuttlefish"  # to which layers of noise are of full rank
    for step in (3, 9):
        resumed = LightningCallback(method, **settings)
        other, again = fit(out / "other", resumed, resume=out / "saved" / f"step={step}.ckpt")
        assert resumed.method.ranks == callback.method.ranks
        assert_same(net.state_dict(), again.state_dict())
        states = (one.optimizers[0].state_dict()["state"] for one in (trainer, other))
        first, second = ({(p, k): v for p, d in state.items() for k, v in d.items()} for state in states)
        assert_same(first, second)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_resumed_tested_and_merged(out, name):
    method, settings = ADAPTERS[name]
    trainer, net = fit(out, callback := LightningCallback(method, **settings))
    assert torch.equal(net.net[0].weight, Net().net[0].weight)
    early = out / "saved" / "step=9.ckpt"
    _, again = fit(out / "other", LightningCallback(method, **settings), resume=early)
    assert_same(net.state_dict(), again.state_dict())
    score = trainer.test(net, batches(), verbose=False)
    fresh = make_trainer(out, LightningCallback(method, **settings))
    assert fresh.test(Net(), batches(), ckpt_path=out / "saved" / f"step={STEPS}.ckpt", verbose=False) == score
    if name == "mo_sara":
        with pytest.raises(UsageError, match="Mo-SARA cannot be merged"):
            LightningCallback(method, dense_at_end=True, **settings)
        return
    _, merged = fit(out / "third", LightningCallback(method, dense_at_end=True, **settings), resume=early)
    callback.method.merge()
    assert torch.equal(merged.net[2].weight, net.net[2].weight)
    assert type(merged.net[2]) is nn.Linear


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_penalty_is_part_of_the_gradients_of_each_step(out):
    """As in a loop of one's own that adds it to the loss."""
    settings = {"prune_at": 2, "energy": 0.2, "sparsity": 0.5}
    callback = LightningCallback(SVDTraining, **settings)
    trainer, net = make_trainer(out, callback, max_steps=3), Net()
    trainer.fit(net, batches())
    own = Net()
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    method = SVDTraining(own, optimizer, **settings)
    for step, (x, y) in enumerate(batches()):
        (F.cross_entropy(own.net(x), y) / 2).backward()
        if step % 2:
            method.penalty().backward()
            nn.utils.clip_grad_norm_(own.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            method.step()
    assert_same(net.state_dict(), own.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_checkpoint_can_be_tested_by_a_fresh_trainer_or_the_same(out):
    trainer, net = fit(out, LightningCallback(**SETTINGS))
    last = trainer.test(net, batches(), verbose=False)
    fresh = make_trainer(out, LightningCallback(**SETTINGS))
    path = out / "saved" / f"step={STEPS}.ckpt"
    assert fresh.test(Net(), batches(), ckpt_path=path, verbose=False) == last
    early = out / "saved" / "step=6.ckpt"
    again = trainer.test(net, batches(), ckpt_path=early, verbose=False)
    assert fresh.test(Net(), batches(), ckpt_path=early, verbose=False) == again
    assert again != last


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sizes_and_ranks_go_to_the_loggers(out):
    logger = CSVLogger(out, "log")
    callback = LightningCallback(**SETTINGS)
    fit(out, callback, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        ranks = [row for row in csv.DictReader(file) if row["lowrank/rank/net.2"]]
    assert [int(row["step"]) for row in ranks] == [0, 3, 6, 9, 12]
    assert float(ranks[-1]["lowrank/rank/net.2"]) == callback.method.ranks["net.2"]
    assert float(ranks[-1]["lowrank/trainable_parameters"]) < float(ranks[0]["lowrank/trainable_parameters"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_model_can_be_dense_at_the_end(out):
    _, net = fit(out, LightningCallback(dense_at_end=True, delay=0.25, every=0.25, cutoff=0.4))
    assert type(net.net[2]) is nn.Linear
    Net().load_state_dict(net.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_work_is_refused(out):
    callback = LightningCallback(**SETTINGS)
    trainer, net = fit(out, callback)
    with pytest.raises(UsageError, match="has trained already"):
        trainer.fit(net, batches())
    trainer.save_checkpoint(out / "weights.ckpt", weights_only=True)
    with pytest.raises(UsageError, match="no state of LightningCallback"):
        fit(out, LightningCallback(**SETTINGS), resume=out / "weights.ckpt")

    class Two(Net):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[place].parameters(), lr=0.1) for place in (0, 2)]

        def training_step(self, batch, index):
            return None

        @property
        def automatic_optimization(self):
            return False

    with pytest.raises(UsageError, match="found 2 under manual optimisation"):
        make_trainer(out, LightningCallback(**SETTINGS), accumulate_grad_batches=1, gradient_clip_val=None).fit(
            Two(), batches()
        )


@pytest.mark.parametrize("average", [EMAWeightAveraging(), StochasticWeightAveraging(1e-3)], ids=["ema", "swa"])
def test_averages_that_do_not_follow_are_refused(out, average):
    with pytest.raises(UsageError, match=f"{type(average).__name__} keeps a copy"):
        make_trainer(out, LightningCallback(**SETTINGS), average).fit(Net(), batches())


def test_strategies_that_fix_shapes_are_refused(out):
    spawning = pl.Trainer(accelerator="cpu", strategy="ddp_spawn", devices=2, logger=False)
    with pytest.raises(UsageError, match="found DDPStrategy with _MultiProcessingLauncher"):
        LightningCallback(**SETTINGS).setup(spawning, Net(), "fit")

    class Derived(DDPStrategy):
        """As DeepSpeed's strategy is, whose package is not here."""

    derived = pl.Trainer(accelerator="cpu", strategy=Derived(), devices=2, logger=False)
    with pytest.raises(UsageError, match="found Derived"):
        LightningCallback(**SETTINGS).setup(derived, Net(), "fit")
    parted = pl.Trainer(accelerator="cpu", strategy=ModelParallelStrategy(), devices=2, logger=False)
    with pytest.raises(UsageError, match="found ModelParallelStrategy"):
        LightningCallback(**SETTINGS).setup(parted, Net(), "fit")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mixed_precision_goes_with_it_and_is_resumed_to_the_bit(out):
    callback = LightningCallback(**SETTINGS)
    _, net = fit(out, callback, precision="bf16-mixed")
    _, again = fit(
        out / "other", LightningCallback(**SETTINGS), resume=out / "saved" / "step=6.ckpt", precision="bf16-mixed"
    )
    assert min(callback.method.ranks.values()) < 16
    assert_same(net.state_dict(), again.state_dict())
