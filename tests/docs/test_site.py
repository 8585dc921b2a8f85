"""The pages as a site."""

import subprocess
import sys

from documents import ROOT


def test_the_site_is_built_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "-c", "docs", ".", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (built.returncode, built.stderr) == (0, "")
    first = (tmp_path / "docs" / "README.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f'href="{page.stem}.html"' in first, page
    reference = (tmp_path / "docs" / "api.html").read_text(encoding="utf-8")
    for name in ("OIALR", "Replica", "Sharded", "fold"):
        assert f'class="sig-name descname"><span class="pre">{name}<' in reference, name
    assert "docs/README.html" in (tmp_path / "index.html").read_text(encoding="utf-8")
