"""Files for others, with their digests beside them: written whole or not at all."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from hpclr.checkpoint.digest import read_sidecar, sha256_of, sidecar_of, write_sidecar
from hpclr.errors import HpclrError, RetryableError, UsageError
from hpclr.files import synchronise

_MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A name for a new file that takes the place of `out`, its digest with it, if the block succeeds.

    Raises:
        UsageError, RetryableError: if it cannot be written; what was there is still there then.
    """
    try:
        with TemporaryDirectory(prefix=".tmp-export-", dir=out.parent) as directory:
            temporary = Path(directory) / out.name
            yield temporary
            temporary.chmod(0o644)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            _put_in_place(temporary, out)
        synchronise(out.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(out, error) from error


def _not_written(out: Path, error: OSError | SafetensorError) -> HpclrError:
    """75 for a disk that is full or fails, as elsewhere; safetensors tells its reason as text alone."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    if number in _MAY_PASS:
        return RetryableError(
            f"{out}: it cannot be written: {error}. Once there is space and the disk works, try again."
        )
    return UsageError(f"{out}: it cannot be written: {error}. Check that there is space and the directory is writable.")


def _put_in_place(temporary: Path, out: Path) -> None:
    """By renames. While a file with a digest replaces another, the content of either is good.

    A digest that another export left under this name goes: it is of other content.
    """
    digests = read_sidecar(temporary) if sidecar_of(temporary).exists() else []
    if digests and out.exists():
        write_sidecar(out, *digests, sha256_of(out))
    os.replace(temporary, out)
    if digests:
        write_sidecar(out, *digests)
    else:
        sidecar_of(out).unlink(missing_ok=True)
