import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpclr.errors import UsageError
from hpclr.parallel.heat import import_heat, leading_svd

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
needs_heat = pytest.mark.skipif(find_spec("heat") is None, reason="heat is not installed")
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun", path=ENVIRONMENT["PATH"]) is None, reason="no mpirun")

RANKS = {"tall": 10, "wide": 12, "slow": 20, "full": 30, "lower": 20, "tiny": 4, "zero": 3, "double": 7}
FACTORS = """
import sys
import numpy as np
import torch
from hpclr.parallel import mpi
from hpclr.parallel.heat import column_statistics, import_heat, label_counts, leading_svd, load

folder, ranks = sys.argv[1], eval(sys.argv[2])
torch.manual_seed(5)
torch.set_num_threads(2)
before = torch.get_rng_state()
sys.path.insert(0, folder)
import_heat("this test")
assert torch.equal(before, torch.get_rng_state())
assert torch.initial_seed() == 5
assert torch.get_num_threads() == 2
torch.set_num_threads(1)
print(sorted(name for name in sys.modules if name.startswith("torchvision")))

found = {}
for name, matrix in np.load(f"{folder}/matrices.npz").items():
    for part, tensor in zip("usv", leading_svd(torch.from_numpy(matrix), ranks[name])):
        found[f"{name}-{part}"] = tensor.numpy()
for name in ("few", "many"):
    statistics = column_statistics(load(f"{folder}/samples.h5", name), 64)._asdict()
    found |= {f"{name}-{field}": values for field, values in statistics.items()}
found["counts"] = label_counts(load(f"{folder}/samples.h5", "labels"), 9)
world = mpi.world("this test")
np.savez(f"{folder}/found-{world.Get_rank()}-of-{world.Get_size()}.npz", **found)
"""


def matrix(rows, columns, singular_values, dtype=np.float32):
    rng, k = np.random.default_rng(rows), min(rows, columns)
    left, right = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in (rows, columns))
    return ((left * singular_values(np.arange(k))) @ right.T).astype(dtype)


SAMPLES = {
    "few": np.random.default_rng(0).integers(0, 256, (3, 3, 5, 5), dtype=np.uint8),  # fewer than processes
    "many": matrix(1500, 12, lambda i: 9 * 0.8**i).reshape(-1, 2, 6) + 100,
    "labels": np.arange(40) ** 2 % 7,
}
MATRICES = {
    "tall": matrix(211, 60, lambda i: 0.7**i),
    "wide": matrix(61, 200, lambda i: 0.7**i),
    "slow": matrix(300, 300, lambda i: (1 + i) ** -0.5),
    "full": matrix(30, 77, lambda i: (1 + i) ** -0.5),
    "lower": matrix(50, 40, lambda i: i < 7),
    "tiny": matrix(40, 30, lambda i: 1e-9 * 0.5**i),
    "zero": matrix(10, 11, lambda i: 0 * i),
    "double": matrix(3000, 7, lambda i: 0.1**i, np.float64),
}


def run(processes, folder, program, *arguments):
    started = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(processes)] if processes else []
    return subprocess.run(
        [*started, sys.executable, "-c", program, str(folder), *arguments],
        capture_output=True, text=True, timeout=60, env=ENVIRONMENT,
    )  # fmt: skip


