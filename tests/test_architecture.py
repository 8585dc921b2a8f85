"""The rooms and which way imports run between them; how long files and functions may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hpclr"
FILES = sorted(PACKAGE.rglob("*.py"))
STANDARD_LIBRARY = set(sys.stdlib_module_names)

# What a room may import besides itself and the standard library: packages, and other rooms of hpclr.
ALLOWED = {
    "lowrank": {"torch"},
    "methods": {"torch", "hpclr.lowrank"},
    "nested": {"torch"},
    "models": {"torch", "transformers"},
    "integrations": {
        "torch",
        "transformers",
        "lightning",
        "hpclr.errors",
        "hpclr.lowrank",
        "hpclr.methods",
        "hpclr.parallel",
    },
}
STRANGERS = {"checkpoint", "data", "config", "parallel", "slurm"}  # these do not know one another
# Packages that only these rooms or files may import.
ONLY_HERE = {
    "h5py": {"checkpoint", "data"},
    "matplotlib": {"report"},
    "mpi4py": {"parallel/mpi.py"},
    "heat": {"parallel/heat.py"},
    "galore_torch": {"training/galore.py"},
    "tensorboard": {"track/tensorboard.py"},
    "mlflow": {"track/mlflow.py"},
    "peft": {"training/lora.py"},
    "lightning": {"integrations/lightning.py"},
    "transformers": {"models", "integrations/hugging_face.py"},
}
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


def room_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported_modules(file: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def origin(module: str) -> str:
    """`hpclr.room` for hpclr's own modules, the name of the package for others."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "hpclr" else parts[0]


def origins(file: Path) -> set[str]:
    return {origin(module) for module in imported_modules(file)} - STANDARD_LIBRARY


def name(file: Path) -> str:
    return str(file.relative_to(PACKAGE.parent))


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_all_files_are_found():
    assert {"lowrank", "methods", "models"} <= {room_of(file) for file in FILES}
    assert "torch" in origins(PACKAGE / "lowrank" / "factors.py")
    assert "hpclr.lowrank" in origins(PACKAGE / "methods" / "oialr.py")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_run_one_way(file):
    room = room_of(file)
    if room in ALLOWED:
        assert origins(file) <= ALLOWED[room] | {f"hpclr.{room}"}
    if room in STRANGERS:
        assert origins(file).isdisjoint({f"hpclr.{other}" for other in STRANGERS - {room}})
    places = {room, str(file.relative_to(PACKAGE))}
    for package in origins(file) & ONLY_HERE.keys():
        assert places & ONLY_HERE[package], f"{package} is for {ONLY_HERE[package]} only"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_and_functions_are_short(file):
    assert len(file.read_text().splitlines()) < LONGEST_FILE
    too_long = {
        function.name: length for function in functions(file) if (length := lines_of(function)) > LONGEST_FUNCTION
    }
    assert not too_long


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the last line, the docstring left out: a long one is no fault."""
    length = (function.end_lineno or 0) - function.lineno + 1
    docstring = function.body[0]
    if ast.get_docstring(function) is not None:
        length -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return length
