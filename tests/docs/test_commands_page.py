"""The page of commands says what the commands say."""

import subprocess
import sys
from pathlib import Path

PROGRAM = "from commands_page import PAGE, renewed; page = PAGE.read_text(); print(renewed(page) == page)"


def test_the_page_is_that_of_the_commands():
    """In a process of its own: click keeps the help option that a command was first asked for."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", f"run `python tests/docs/commands_page.py` {done.stderr}"
