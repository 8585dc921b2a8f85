"""The sources that `hpclr data prepare` reads, one entry a format.

A reader is a function from a path to a `hpclr.data.source.Source`. To add one, write it in a module of
this folder and enter it below; nothing else changes.
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpclr.errors import UsageError

if TYPE_CHECKING:
    from hpclr.data.source import Source


class Reader(NamedTuple):
    """How a format is read; the module is imported only when it is."""

    function: str  # module:function in this package
    source: str  # what SOURCE has to be; empty where the data comes with a package
    sized: bool = False  # whether it takes --image-size


READERS = {
    "digits": Reader("digits:read", ""),
    "fashion-mnist": Reader("idx:read_fashion_mnist", "folder with its four idx files, gzipped or not"),
    "idx": Reader("idx:read", "folder with MNIST-like idx files, gzipped or not"),
    "cifar10": Reader("cifar:read", "folder of CIFAR-10's binary or python version"),
    "npz": Reader("npz:read", "file with x_train, y_train, x_test, y_test"),
    "csv": Reader("series:read", "time series in numeric columns; .gz and .xz too"),
    "text": Reader("text:read", "UTF-8 text, for its next characters; .gz and .xz too"),
    "imagefolder": Reader("imagefolder:read", "folder {train,val,test}/CLASS/*.png or jpg", sized=True),
}


def open_source(name: str, path: Path | None, image_size: int | None = None) -> "Source":
    """The source that a reader finds at a path.

    Raises:
        UsageError: for an unknown reader, a source it cannot read, or options it does not have.
    """
    if name not in READERS:
        raise UsageError(f"there is no reader '{name}'; expected one of {', '.join(READERS)}")
    reader = READERS[name]
    if image_size is not None and not reader.sized:
        sized = ", ".join(name for name, reader in READERS.items() if reader.sized)
        raise UsageError(f"--image-size {image_size} is for {sized}; '{name}' keeps the size of its samples")
    module, _, function = reader.function.partition(":")
    read = getattr(import_module(f"{__name__}.{module}"), function)
    options = {"image_size": image_size} if reader.sized else {}
    source: Source = read(*_paths(name, reader, path), **options)
    if 0 in source.row_shape:
        raise UsageError(f"{path}: expected samples of at least one value, found samples of shape {source.row_shape}")
    return replace(source, origin=path or name)


def _paths(name: str, reader: Reader, path: Path | None) -> list[Path]:
    if reader.source and path is None:
        raise UsageError(f"reader '{name}' needs a SOURCE before the output file: {reader.source}")
    if path is not None and not reader.source:
        raise UsageError(f"reader '{name}' takes no SOURCE, found '{path}'; its data comes with a Python package")
    return [] if path is None else [path]
