"""heat: the one place that imports it, and not before it is needed, because heat starts MPI.

What is computed here is spread over all processes of the MPI job (or is done by one process), and every process
must call these functions together, with the same arguments.

Two habits of heat 1.8 shape the code. Its `mean` and `std` merge the parts of the processes in float32 whatever the
type of the data, so sums are taken in float64 and only then added up by heat. Its `hsvd_rank` drops singular values
below an absolute size, so what it gets is scaled first.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpclr.errors import UsageError
from hpclr.parallel import mpi

_STEP_BYTES = 32 << 20  # how much is turned into float64 at a time
_TALL = 4  # rows for each column that are reduced to a triangle at once
_SPARE = 16  # directions, at least, that each process passes on beyond those asked for, for accuracy

_PURPOSE = "hpclr data stats"

Floats = npt.NDArray[np.float64]


class Statistics(NamedTuple):
    """What `column_statistics` finds out about N samples of F values in C channels."""

    samples: int
    mean: Floats  # of each channel, (C,)
    std: Floats  # likewise, with N in the denominator; 0 for a channel that never varies
    components: npt.NDArray[np.float32]  # orthonormal rows (K, F), most variance first, largest entry positive
    singular_values: Floats  # of the centred samples, (K,)
    explained_variance: Floats  # along each component, (K,)
    explained_variance_ratio: Floats  # the same as shares of the variance of all values, (K,)
    heat: str  # the version that computed it


def import_heat(purpose: str) -> Any:
    """The package heat, imported without a trace on torch's random numbers or number of threads.

    Args:
        purpose: what needs it, for the message.

    Raises:
        UsageError: if heat is not installed, too old, or cannot be imported beside this torch.
    """
    install = (
        "Install it with `pip install 'hpclr[heat]'`. Where pip finds no heat for your torch (Python 3.11 beside the "
        "newest torch), `pip install --no-deps heat==1.8.0` works too, with scipy, h5py and mpi4py beside it."
    )
    if importlib.util.find_spec("heat") is None:
        raise UsageError(f"{purpose} needs heat, which is not installed. {install}")
    mpi.world(purpose)
    try:
        with _torch_unchanged(), _torchvision_or_stand_in():
            heat: Any = importlib.import_module("heat")
    except Exception as error:  # whatever versions that do not fit together raise
        raise UsageError(f"{purpose} needs heat, which cannot be imported ({error}). {install}") from error
    if not hasattr(heat.linalg, "hsvd_rank"):
        raise UsageError(f"{purpose} needs heat 1.8 or newer, found {heat.__version__}. {install}")
    return heat


@contextmanager
def _torch_unchanged() -> Iterator[None]:
    """Undoes what importing heat does to torch: it seeds all generators with the time."""
    threads, on_gpu = torch.get_num_threads(), torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else ()):
        yield
    if not on_gpu:
        torch.cuda.manual_seed_all(torch.initial_seed())  # the seed waits until CUDA starts: wait with the old one
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def _torchvision_or_stand_in() -> Iterator[None]:
    """Lets heat be imported where torchvision is not installed.

    heat mentions torchvision in modules for pictures that hpclr does not use. The stand-in is gone again after the
    import: other packages take a torchvision that can be imported for the real one.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    root, datasets, transforms = (ModuleType(f"torchvision{name}") for name in ("", ".datasets", ".transforms"))
    vars(datasets)["MNIST"] = vars(transforms)["Compose"] = object
    vars(root).update(datasets=datasets, transforms=transforms)
    stand_ins = {module.__name__: module for module in (root, datasets, transforms)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def load(file: Path, dataset: str) -> Any:
    """A dataset of an HDF5 file as it is stored, each process with its part of the rows (a heat.DNDarray).

    Raises:
        UsageError: if heat is missing, or HDF5 cannot read the values.
    """
    try:
        return import_heat(_PURPOSE).load_hdf5(str(file), dataset, dtype=None, split=0)
    except (OSError, KeyError) as error:
        raise UsageError(
            f"{file}: HDF5 cannot read /{dataset} ({error}). The file is damaged, or not the same on all nodes; "
            "prepare the data again, or copy the file again."
        ) from error


def column_statistics(samples: Any, components: int) -> Statistics:
    """Mean and spread of each channel, and the directions in which the samples vary most.

    Args:
        samples: (N, C, …) as `load` returns them.
        components: how many principal components; at most N or F are found.
    """
    ht, (count, channels) = import_heat(_PURPOSE), samples.shape[:2]
    rows = samples.larray.flatten(1)
    mean = _summed(ht, _sum(rows)) / count
    triangle, squares = _centred(rows, mean)
    squares = _summed(ht, squares)
    directions, variances = _components(ht, triangle, min(components, count, rows.shape[1]))
    of_channel = mean.reshape(channels, -1)
    within = squares.reshape(channels, -1).mean(dim=1) / count
    between = (of_channel - of_channel.mean(dim=1, keepdim=True)).square().mean(dim=1)
    return Statistics(
        samples=count,
        mean=of_channel.mean(dim=1).numpy(),
        std=(within + between).sqrt().numpy(),
        components=directions.T.contiguous().numpy(),
        singular_values=variances.sqrt().numpy(),
        explained_variance=(variances / count).numpy(),
        explained_variance_ratio=(variances / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)).numpy(),
        heat=ht.__version__,
    )


