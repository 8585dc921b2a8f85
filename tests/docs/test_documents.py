"""What the documents say is there: commands, options, keys, files, names, links, versions."""

import importlib
import re
import shlex

import pytest
import yaml
from documents import (
    PAGES,
    ROOT,
    blocks,
    commands,
    inline_code,
    is_complete,
    links,
    mentioned_commands,
    name,
    parsed,
    shell_lines,
    split,
)
from torch.distributed.run import get_args_parser

from hpclr.cli import COMMANDS
from hpclr.config import parse_run_file
from hpclr.version import __version__

QUICKSTART = (ROOT / "jobs" / "quickstart.yaml").read_text(encoding="utf-8")
every_page = pytest.mark.parametrize("page", PAGES, ids=name)


@every_page
def test_commands_are_there_and_parse(page):
    for line in commands(page):
        command, words = parsed(line)
        if is_complete(words) and "[" not in line.replace("=[", ""):
            command.make_context(line, list(words))  # click raises if an argument is missing or wrong
            parse_run_file(QUICKSTART, line, [word for word in words if "=" in word and word[0] != "-"])
    for line in mentioned_commands(page):
        parsed(line)


@every_page
def test_torchrun_would_take_its_options(page):
    for line in shell_lines(page):
        if line.startswith("torchrun "):
            started = get_args_parser().parse_args(shlex.split(line)[1:])
            assert started.module == (started.training_script == "hpclr"), line


@every_page
def test_run_files_are_valid(page):
    for block in blocks(page, "yaml"):
        sections = yaml.safe_load(block.text)
        if "name" in sections:
            parse_run_file(block.text, name(page))
        else:  # a piece of one
            whole = yaml.safe_load(QUICKSTART) | sections
            parse_run_file(yaml.safe_dump(whole), name(page))


@every_page
def test_links_lead_to_files_of_this_repository(page):
    for target in links(page):
        file, _, _ = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.is_relative_to(ROOT), target
        assert found.exists(), target


@every_page
def test_files_and_objects_that_are_named_exist(page):
    for code in inline_code(page):
        for file in re.findall(r"(?<![\w./])(?:hpclr|docs|jobs|tests)/[\w./-]*", code):
            assert (ROOT / file).exists(), file
        for dotted in re.findall(r"\bhpclr(?:\.\w+)+\b(?!\[|/)", code):
            assert resolves(dotted), dotted


def resolves(dotted):
    """Whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_the_places_for_something_new_are_where_the_page_says():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`(\w+)`,? (?:in )?`(hpclr/[\w/]+\.py)`", text)
    assert {"KINDS", "_RULES", "STATE_RULES", "build_method", "Trainer"} <= {symbol for symbol, _ in places}
    for symbol, file in places:
        assert re.search(rf"^(def |class )?{symbol}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), symbol


def test_every_page_is_in_the_index():
    listed = set(links(ROOT / "docs" / "README.md"))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - listed == {"README.md"}


def test_every_command_is_in_the_readme():
    named = {split(line)[0] for line in mentioned_commands(ROOT / "README.md")}
    assert named == set(COMMANDS)


def test_the_readme_shows_the_run_file_of_the_quickstart():
    (shown,) = blocks(ROOT / "README.md", "yaml")
    assert shown.text.strip() == "\n".join(line for line in QUICKSTART.splitlines() if not line.startswith("#"))


def test_makefile_targets_that_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert [reference["url"][-10:] for reference in citation["references"]] == ["2401.08505", "2004.09031"]


def test_the_changelog_has_this_version():
    assert __version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
