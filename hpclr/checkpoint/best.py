"""The note of which checkpoint of a directory is the best one."""

import json
import logging
import math
from pathlib import Path

from hpclr.files import write_whole

logger = logging.getLogger("hpclr.checkpoint")

_NAME = "best.json"
_MAX_BYTES = 4096


def record_best(directory: Path, step: int, metric: float | None) -> None:
    """Notes the step of the best checkpoint; atomic."""
    finite = metric if metric is not None and math.isfinite(metric) else None
    write_whole(directory / _NAME, (json.dumps({"step": step, "metric": finite}) + "\n").encode())


def read_best(directory: Path) -> int | None:
    """The step that is noted; None if there is no note that can be read."""
    path = directory / _NAME
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            step = json.loads(file.read(_MAX_BYTES))["step"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("%s: which checkpoint is the best cannot be read: %r", path, error)
        return None
    return step if isinstance(step, int) else None
