"""Replicas that train together: the same as one process, equal among themselves, and little on the wire."""

import copy
import functools
import pickle

import pytest
import torch
from together import together
from torch import nn

from hpclr.parallel import Replica


@functools.cache
def run(processes, way, optimizer="sgd", order="size"):
    return together(processes, "oialr_loop.py", way, optimizer, order)


@pytest.mark.parametrize(
    ("processes", "way", "order"),
    [(2, "rank0", "size"), (2, "spread", "size"), (4, "rank0", "size"), (4, "spread", "size"), (2, "spread", "output")],
)
def test_many_processes_train_as_one(processes, way, order):
    [alone] = run(1, "rank0", order=order)
    for replica in run(processes, way, order=order):
        assert replica["ranks"] == alone["ranks"]
        difference = torch.tensor(replica["weights"]) - torch.tensor(alone["weights"])
        assert difference.norm() < 1e-6
    assert len(alone["ranks"]) == 6
    assert alone["ranks"][-1] != alone["ranks"][0]


def test_a_head_and_its_embedding_train_as_one_weight_on_all_processes():
    [alone], replicas = (together(processes, "tied_loop.py") for processes in (1, 2))
    assert len({replica["digest"] for replica in replicas}) == 1
    assert len({str(replica["outside"]) for replica in replicas}) == 1
    assert 1 < alone["ranks"][-1]["head"] < 12
    for replica in replicas:
        assert replica["ranks"] == alone["ranks"]
        assert replica["outside"][2:] == pytest.approx(alone["outside"][2:], abs=1e-9)
        assert replica["table"] == replica["weight"]
        assert torch.tensor(replica["weight"]) == pytest.approx(torch.tensor(alone["weight"]), abs=1e-9)
        assert replica["reduced"] == replica["sigma_and_rest"]


def test_another_order_gives_other_ranks():
    assert run(1, "rank0", order="output")[0]["ranks"] != run(1, "rank0")[0]["ranks"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("way", ["rank0", "spread"])
def test_replicas_are_equal_to_the_bit(processes, way):
    replicas = run(processes, way)
    assert len({replica["digest"] for replica in replicas}) == 1
    assert len({replica["moments"] for replica in replicas}) == 1


@pytest.mark.parametrize("processes", [2, 4])
def test_what_frozen_bases_leave_out_is_that_of_the_whole_batch(processes):
    """Of the mean gradient, not the mean of the processes' shares."""
    [alone] = run(1, "rank0")
    assert [len(found) for found in alone["outside"]] == [0, 0, 3, 3, 3, 3]
    for replica in run(processes, "spread"):
        for found, expected in zip(replica["outside"], alone["outside"], strict=True):
            assert found == pytest.approx(expected, abs=1e-9)
    assert len({str(replica["outside"]) for replica in run(processes, "rank0")}) == 1


def test_all_processes_gather_or_nobody_has_anything():
    """A layer that no sample of a process comes to has a gradient of zeros there."""
    for found in together(2, "probing.py"):
        assert found["one process gathers"] == {}
        assert found["half of the batch"] == pytest.approx(found["whole batch"], abs=1e-9)
        assert found["whole batch"].keys() == {"0", "1"}


@pytest.mark.parametrize("processes", [2, 4])
def test_spread_gives_what_rank0_gives_to_the_bit(processes):
    for spread, rank0 in zip(run(processes, "spread"), run(processes, "rank0"), strict=True):
        assert {**spread, "weights": None} == {**rank0, "weights": None}
        assert spread["weights"] == rank0["weights"]


@pytest.mark.parametrize("optimizer", ["adamw"])
def test_other_optimisers_follow(optimizer):
    [alone] = run(1, "rank0", optimizer)
    replicas = run(2, "spread", optimizer)
    assert len({replica["moments"] for replica in replicas}) == 1
    assert replicas[0]["ranks"] == alone["ranks"]
    assert (torch.tensor(replicas[0]["weights"]) - torch.tensor(alone["weights"])).norm() < 1e-6


@pytest.mark.parametrize("processes", [2, 4])
def test_only_what_is_trained_goes_over_the_wire(processes):
    for replica in run(processes, "rank0"):
        ranks = replica["ranks"][-1]
        sigmas = sum(k * k for k in ranks.values())
        rest = (32 + 32 + 24 + 5) + 24 * 5  # the biases, and the head
        assert replica["counted"] == 8 * (sigmas + rest) == replica["trained"]


def test_all_begin_with_the_first_ones_weights_sent_in_parcels():
    """A whole model in one message would need room for two more of it."""
    first, *others = together(3, "start.py")
    for other in others:
        assert other["before"] != first["before"]
        assert other["after"] == first["after"] == first["before"]
        assert other["sent"] == first["sent"]
    large = [size for size in first["sent"] if size > 8]  # each has its length before it
    head, table = 400, 1024 * 64 * 4  # a large tensor goes by itself
    assert len(large) == 7
    assert sum(size <= 40_000 + head for size in large) == 6
    assert table < max(large) <= table + head


def test_a_replica_can_be_copied_and_pickled():
    replica = Replica(nn.Linear(3, 3))
    for other in (copy.deepcopy(replica), pickle.loads(pickle.dumps(replica))):
        assert torch.equal(other(torch.ones(3)), replica(torch.ones(3)))


def test_a_replica_from_before_the_processes_met_is_refused(tmp_path):
    program = tmp_path / "early.py"
    program.write_text(EARLY)
    for found in together(2, str(program)):
        assert "made before init_process_group joined 2 processes" in found


EARLY = """
import json, os
from pathlib import Path
import torch, torch.distributed as dist
from hpclr.parallel import Replica

replica = Replica(torch.nn.Linear(2, 2))
dist.init_process_group("gloo")
try:
    replica(torch.ones(2))
except RuntimeError as error:
    (Path(os.environ["RESULTS"]) / f"{dist.get_rank()}.json").write_text(json.dumps(str(error)))
dist.barrier()
dist.destroy_process_group()
"""
