"""Every message that the page of errors quotes is one that hpclr can say."""

import ast
import re

import pytest
from documents import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "…"


def said() -> list[str]:
    """All texts in the code, what is filled in as a gap."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "hpclr").rglob("*.py"))]
    return [text for tree in trees for node in ast.walk(tree) if (text := text_of(node))]


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else GAP for part in node.values)
    return ""


def quoted() -> list[str]:
    """What stands at the beginning of the page's points, before a dash."""
    return [
        text for line in re.findall(r"^\* (`.*?)(?: –|$)", PAGE, re.MULTILINE) for text in re.findall(r"`(.+?)`", line)
    ]


SAID = said()


@pytest.mark.parametrize("message", quoted())
def test_the_message_is_one_of_the_code(message):
    parts = [re.escape(part) for part in re.split(r"\s*…\s*", message) if part]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in SAID), f"nothing in the code says {message!r}"


def test_there_are_messages_to_look_for():
    assert len(quoted()) > 50
