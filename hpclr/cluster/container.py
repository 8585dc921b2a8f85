"""Container runtimes: the words that stand before a program to run it in a container.

The environment is emptied at the door, and what passes is a list: of variables that launchers set for each process,
and that hpclr, its libraries and the GPUs listen to. As they differ from process to process they cannot be written
down in the batch script; each process collects its own, by name, just before it enters.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from hpclr.errors import UsageError

Runtime = Literal["apptainer", "singularity", "charliecloud", "bubblewrap"]
Gpu = Literal["nvidia", "rocm"]

PASSED = (
    # who the process is: the batch system, PMI and PMIx, the MPIs, torchrun
    *("SLURM*", "PMI*", "PALS_*", "OMPI_*", "PRTE_*", "MPI_LOCAL*", "MPICH_*", "MV2_*", "I_MPI_*", "MPI4PY_*"),
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_*", "GROUP_*", "ROLE_*", "TORCH*"),
    # which devices and networks it may use
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("NCCL_*", "RCCL_*", "GLOO_*", "UCX_*", "FI_*"),
    # what it is told
    *("HPCLR_*", "OMP_*", "MKL_*", "PYTORCH_*", "MIOPEN_*", "HDF5_*", "PYTHONPATH", "PYTHONUNBUFFERED"),
)
"""Variables that pass into a container; a trailing * stands for any ending."""

IMAGE_PATH = "/opt/hpclr/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are sought in an image that is a directory; an Apptainer image says it itself."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")

# bash -p reads no $BASH_ENV and takes no functions from the environment. compgen -e lists the names in it, whatever
# the values contain.
_COLLECT = """\
for name in $(compgen -e); do case $name in {names}) {take} ;; esac; done
"""
# Apptainer's own --env splits values at commas, and evaluates them like a shell unless told not to.
_PREFIXED = """\
export {PREFIX}_NO_EVAL=1
exec "$@"
"""
_EMPTIED = """\
runtime=$(type -P "$1") || { echo "hpclr: there is no $1 on $HOSTNAME" >&2; exit 127; }
exec env -i "PATH=%s" "HOME=$HOME" "USER=${USER:-$(id -un)}" "${kept[@]}" "$runtime" "${@:2}"
"""


class Bind(NamedTuple):
    """A directory or file of the host that is seen in the container."""

    source: str
    target: str
    read_only: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.target}" + (":ro" if self.read_only else "")


def parse_bind(text: str) -> Bind:
    """Reads `SOURCE[:TARGET[:ro|rw]]`; without TARGET the place is the same in the container.

    Raises:
        UsageError: if it is not of that form, or a path is not absolute or holds a comma, which no runtime can take.
    """
    parts = text.split(":")
    parts += [parts[0], "rw"][len(parts) - 1 :]
    if len(parts) != 3 or parts[2] not in ("ro", "rw") or not all(map(_is_bindable, parts[:2])):
        raise UsageError(
            f"cannot bind {text!r} into the container: expected SOURCE[:TARGET[:ro|rw]] with absolute paths that hold "
            "no comma, colon or line break, such as /scratch/me or /scratch/me/data:/data:ro; ~ is not replaced, "
            "and $NAME in profiles only. Give the full path, or a link to it with a plain name."
        )
    return Bind(parts[0], parts[1], parts[2] == "ro")


def prefix(
    runtime: Runtime,
    image: str,
    *,
    binds: Sequence[str] = (),
    names: Sequence[str] = (),
    gpu: Gpu | None = None,
    flags: Sequence[str] = (),
) -> list[str]:
    """The words before a program and its arguments that run it in a container.

    They go after the launcher's words: every process enters a container of its own. Charliecloud and bubblewrap see
    the host's /dev, but find the driver's libraries only if the image holds them; bubblewrap can bind only to places
    that are there in the image, and a signal to it ends the program at once.

    Args:
        runtime: the program that makes the container.
        image: an image file of Apptainer or Singularity; a directory for the others ("/" for bubblewrap: the host).
        binds: what else of the host is seen, as `parse_bind` reads it.
        names: variables that pass besides `PASSED`, as there.
        gpu: whose driver the program needs.
        flags: options of the runtime, put before hpclr's own.

    Raises:
        UsageError: if an argument cannot be passed to the runtime as it is meant.
    """
    if runtime not in get_args(Runtime):
        raise UsageError(f"container.runtime must be one of {', '.join(get_args(Runtime))}, found {runtime!r}.")
    _check_image(image)
    entering = _entering(runtime, [*PASSED, *names])
    return [
        "bash",
        "-p",
        "-c",
        entering,
        "container",
        *_words(runtime, image, list(map(parse_bind, binds)), gpu, flags),
    ]


def _is_bindable(path: str) -> bool:
    return path.startswith("/") and not re.search(r"[,\n\0]", path)


def _check_image(image: str) -> None:
    if not image or image.startswith("-") or "://" in image:
        raise UsageError(
            f"the container image must be a file or directory on this system, found {image!r}. An image of a registry "
            "would be fetched by every process: pull it once (`apptainer pull NAME.sif docker://…`) and name that file."
        )


def _entering(runtime: Runtime, names: Sequence[str]) -> str:
    """The lines of bash with which each process enters."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"cannot pass {name!r} into the container: expected the name of a variable, or its beginning and a *."
            )
    patterns = "|".join(names)
    if runtime in ("apptainer", "singularity"):
        own = runtime.upper()
        take = f'export "{own}ENV_$name=${{!name}}"'
        return _COLLECT.format(names=patterns, take=take) + _PREFIXED.format(PREFIX=own)
    return "kept=()\n" + _COLLECT.format(names=patterns, take='kept+=("$name=${!name}")') + _EMPTIED % IMAGE_PATH


def _words(runtime: Runtime, image: str, binds: list[Bind], gpu: Gpu | None, flags: Sequence[str]) -> list[str]:
    """The runtime's command line, up to the program."""
    if runtime == "bubblewrap":
        own = ["--ro-bind", image, "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc", "--ro-bind", "/sys", "/sys"]
        own += ["--bind", "/tmp", "/tmp"]  # noqa: S108 - as the other runtimes do; launchers meet there
        own += ["--die-with-parent"]  # bwrap waits for the program, and a signal ends bwrap alone
        for bind in binds:
            own += ["--ro-bind" if bind.read_only else "--bind", bind.source, bind.target]
        return ["bwrap", *flags, *own, "--"]
    if runtime == "charliecloud":
        if closed := [str(bind) for bind in binds if bind.read_only]:
            raise UsageError(f"charliecloud cannot bind read-only, found {', '.join(closed)}; leave out the ':ro'.")
        return ["ch-run", *flags, *(f"--bind={bind.source}:{bind.target}" for bind in binds), image, "--"]
    driver = {"nvidia": ["--nv"], "rocm": ["--rocm"], None: []}[gpu]
    return [runtime, "exec", *flags, "--cleanenv", *driver, *(f"--bind={bind}" for bind in binds), image]
