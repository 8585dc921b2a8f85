"""What an image must be able to do; run at the end of its build, or inside it: `python /opt/hpclr/check.py cuda`."""

import os
import shutil
import subprocess
import sys
import tempfile

KIND = sys.argv[1]
WORLD = "from mpi4py import MPI; print(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), flush=True)"
# As root, and on one core: what a build has. Open MPI 4 and 5 each listen to their own; others to none of them.
AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def check_torch() -> str:
    """A product and its gradient, and torch built for the processors that the image is meant for."""
    import torch
    import torch.distributed

    weight = torch.eye(3, requires_grad=True)
    (weight @ torch.ones(3)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.sum().item() == 9
    built = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    assert built == KIND, f"torch {torch.__version__} is built for {built}, the image is for {KIND}"
    backends = [name for name in ("gloo", "nccl", "mpi") if getattr(torch.distributed, f"is_{name}_available")()]
    assert "gloo" in backends
    assert KIND == "cpu" or "nccl" in backends
    return f"torch {torch.__version__} for {built}, backends {', '.join(backends)}"


def check_gpu() -> str:
    """The GPUs compute, where the machine has any."""
    import torch

    there = os.path.exists({"cuda": "/dev/nvidia0", "rocm": "/dev/kfd", "cpu": ""}[KIND])
    if not there:
        return "no GPU here"
    assert torch.cuda.is_available(), (
        "there is a GPU, but torch sees none: was the container entered without --nv, --rocm?"
    )
    assert torch.ones(8, device="cuda").sum().item() == 8
    return f"{torch.cuda.device_count()} GPUs, {torch.cuda.get_device_name(0)}"


def check_mpi() -> str:
    """Two processes of one MPI know of each other; an mpirun of another MPI gives two of size 1."""
    mpirun = shutil.which("mpirun")
    assert mpirun, "no mpirun on PATH"
    command = [mpirun, "-n", "2", sys.executable, "-c", WORLD]
    done = subprocess.run(command, env=os.environ | AS_ROOT, capture_output=True, text=True, timeout=120)  # noqa: S603
    said = f"{done.stdout}{done.stderr}"  # MPIs warn on either
    assert {"0 2", "1 2"} <= set(done.stdout.split("\n")), f"expected ranks 0 and 1 of 2, found {said}"
    from mpi4py import MPI

    return MPI.Get_library_version().split("\n")[0].split(", package")[0]


def check_hdf5() -> str:
    """A file with checksums, written and read."""
    import h5py

    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "check.h5")
        with h5py.File(path, "w", libver=("v110", "v110")) as file:
            file.create_dataset("x", data=list(range(100)), chunks=(10,), fletcher32=True)
        with h5py.File(path) as file:
            assert file["x"][()].sum() == 4950
    return f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"


def check_hpclr() -> str:
    """The program starts."""
    command = [sys.executable, "-m", "hpclr", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)  # noqa: S603
    return done.stdout.strip()


for check in (check_torch, check_gpu, check_mpi, check_hdf5, check_hpclr):
    print(f"ok  {check()}", flush=True)
