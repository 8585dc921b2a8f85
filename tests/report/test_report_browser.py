"""Pages in a real browser: nothing overflows or complains, on small and large, light and dark; nothing runs."""

import json

import pytest
from report_helpers import check, make_run, records, saved, summary

from hpclr.report.page import page_of
from hpclr.report.runs import read_runs

pytestmark = pytest.mark.slow  # some 20 s, most of them for the browser to start and a run to be trained

HOSTILE = "\"><img src=x onerror=alert(1)>'<script>alert(1)<\\script>"
LONG = "a-name-that-goes-on-" * 10


@pytest.fixture(scope="module")
def pages(tmp_path_factory, trained):
    """Of one run, and of several with hostile and long names and layers."""
    place = tmp_path_factory.mktemp("pages")
    layers = [f"<img src=x onerror=alert({number})>" for number in range(20)]
    hostile = [*records(layers=layers), json.dumps({"kind": "</title><script>alert(1)</script>"})]
    runs = [
        trained,
        make_run(place, HOSTILE, hostile, method="{name: dense}"),
        make_run(place, LONG, [*records(), check(401, 1.7e9 + 9000, [f"layer.{n}" for n in range(500)])]),
        *(make_run(place, f"more-{number}", summary=summary()) for number in range(4)),
    ]
    found = {"one": runs[:1], "several": runs}
    for name, chosen in found.items():
        (place / f"{name}.html").write_bytes(page_of(read_runs(chosen)))
    return {name: place / f"{name}.html" for name in found}


@pytest.fixture
def opened(browser):
    """Opens a page, and fails if it complains, asks for anything, or runs anything."""
    said: list[str] = []
    contexts = []

    def open_page(path, width, scheme):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on(
            "request", lambda request: said.append(request.url) if request.url[:5] not in ("file:", "data:") else None
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize(("name", "scheme"), [("one", "dark"), ("several", "light")])
def test_nothing_overflows_or_complains(opened, pages, name, width, scheme, tmp_path):
    page = opened(pages[name], width, scheme)
    scrolled, shown = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scrolled <= shown
    assert page.evaluate(_TEXT_OUTSIDE) == []
    assert (
        page.evaluate("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(255, 255, 255)",
            "dark": "rgb(20, 23, 27)",
        }[scheme]
    )
    picture = page.screenshot(path=tmp_path / "page.png")
    assert len(picture) > 10_000


# Texts of plots that go beyond their plot by more than a unit.
_TEXT_OUTSIDE = """
[...document.querySelectorAll('svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
  const box = text.getBBox(), view = svg.viewBox.baseVal;
  return box.x < -1 || box.y < -1 || box.x + box.width > view.width + 1 || box.y + box.height > view.height + 1;
}).map(text => text.textContent))
"""


def test_a_hostile_name_is_text(opened, pages):
    page = opened(pages["several"], 1280, "light")
    assert page.locator("script").count() == 0
    assert page.locator("img").count() == 0
    assert page.get_by_role("columnheader").nth(2).inner_text() == HOSTILE
    assert page.evaluate("document.querySelectorAll('[onerror]').length") == 0


def test_even_where_escaping_fails_nothing_runs(browser, pages, tmp_path):
    """The policy of the page keeps scripts and foreign pictures from running and loading."""
    path = tmp_path / "broken.html"
    script = "document.title='harmed'"
    harm = f'<script>{script}</script><img src=x onerror="{script}"><p style="color:red" id="p">'
    path.write_text(pages["one"].read_text().replace("<main>", f"<main>{harm}"))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert "harmed" not in page.title()
    assert page.evaluate("getComputedStyle(document.querySelector('#p')).color") != "rgb(255, 0, 0)"
    page.close()


def test_plots_and_numbers_can_be_saved(opened, pages, tmp_path):
    page = opened(pages["one"], 1280, "light")
    content = pages["one"].read_text()
    for ending, label in (("svg", "Save as SVG"), ("csv", "Numbers as CSV")):
        link = page.get_by_role("link", name=label).nth(1)
        with page.expect_download() as download:
            link.click()
        name = download.value.suggested_filename
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_text() == saved(content, ending)[name.removesuffix(f".{ending}")]


def test_a_saved_plot_stands_on_its_own(opened, pages, tmp_path):
    found = saved(pages["one"].read_text(), "svg")
    for name in ("loss-steps", "run1-digits-rank", "shares"):
        path = tmp_path / f"{name}.svg"
        path.write_text(found[name])
        page = opened(path, 800, "light")
        assert page.evaluate("document.documentElement.tagName") == "svg"
        assert page.evaluate("getComputedStyle(document.querySelector('.title')).fontWeight") == "600"


def test_the_page_prints_in_light_colours(opened, pages):
    page = opened(pages["one"], 1280, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf()[:5] == b"%PDF-"
