import re
from pathlib import Path

from hpclr.data import open_dataset
from hpclr.data.readers import READERS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_programs_on_the_page_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(program, {})
    with open_dataset(Path("mine.h5")) as dataset:
        assert dataset.sizes == {"train": 80, "test": 20}


def test_the_page_lists_every_reader():
    for name in READERS:
        assert f"| `{name}` |" in PAGE
