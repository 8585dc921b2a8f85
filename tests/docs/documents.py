"""Taking documents apart: blocks of code, commands, links, names of files and of Python objects."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import click

import hpclr.cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHELL = ("bash", "sh", "console", "text", "")


class Block(NamedTuple):
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block shows, if its first line is a comment with nothing but that file's name."""
        found = re.match(r"# ([\w-]+\.\w+)\n", self.text)
        return found[1] if found else None


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*parts) for parts in found if not languages or parts[0] in languages]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> list[str]:
    """The `hpclr …` lines of shell blocks, fenced or indented, also those that a launcher is to run."""
    return [found for line in shell_lines(page) if (found := without_launcher(line)).startswith("hpclr ")]


def shell_lines(page: Path) -> list[str]:
    fenced = [line for block in blocks(page, *SHELL) for line in block.text.splitlines()]
    return fenced + [line[4:] for line in prose(page).splitlines() if line.startswith("    ")]


def without_launcher(line: str) -> str:
    """`hpclr …` of `mpirun -n 2 hpclr …` or `torchrun … -m hpclr …`."""
    return re.sub(r"^(torchrun|mpirun|srun) .*?(?=hpclr )", "", line)


def mentioned_commands(page: Path) -> list[str]:
    return [found for code in inline_code(page) if (found := without_launcher(code)).startswith("hpclr ")]


def links(page: Path) -> list[str]:
    """Targets of links that do not leave the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if "://" not in target]


def parsed(line: str) -> tuple[click.Command, list[str]]:
    """The command that a line means, and its arguments. A word in brackets stands for something optional.

    Raises:
        AssertionError: for a command or an option that is not there.
    """
    command: click.Command = hpclr.cli.hpclr
    words = [word if "=[" in word else word.strip("[]") for word in split(line)]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"{line!r}: there is no command {words[0]!r}"
        command, words = found, words[1:]
    context = click.Context(command, **command.context_settings)  # click remembers the help option it makes here
    known = {option for parameter in command.get_params(context) for option in parameter.opts}
    for word in words:
        assert not word.startswith("-") or word.partition("=")[0] in known, (
            f"{line!r}: no option {word}; there are {sorted(known)}"
        )
    return command, words


def split(line: str) -> list[str]:
    """The words after `hpclr`."""
    return shlex.split(line, comments=True)[1:]


def is_complete(words: list[str]) -> bool:
    """Whether a command could be typed so, that is, has no placeholders such as SOURCE."""
    return not any(re.fullmatch(r"[A-Z]+|…|\.\.\.", word) for word in words)
