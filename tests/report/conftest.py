"""A run that training has made, and a browser."""

import shutil

import pytest


@pytest.fixture(scope="session")
def trained(few_digits, tmp_path_factory):
    """A finished run of OIALR with two layers that became low-rank."""
    from hpclr.cli import hpclr

    place = tmp_path_factory.mktemp("trained")
    (place / "run.yaml").write_text(
        f"name: digits\nmodel: {{name: mlp, hidden: [32, 24]}}\ndata: {{path: {few_digits}, batch_size: 64}}\n"
        "optimizer: {name: adamw, lr: 0.003}\nmethod: {name: oialr, delay: 6, every: 2, cutoff: 0.4}\n"
        "train: {steps: 16, threads: 1}\nvalidation: {every_steps: 4}\n"
    )
    hpclr(["train", str(place / "run.yaml"), "--runs-dir", str(place)], standalone_mode=False)
    return place / "digits"


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on PATH")
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
