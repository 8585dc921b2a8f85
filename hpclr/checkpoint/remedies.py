"""What can be done about a save that the file system refuses."""

import errno
import shutil
from pathlib import Path

from hpclr.errors import RetryableError

_REMEDIES = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Your quota is used up, whatever the file system has left: free space or have the quota raised",
    errno.EFBIG: "Files may not become so large: have that limit raised (`ulimit -f` shows it)",
    errno.EROFS: "The file system is mounted read-only, some are after a fault: have it mounted writable again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Make the directory writable for the user who runs this"),
    errno.EIO: "The disk, or the network to it, has failed: have it looked after",
    errno.ESTALE: "The file server no longer knows the directory: have it mounted again",
    errno.ENOENT: "The run directory has vanished: put it back, or have its file system mounted",
}


def save_failed(path: Path, step: int, size: int, error: OSError) -> RetryableError:
    """The error to raise where a checkpoint of about so many bytes could not be saved."""
    remedy = _REMEDIES.get(error.errno or 0, "Check that the file system is mounted and works")
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB free"
    except OSError:
        free = "free space unknown"
    return RetryableError(
        f"{path}: the checkpoint of step {step} could not be saved: {error.strerror or error}; it needs "
        f"{size / 1e6:.1f} MB, {free}. Earlier checkpoints are untouched. {remedy}."
    )
