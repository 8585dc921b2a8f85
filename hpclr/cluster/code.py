"""Which Python code a run needs that is not installed, and so may change while its job waits."""

import ast
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

import hpclr
from hpclr.config import RunFile
from hpclr.config.schema import Target
from hpclr.errors import UsageError

_INSTALLED = {"site-packages", "dist-packages"}


def code_of(run: RunFile, *, in_container: bool = False) -> tuple[Path, ...]:
    """The packages (directories) and modules (files) that a job must take along.

    These are hpclr, if it runs from a source tree, and the module or package that a `target:` names, with those that it
    imports from beside it. Nothing is imported to find that out.

    Args:
        run: the run file.
        in_container: whether a target that is not found here may be there.

    Raises:
        UsageError: if the target is not found, or is no Python.
    """
    own = Path(hpclr.__file__).parent
    found = {} if _is_installed(own) else {own.name: own}
    if isinstance(run.model, Target):
        for piece in _code_of_target(run.model.target.partition(":")[0], in_container):
            found.setdefault(piece.name, piece)
    return tuple(found.values())


def require_readable(file: Path) -> None:
    """Refuses a file of code that this user cannot read.

    Raises:
        UsageError: naming it.
    """
    try:
        file.open("rb").close()
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(place: Path, error: OSError) -> UsageError:
    """That code cannot be taken along."""
    return UsageError(
        f"{place}: this code would be copied for the job, but cannot be read: {error.strerror}. Make it readable, or "
        "keep it elsewhere if model.target does not need it."
    )


def _code_of_target(module: str, in_container: bool) -> list[Path]:
    places = _places(module)
    if not places and not in_container:
        raise UsageError(
            f"model.target: there is no module {module!r} in the current directory ({Path.cwd()}), nor is it "
            "installed. Submit the run from the directory in which its module is found."
        )
    if not places or _is_installed(places[0]):
        return []
    try:
        _imports(places[-1])
    except OSError as error:
        raise unreadable(Path(error.filename), error) from error
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"model.target: {module} cannot be imported: {error}. Correct the file.") from error
    return _with_neighbours(places[0])


def _places(module: str) -> list[Path]:
    """Where each package on the way to a module is, and it itself; none if it is not there, or built in."""
    places: list[Path] = []
    for part in module.split("."):
        spec = PathFinder.find_spec(part, [str(places[-1])]) if places else _top(part)
        if spec is None or (place := _place(spec)) is None:
            return []
        places.append(place)
    return places


def _top(name: str) -> ModuleSpec | None:
    found = PathFinder.find_spec(name, ["", *sys.path])  # as in the job: the console script lacks the first
    try:
        return found or find_spec(name)  # an editable installation may be found by a hook only
    except ValueError:  # such as __main__
        return None


def _place(spec: ModuleSpec) -> Path | None:
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).absolute()
    return Path(spec.origin).absolute() if spec.has_location and spec.origin else None


def _with_neighbours(first: Path) -> list[Path]:
    """A package or module, and what it imports, directly or not, from the directory that it is in."""
    found: dict[Path, None] = {}
    waiting = [first]
    while waiting:
        piece = waiting.pop()
        if piece not in found:
            found[piece] = None
            names = {name for file in _python_files(piece) for name in _imports_if_python(file)}
            waiting += [neighbour for name in sorted(names) if (neighbour := _module_in(first.parent, name))]
    return list(found)


def _python_files(piece: Path) -> list[Path]:
    return sorted(piece.rglob("*.py")) if piece.is_dir() else [piece]


def _imports_if_python(file: Path) -> set[str]:
    try:
        return _imports(file)
    except OSError as error:
        raise unreadable(file, error) from error
    except (SyntaxError, ValueError):
        return set()


def _imports(place: Path) -> set[str]:
    """The first names of all packages and modules that a file, or a package's own file, imports by full name.

    Raises:
        SyntaxError, ValueError: if it is no Python.
    """
    file = place / "__init__.py" if place.is_dir() else place
    if file.suffix != ".py" or not file.is_file():
        return set()
    full: list[str] = []
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            full += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            full.append(node.module)
    return {name.partition(".")[0] for name in full}


def _module_in(directory: Path, name: str) -> Path | None:
    package, module = directory / name, directory / f"{name}.py"
    if (package / "__init__.py").is_file():
        return package
    return module if module.is_file() else None


def _is_installed(path: Path) -> bool:
    return bool(_INSTALLED & set(path.parts)) or path.is_relative_to(sysconfig.get_path("stdlib"))
