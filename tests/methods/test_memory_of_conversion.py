"""What a conversion holds beside the model: a few layers' worth, whatever the number of layers."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import mlp, orthonormal, sites
from torch import Tensor

from hpclr import OIALR
from hpclr.lowrank.factors import SVD
from hpclr.methods.placement import Here
from hpclr.methods.stability import StabilityTracker

MEMORY = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "memory.py"))

LAYERS, WIDTH, RANK = 40, 64, 6
A_LAYER = WIDTH * WIDTH * 4  # bytes of a dense weight
SETTINGS = {"every": 1, "layer_fraction": 1.0, "keep_last": False}

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


class Training:
    """Layers of rank 6 with AdamW; converted at step 1 (when_it_pays: at step 2, the first check that covers them)."""

    def __init__(self, convert: str, device: str = "cpu", **settings: object) -> None:
        self.model = mlp([WIDTH] * (LAYERS + 1)).to(device)
        for seed, site in enumerate(sites(self.model).values()):
            factors = (orthonormal(WIDTH, RANK, s, torch.float32).to(device) for s in (seed, seed + 100))
            site.parameter.data.copy_(next(factors) @ next(factors).mT)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.x = torch.randn(512, WIDTH, device=device)
        self.oialr = OIALR(self.model, self.optimizer, delay=1, convert=convert, **SETTINGS, **settings)
        self.step()
        if convert == "when_it_pays":
            self.oialr.step()
            self.step()

    def step(self) -> None:
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("convert", ["at_delay", "when_it_pays"])
def test_a_conversion_holds_a_few_layers_and_no_second_model(convert, device):
    with MEMORY["Recording"](torch.device(device)) as recording:
        training = Training(convert, device)
        recording.phase("step", training.step)
        recording.phase("before", lambda: None)
        assert not any(training.oialr.frozen.values())
        recording.phase("conversion", training.oialr.step)
        assert all(training.oialr.frozen.values())
        recording.phase("after", lambda: None)
    peaks = recording.peaks()
    beside = peaks["conversion"] - max(peaks["before"], peaks["after"])
    assert 0 < beside < 16 * A_LAYER < LAYERS * A_LAYER, "factors of all layers beside the model take twice as much"
    assert peaks["conversion"] < peaks["step"]


class RowsOfALargerMatrix(Here):
    """A decomposition whose leading directions lie in one piece, as some libraries for GPUs give it."""

    def decompose(self, matrix: Tensor, *, dense: bool) -> SVD:
        u, s, vh = super().decompose(matrix, dense=dense)
        return SVD(u.mT.contiguous().mT, s, vh.contiguous())


def test_factors_do_not_keep_a_larger_matrix_alive():
    training = Training("when_it_pays", placement=RowsOfALargerMatrix())
    training.oialr.step()
    assert set(training.oialr.ranks.values()) == {RANK}
    tensors = [*training.model.parameters(), *_moments(training.optimizer)]
    assert [t.untyped_storage().nbytes() for t in tensors] == [t.nbytes for t in tensors]
    assert sum(site.factors.vh.numel() for site in sites(training.model).values()) == LAYERS * RANK * WIDTH


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor))


def test_bases_are_remembered_in_main_memory_and_forgotten_when_frozen():
    with pytest.raises(NotImplementedError, match="meta tensor"):  # of which there is nothing to take there
        StabilityTracker(0.99).remember("layer", torch.empty(3, 3, device="meta"))
    training = Training("at_delay")
    before = _remembered(training.oialr)
    training.oialr.step()
    assert LAYERS * A_LAYER / 2 <= before <= LAYERS * A_LAYER
    assert _remembered(training.oialr) == LAYERS * WIDTH * 4


def _remembered(oialr: OIALR) -> int:
    kept = oialr.state_dict()["stability"]["polar"].values()
    assert all(tensor.device.type == "cpu" for tensor in kept)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)
