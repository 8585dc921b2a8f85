"""Reading arrays out of a pickle without running what the pickle says.

A pickle names functions to call. This unpickler knows the few names that rebuild a numpy array, puts
stand-ins of its own in their place, and refuses every other name before anything is imported; lists,
dictionaries, strings and numbers need no names.
"""

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np

from hpclr.data.layout import Array
from hpclr.errors import UsageError


class _Type:
    """Stands in for numpy.dtype: one plain kind of number."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else str(code)
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else str(order)

    def dtype(self) -> np.dtype[Any]:
        """The type itself; objects and structures would let a pickle put anything into an array."""
        dtype = np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]
        if dtype.kind not in "biuf":
            raise ValueError(f"expected an array of numbers, found type '{dtype}'")
        return dtype


class PickledArray:
    """Stands in for numpy.ndarray, whose own way of taking its content from a pickle checks less."""

    def __init__(self, *_: Any) -> None:
        self.array: Array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.array = np.frombuffer(content, dtype=kind.dtype()).reshape(shape, order="F" if fortran else "C")


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"expected bytes as latin1 text, found '{encoding}'")
    return str(text).encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UsageError(
                f"{self._path}: the pickle asks for {module}.{name}; expected only what rebuilds a numpy array. "
                "Nothing of it was run. The file is not CIFAR-10's; fetch the data from where it is published."
            )
        return _ALLOWED[module, name]


def load_arrays(path: Path) -> Any:
    """The dictionaries, lists, numbers and bytes of a pickle, and its arrays as `PickledArray`.

    Raises:
        UsageError: if the pickle asks for anything else, or is damaged.
    """
    with path.open("rb") as file:
        try:
            return _ArrayUnpickler(file, path).load()
        except UsageError:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UsageError(
                f"{path}: expected a pickle of arrays of numbers, found one that cannot be read "
                f"({type(error).__name__}: {error}). Fetch the file again."
            ) from error
