import re
from pathlib import Path

from hpclr.config import parse_run_file
from hpclr.config.reference import MARKER, main, reference, renew
from hpclr.config.schema import RunFile

PAGE = Path(__file__).parents[2] / "docs" / "run-file.md"


def test_the_page_is_the_one_that_the_schema_gives():
    page = PAGE.read_text(encoding="utf-8")
    assert MARKER in page
    assert renew(page) == page, "run `python -m hpclr.config.reference docs/run-file.md`"


def test_the_command_renews_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Words.\n\n{MARKER}\nold", encoding="utf-8")
    main(page)
    assert page.read_text(encoding="utf-8") == "Words.\n\n" + reference()


def test_the_example_of_the_page_is_a_run_file_and_its_overrides_work():
    page = PAGE.read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    overrides = re.search(r"hpclr train run\.yaml (optimizer.*)", page)[1].replace("'", "").split()
    run = parse_run_file(example, "docs/run-file.md", overrides)
    assert (run.optimizer.lr, run.method.exclude, run.name) == (3e-4, ("head",), "digits-vit-1")


def test_the_reference_names_every_section_and_key():
    text = reference()
    for section in RunFile.__struct_fields__[1:]:
        assert f"\n## {section}\n" in text
    for key in ("mlp_ratio", "stability_threshold", "final_div", "share", "micro_batch", "keep_best"):
        assert f"\n| `{key}` | " in text
