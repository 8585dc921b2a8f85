"""Places in a save at which a test can kill the process, as a power cut would, or let the file system fail."""

import errno
import os
import signal


def failpoint(name: str) -> None:
    """Does what the environment variable HPCLR_FAILPOINT asks for at this place.

    `HPCLR_FAILPOINT=after_data` kills the process (SIGKILL) at the place `after_data`, and
    `HPCLR_FAILPOINT=after_data:ENOSPC` raises OSError with that errno there.
    """
    place, _, fault = os.environ.get("HPCLR_FAILPOINT", "").partition(":")
    if place != name:
        return
    if not fault:
        os.kill(os.getpid(), signal.SIGKILL)
    code = getattr(errno, fault)
    raise OSError(code, os.strerror(code))
