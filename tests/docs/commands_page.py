"""Writes docs/command-line.md below its marker, from the commands themselves: `python tests/docs/commands_page.py`."""

from collections.abc import Iterator
from pathlib import Path

import click

import hpclr.cli

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
MARKER = "<!-- From here on this page is written by `python tests/docs/commands_page.py`. -->"
WIDTH = 100


def renewed(page: str) -> str:
    """The page with its part below the marker made anew."""
    parts = [f"## {path.removeprefix('hpclr ')}\n\n```text\n{text}\n```\n" for path, text in helps()]
    return page.partition(MARKER)[0] + MARKER + "\n\n" + "\n".join(parts)


def helps() -> Iterator[tuple[str, str]]:
    """Every command and what its --help says."""
    settings = hpclr.cli.hpclr.context_settings | {"terminal_width": WIDTH, "max_content_width": WIDTH}
    main = click.Context(hpclr.cli.hpclr, info_name="hpclr", **settings)
    for name in hpclr.cli.hpclr.list_commands(main):
        yield from _helps(main, name)


def _helps(parent: click.Context, name: str) -> Iterator[tuple[str, str]]:
    assert isinstance(parent.command, click.Group)
    command = parent.command.get_command(parent, name)
    assert command is not None
    context = click.Context(command, parent, name, terminal_width=WIDTH, max_content_width=WIDTH)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            yield from _helps(context, inner)
    else:
        lines = command.get_help(context).splitlines()
        yield context.command_path, "\n".join(line.rstrip() for line in lines).strip()


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
