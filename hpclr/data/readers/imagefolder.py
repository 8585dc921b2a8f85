"""A tree of pictures: root/{train,val,test}/CLASS/*.png or jpg."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpclr.data.layout import BLOCK_BYTES, Array, rows_in
from hpclr.data.source import Block, Part, Source, check_folder, labelled, reading
from hpclr.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_FOLDERS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}


class _Picture(NamedTuple):
    path: Path
    label: int


def read(folder: Path, image_size: int | None = None) -> Source:
    """Pictures as RGB, (3, H, W) bytes; a tree with train and val only has val as its test split.

    Args:
        folder: the root of the tree.
        image_size: the shorter side is resized to this many pixels, then the middle square is cut out.
            Without it, all pictures must have one size already.

    Raises:
        UsageError: if pillow is not installed, or naming the folder or picture that does not fit.
    """
    _pillow()
    check_folder(folder, "train, val and test, each with a folder of pictures for every class")
    roots = _roots(folder)
    classes = [path.name for path in _class_folders(roots["train"])]
    pictures = {split: _pictures(root, classes) for split, root in roots.items()}
    shape = (3, image_size, image_size) if image_size else _shape_of(pictures["train"][0].path)
    parts = {split: _part(found, image_size, shape, roots[split]) for split, found in pictures.items()}
    return Source("classification", classes, shape, "uint8", parts)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("reading pictures needs pillow, which is not installed: pip install pillow") from error
    return Image


def _roots(folder: Path) -> dict[str, Path]:
    roots = {split: folder / name for split, names in _FOLDERS.items() for name in names if (folder / name).is_dir()}
    if "test" not in roots and "valid" in roots:
        roots["test"] = roots.pop("valid")
    if missing := [split for split in ("train", "test") if split not in roots]:
        raise UsageError(
            f"{folder}: expected folders train and test (or train and val), found no {' and no '.join(missing)}. "
            "Each split is a folder that holds a folder of pictures for every class."
        )
    return roots


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pictures(root: Path, classes: list[str]) -> list[_Picture]:
    files = {folder: _files(folder) for folder in _class_folders(root)}
    if not files:
        raise UsageError(f"{root}: expected pictures in CLASS/*.png or CLASS/*.jpg, found no folder of a class")
    found = []
    for folder, paths in files.items():
        label = _label(folder, classes)
        found += [_Picture(path, label) for path in paths if _is_picture(path)]
        if not any(map(_is_picture, paths)):
            raise UsageError(
                f"{folder}: expected pictures *.png or *.jpg of class '{folder.name}', found none. "
                "Put some there, or remove the folder."
            )
    loose = [path for path in sorted(root.iterdir()) if not (path.is_dir() or path.name.startswith("."))]
    _warn_of_others(root, loose + [path for paths in files.values() for path in paths if not _is_picture(path)])
    return found


def _files(folder: Path) -> list[Path]:
    """The files in and below a folder in the order of their names, without what is hidden."""
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path for path in paths if not any(name[0] == "." for name in path.relative_to(folder).parts))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def _warn_of_others(root: Path, others: list[Path]) -> None:
    if others:
        names = ", ".join(str(path.relative_to(root)) for path in others[:3])
        warnings.warn(
            f"{root}: only .png, .jpg and .jpeg in the folder of a class are read; {len(others)} other "
            f"{'file is' if len(others) == 1 else 'files are'} left out: {names}{', …' if len(others) > 3 else ''}",
            stacklevel=2,
        )


def _label(folder: Path, classes: list[str]) -> int:
    if folder.name not in classes:
        raise UsageError(
            f"{folder}: the training split has no class '{folder.name}'; it has {', '.join(classes[:10])}"
            f"{' …' if len(classes) > 10 else ''}. All splits must have the same classes."
        )
    return classes.index(folder.name)


def _shape_of(path: Path) -> tuple[int, ...]:
    return _decode(path, None).shape


def _part(pictures: list[_Picture], image_size: int | None, shape: tuple[int, ...], root: Path) -> Part:
    rows = rows_in(BLOCK_BYTES, shape, 1)

    def every(block: int, step: int) -> Iterator[Block]:
        for first in range(block * rows, len(pictures), step * rows):
            some = pictures[first : first + rows]
            x = np.stack([_fitting(picture.path, image_size, shape) for picture in some])
            yield labelled(x, np.array([picture.label for picture in some], dtype=np.int64), root, first)

    return Part.divisible(len(pictures), every)


def _fitting(path: Path, image_size: int | None, shape: tuple[int, ...]) -> Array:
    picture = _decode(path, image_size)
    if picture.shape != shape:
        raise UsageError(
            f"{path}: expected {shape[1]}x{shape[2]} pixels (height x width) as in the first picture, found "
            f"{picture.shape[1]}x{picture.shape[2]}. Give --image-size to bring all pictures to one size."
        )
    return picture


def _decode(path: Path, image_size: int | None) -> Array:
    """A picture as (3, H, W) bytes."""
    library = _pillow()
    try:
        with reading(path), library.open(path, formats=("PNG", "JPEG")) as file:
            _check_depth(path, file.mode)
            picture = file.convert("RGB")
    except (library.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path}: the picture cannot be decoded ({error}). Replace or remove it.") from error
    if image_size:
        picture = _middle_square(picture, image_size)
    return np.ascontiguousarray(np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1))


def _check_depth(path: Path, mode: str) -> None:
    """Refuses grey values of 16 and 32 bits, which pillow would cut off at 255 instead of scaling them."""
    if mode.startswith(("I", "F")):
        raise UsageError(
            f"{path}: expected a picture with 8 bits a channel, found one of 16 or 32 bits (pillow's mode {mode}). "
            "Scale it to 0 to 255 and save it with 8 bits, or save the arrays as .npz and take the reader npz."
        )


def _middle_square(picture: "Image", size: int) -> "Image":
    width, height = picture.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), _pillow().Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))