def label_counts(labels: Any, classes: int) -> npt.NDArray[np.int64]:
    """How often each label 0 … classes − 1 occurs, (classes,), in labels (N,) as `load` returns them."""
    counts = _summed(import_heat(_PURPOSE), torch.bincount(labels.larray, minlength=classes))
    return counts.numpy().astype(np.int64)


def leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """About the leading part of a singular value decomposition, by all processes together.

    Every process holds the same matrix. Each decomposes its share of the longer side; heat merges the results
    (hierarchical SVD: Iwen and Ong, 2016), and the matrix projected on what it finds is decomposed exactly. So the
    factors are orthonormal to rounding, and the singular values never too large; they are as good as the spectrum
    decays, and exact at full rank.

    Args:
        matrix: (m, n), the same on every process.
        rank: 1 to min(m, n).

    Returns:
        u (m, rank), s (rank,) descending, vh (rank, n): on all processes the same to the bit, in the matrix's type
        (float32 at least) and on its device.

    Raises:
        UsageError: if heat is missing.
        ValueError: for a rank that the matrix cannot have.
        torch.linalg.LinAlgError: for a matrix that holds NaN or infinity.
    """
    if matrix.ndim != 2 or not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"expected a matrix and a rank of 1 to its shorter side, found {tuple(matrix.shape)}, {rank}")
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    whole = matrix.detach().to("cpu", dtype)
    if not whole.isfinite().all():
        raise torch.linalg.LinAlgError("the matrix holds NaN or infinity")  # type: ignore[attr-defined]
    ht = import_heat("method.svd: heat")
    wide = whole.shape[0] < whole.shape[1]
    part = ht.array(whole.T if wide else whole, split=0).larray
    basis = _leading_basis(ht, _triangle(part), rank)
    projected = ht.array(part @ basis, is_split=0).resplit(None).larray
    long, s, short = _as_first_process_has(_decomposed(projected, basis))
    u, vh = (short, long.T) if wide else (long, short.T)
    return u.to(matrix.device), s.to(matrix.device), vh.contiguous().to(matrix.device)


def _summed(ht: Any, mine: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    total: Tensor = ht.array(mine[None], is_split=0).sum(axis=0).larray
    return total.reshape(mine.shape)


def _step(columns: int) -> int:
    return max(1, _STEP_BYTES // (8 * columns))


def _sum(rows: Tensor) -> Tensor:
    """Sums of the columns (F,), in float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for some in rows.split(_step(rows.shape[1])):
        total += some.double().sum(dim=0)
    return total


def _centred(rows: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows (n, F) less their mean come down to, a few at a time.

    Returns:
        a float32 matrix of at most F rows with the same right singular vectors and values, and the sums of the
        squares of each column, (F,) float64.
    """
    columns = rows.shape[1]
    triangle, squares = torch.zeros(0, columns), torch.zeros(columns, dtype=torch.float64)
    for some in rows.split(_TALL * columns):
        centred = torch.empty(some.shape)
        for source, target in zip(some.split(_step(columns)), centred.split(_step(columns)), strict=True):
            exact = source.double() - mean
            squares += exact.square().sum(dim=0)
            target.copy_(exact)
        triangle = _triangle(torch.cat([triangle, centred]))
    return triangle, squares


def _triangle(rows: Tensor) -> Tensor:
    """A matrix of at most F rows with the right singular vectors and the singular values of rows (n, F)."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def _leading_basis(ht: Any, rows: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (F, rank) that span about the leading right singular vectors of all processes' rows."""
    columns = rows.shape[1]
    norm = float(_summed(ht, rows.double().square().sum()[None]).sqrt())
    if not norm:
        return torch.eye(columns, rank, dtype=rows.dtype)
    some = rows if len(rows) else rows.new_zeros(1, columns)
    scaled = (some.T * (columns**0.5 / norm)).contiguous()  # the largest singular value is now 1 at least
    found, _ = ht.linalg.hsvd_rank(ht.array(scaled, is_split=1), rank, safetyshift=max(_SPARE, rank))
    basis: Tensor = found.larray
    # fewer columns than asked for where the rank is lower: any orthonormal ones complete them
    orthonormal: Tensor = torch.linalg.qr(basis, mode="reduced" if basis.shape[1] >= rank else "complete").Q
    return orthonormal[:, :rank]


def _components(ht: Any, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Principal directions (F, rank) of all processes' rows and the squares of their singular values, descending."""
    basis = _leading_basis(ht, rows, rank)
    projected = (rows @ basis).double()
    squares, rotation = torch.linalg.eigh(_summed(ht, projected.T @ projected))
    directions = basis @ rotation.flip(1).to(basis.dtype)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return directions * largest.sign(), squares.flip(0).clamp(min=0)


def _decomposed(projected: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """long (l, k), s (k,), short (f, k) with long · diag(s) · shortᵀ = projected · basisᵀ."""
    q, r = torch.linalg.qr(projected)
    left, s, right = torch.linalg.svd(r)
    return q @ left, s, basis @ right.T


def _as_first_process_has(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first process's tensors, on all processes."""
    same = tuple(tensor.contiguous() for tensor in tensors)
    for tensor in same:
        mpi.world("method.svd: heat").Bcast(tensor.numpy(), root=0)
    return same