@needs_heat
@needs_mpirun
@pytest.mark.parametrize(("processes", "torchvision"), [(0, False), (2, True), (4, False)])
def test_what_heat_computes(processes, torchvision, tmp_path):
    """One program for all of it, because starting MPI, torch and heat takes seconds.

    Also: importing heat leaves no trace on torch, nor a torchvision where there was none.
    """
    np.savez(tmp_path / "matrices.npz", **MATRICES)
    with h5py.File(tmp_path / "samples.h5", "w") as file:
        file.update(SAMPLES)
    if torchvision:
        write_torchvision(tmp_path / "torchvision")
    done = run(processes, tmp_path, FACTORS, str(RANKS))
    assert done.returncode == 0, done.stderr
    is_there = torchvision or find_spec("torchvision") is not None
    assert done.stdout.count("'torchvision', 'torchvision.datasets'") == (processes if is_there else 0)
    size = max(1, processes)
    found = [dict(np.load(tmp_path / f"found-{rank}-of-{size}.npz")) for rank in range(size)]
    for other in found[1:]:
        assert all(other[name].tobytes() == values.tobytes() for name, values in found[0].items())
    for name, of in MATRICES.items():
        check_factors(of, RANKS[name], *(found[0][f"{name}-{part}"] for part in "usv"), slow=name == "slow")
    for name in ("few", "many"):
        check_statistics(SAMPLES[name].astype(float), {k[len(name) + 1 :]: v for k, v in found[0].items() if name in k})
    assert found[0]["counts"].tolist() == np.bincount(SAMPLES["labels"], minlength=9).tolist()


def check_statistics(x, found):
    rows = x.reshape(len(x), -1)
    s, vh = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[1:]
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    assert found["samples"] == len(x)
    assert found["mean"] == pytest.approx(x.mean(axis=axes), rel=1e-13)
    assert found["std"] == pytest.approx(x.std(axis=axes), rel=1e-12)
    k = min(rows.shape)
    assert found["components"].shape == (k, rows.shape[1])
    assert found["components"].dtype == np.float32
    assert np.abs(found["components"] @ found["components"].T - np.eye(k)).max() < 1e-5
    assert np.abs(np.sum(found["components"] * vh, axis=1))[: k - 1] == pytest.approx(np.ones(k - 1), abs=1e-4)
    assert (found["components"].max(axis=1) >= -found["components"].min(axis=1)).all()
    assert found["singular_values"] == pytest.approx(s, rel=1e-5, abs=1e-3)
    assert found["explained_variance"] == pytest.approx(found["singular_values"] ** 2 / len(x), rel=1e-12)
    assert found["explained_variance_ratio"] == pytest.approx(s**2 / np.square(s).sum(), abs=1e-6)


def write_torchvision(package):
    """As much of it as heat uses."""
    package.mkdir()
    (package / "__init__.py").write_text("from . import datasets, transforms")
    (package / "datasets.py").write_text("class MNIST: pass")
    (package / "transforms.py").write_text("class Compose: pass")


def check_factors(of, rank, u, s, vh, slow):
    tolerance = 1e-13 if of.dtype == np.float64 else 1e-5
    assert u.dtype == s.dtype == vh.dtype == of.dtype
    assert (u.shape, s.shape, vh.shape) == ((len(of), rank), (rank,), (rank, of.shape[1]))
    assert np.abs(u.T @ u - np.eye(rank)).max() < tolerance
    assert np.abs(vh @ vh.T - np.eye(rank)).max() < tolerance
    assert (np.diff(s) <= 0).all()
    best = torch.linalg.svd(torch.from_numpy(of)).S.numpy()
    assert np.abs(s - best[:rank]).max() <= (5e-3 if slow else tolerance) * best[0]
    missed = np.linalg.norm((u * s) @ vh - of) - np.linalg.norm(best[rank:])
    assert missed <= (1e-3 if slow else tolerance) * np.linalg.norm(of)


@pytest.mark.parametrize(("shape", "rank"), [((4, 3), 0), ((4, 3), 4), ((4,), 1)])
def test_ranks_that_a_matrix_cannot_have(shape, rank):
    with pytest.raises(ValueError, match="rank of 1 to its shorter side"):
        leading_svd(torch.ones(shape), rank)


def test_a_matrix_with_nan_fails_as_with_torch():
    with pytest.raises(torch.linalg.LinAlgError):
        leading_svd(torch.tensor([[1.0, float("nan")]]), 1)


def test_without_heat_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "heat", None)
    with pytest.raises(UsageError, match=r"svd: heat needs heat.*hpclr\[heat\].*--no-deps heat==1\.8\.0"):
        import_heat("method.svd: heat")
