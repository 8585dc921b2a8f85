"""Places in a save at which a test can kill the process, as a power cut would."""

import os
import signal


def failpoint(name: str) -> None:
    """Kill this process (SIGKILL) if the environment variable HPCLR_FAILPOINT is `name`."""
    if os.environ.get("HPCLR_FAILPOINT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
