"""The parts of plots: axes, thinning, heat maps to the pixel, words that are escaped."""

import struct
import xml.etree.ElementTree as ET
import zlib
from base64 import b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpclr.report.axes import Axis, axis_over, compact
from hpclr.report.canvas import Plot
from hpclr.report.heat import Row, heat_map
from hpclr.report.lines import Line, Mark, Words, line_plot
from hpclr.report.markup import Markup, element, fitted, joined, text_width, told_apart
from hpclr.report.raster import colour, level, picture
from hpclr.report.records import MOST
from hpclr.report.shares import Bar, share_plot
from hpclr.report.thinning import averaged, thinned

NUMBERS = st.floats(-MOST, MOST).map(lambda value: value if abs(value) >= 1 / MOST else 0.0)  # as records have them
HOSTILE = "\"'><script>alert(1)</script>&\x00\x1b[31m\u202e\ud800"


def lines_of(plot):
    root = ET.fromstring(plot.svg)
    return [node.get("d") for node in root.iter("{http://www.w3.org/2000/svg}path") if "curve" in node.get("class", "")]


@given(st.lists(NUMBERS, min_size=1), st.booleans(), st.booleans())
def test_all_values_are_on_the_axis_and_its_ticks_are_in_its_range(values, logarithmic, from_zero):
    axis = axis_over(values, 300.0, 20.0, may_be_logarithmic=logarithmic, from_zero=from_zero, margin=0.03)
    assert all(19.9 <= axis.at(value) <= 300.1 for value in values)
    assert len(axis.ticks()) <= 7
    assert all(19.9 <= axis.at(tick) <= 300.1 for tick in axis.ticks())


@pytest.mark.parametrize("value", [0.97, 0.03, 2.3, -40.0, 8970.0])
def test_the_axis_of_a_single_value_is_about_as_it(value):
    axis = axis_over([value, value], 300.0, 20.0, margin=0.03)
    assert axis.at(value) == pytest.approx(160)
    assert axis.high - axis.low == pytest.approx(0.106 * abs(value))
    assert len(axis.ticks()) >= 2


@given(st.integers(0, 10**7), st.integers(1, 10**7))
def test_there_are_no_parts_of_steps(low, more):
    ticks = axis_over([low, low + more], 0.0, 1.0, whole=True).ticks()
    assert ticks
    assert all(tick.is_integer() for tick in ticks)


def test_a_run_of_a_step_or_two_has_whole_steps_below_it():
    plot = line_plot(Words("n", "t", "step"), [Line("a", [(1, 0.5), (2, 0.6)])])
    assert "0.5</text>" not in plot.svg.partition("step</text>")[0]


def test_a_logarithmic_axis_has_powers_of_ten():
    assert Axis(1e-3, 10.0, 0, 100, logarithmic=True).ticks() == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (999_999, "1M"), (0.0005, "5e-4"), (-3e9, "-3G"), (1e20, "1e20")],
)
def test_numbers_are_short(value, text):
    assert compact(value) == text


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(-1e6, 1e6)), min_size=30, max_size=200))
def test_thinning_loses_no_extreme_and_neither_end(points):
    points = sorted(points)
    few = thinned(points, 5)
    assert {min(y for _, y in points), max(y for _, y in points)} <= {y for _, y in few}
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert few == sorted(few, key=lambda point: point[0])
    assert len(few) <= 20
    assert set(few) <= set(points)


def test_means_are_of_all_values():
    points = [(float(x), float(x % 2)) for x in range(1000)]
    assert all(mean == pytest.approx(0.5, abs=0.1) for _, mean in averaged(points, 10))
    assert len(averaged(points, 10)) == 10


def test_a_line_is_broken_where_nobody_worked():
    points = [(1.0, 1.0), (2.0, 2.0), (10.0, 3.0)]
    line = Line("a", points, 0, [Mark(5.0, "attempt 2", "")])
    whole = line_plot(Words("n", "t", "x"), [line])
    broken = line_plot(Words("n", "t", "x"), [line], apart_at_marks=True)
    assert [lines_of(plot)[0].count("M") for plot in (whole, broken)] == [1, 2]
    assert "attempt 2" in broken.svg


def test_nothing_to_draw_makes_no_plot():
    words = Words("n", "t", "x")
    assert line_plot(words, [Line("a", [])]) is None
    assert heat_map(words, [Row("a", [])], 10, (0.0, 1.0)) is None
    assert share_plot(words, [Bar("a", {"x": 0.0})]) is None


def test_numbers_of_a_plot_are_those_drawn():
    plot = line_plot(Words("n", "Loss", "step"), [Line("run", [(1.0, 0.5), (2.0, 0.25)])])
    assert plot.csv_file().decode() == "line,step,Loss\nrun,1,0.5\nrun,2,0.25\n"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_a_spreadsheet_takes_no_name_for_a_formula(text):
    plot = Plot("n", Markup("<svg></svg>"), ("a",), [(text,)])
    assert plot.csv_file().decode() == f"a\n'{text}\n"


@pytest.mark.parametrize("many", [1, 40])
def test_pictures_are_well_formed_whatever_the_names(many):
    words = Words("n", HOSTILE, HOSTILE, HOSTILE)
    names = [f"{HOSTILE}{number}" for number in range(many)]
    points = [(1.0, 1.0), (2.0, 100.0)]
    marks = [Mark(1.5, HOSTILE, HOSTILE)]
    for plot in (
        line_plot(words, [Line(name, points, number, marks) for number, name in enumerate(names)]),
        heat_map(words, [Row(name, points, 1.0) for name in names], 10, (0.0, 1.0)),
        share_plot(words, [Bar(name, {"a": 1.0, "b": 2.0}) for name in names]),
    ):
        for content in (plot.svg, plot.svg_file().decode()):
            root = ET.fromstring(content)
            assert not [node for node in root.iter() if "script" in node.tag]
        assert "var(" not in plot.svg_file().decode()
        plot.csv_file()


def test_text_is_escaped_and_markup_is_not():
    assert element("p", "<b>", Markup("<b></b>"), class_='"') == '<p class="&quot;">&lt;b&gt;<b></b></p>'
    assert joined("&", None, "") == "&amp;"


def test_of_a_long_name_both_ends_are_shown():
    assert fitted("blocks.0.attention.out", 90) == "blocks…on.out"
    assert fitted("head", 90) == "head"
    assert fitted("W" * 1000, 50) == "W…WW"
    assert all(text_width(fitted(name * 40, 100)) <= 100 for name in ("W", "i", "a.B", "漢", "\x00"))


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["runs/vit/imagenet-oialr-s1", "runs/vit/imagenet-dense-s1"], ["…oialr-s1", "…dense-s1"]),
        (["experiments/of-last-week/a", "experiments/of-last-week/ab"], ["…a", "…ab"]),
        (["imagenet-resnet50-oialr", "imagenet-resnet50-"], ["…resnet50-oialr", "…resnet50-"]),  # nothing is no name
        (["short-a", "short-b"], ["short-a", "short-b"]),
        (["convolutional-network-of-old"] * 2, ["convolutional-network-of-old"] * 2),
        (["resnetfromnowon-a", "resnetforeverandever"], ["resnetfromnowon-a", "resnetforeverandever"]),
        ([], []),
    ],
)  # fmt: skip
def test_what_all_names_begin_with_is_left_out_where_they_are_too_long(names, shown):
    assert told_apart(names, 110) == shown


def test_long_names_of_runs_are_told_apart_and_told_in_full():
    names = [f"experiments/imagenet-vit-b16-{method}-seed-1-of-three" for method in ("oialr", "dense")]
    plot = line_plot(Words("n", "t", "x"), [Line(name, [(1.0, 1.0)], i) for i, name in enumerate(names)])
    texts = list(ET.fromstring(plot.svg).iter("{http://www.w3.org/2000/svg}text"))
    legend = {"".join(node.itertext()) for node in texts if node.get("class") == "name"}
    assert legend == {f"{name}{fitted('…' + name[29:], 110)}" for name in names}  # title, and what is shown
    assert all(any(f"…{method}" in text for text in legend) for method in ("oialr", "dense"))


def pixels(uri):
    """Width, palette and rows of a PNG, by the standard's own words."""
    content = b64decode(uri.partition(",")[2])
    chunks, place = {}, 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        assert struct.unpack(">I", content[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        place += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = zlib.decompress(chunks[b"IDAT"])
    return [raw[row * (width + 1) + 1 : (row + 1) * (width + 1)] for row in range(height)], chunks[b"PLTE"]


def test_a_picture_holds_its_pixels_and_the_colours_of_viridis():
    rows, palette = pixels(picture([bytes([0, 254, 255]), bytes([1, 2, 3])]))
    assert rows == [bytes([0, 254, 255]), bytes([1, 2, 3])]
    assert (palette[:3].hex(), palette[254 * 3 : 255 * 3].hex()) == ("440154", "fde725")
    assert colour(0.0) == "#440154"


def test_levels_cover_the_scale():
    assert [level(value, 0.0, 1.0) for value in (None, -1.0, 0.0, 0.5, 1.0, 9.0)] == [255, 0, 0, 127, 254, 254]


def test_each_pixel_of_a_heat_map_has_the_value_of_the_check_before_it():
    rows = [Row("a", [(50.0, 0.0), (75.0, 1.0)]), Row("b", [(25.0, 1.0)])]
    plot = heat_map(Words("n", "t", "step"), rows, 100, (0.0, 1.0))
    image = next(ET.fromstring(plot.svg).iter("{http://www.w3.org/2000/svg}image"))
    (first, second), _ = pixels(image.get("href"))
    width = len(first)
    assert [first[int(width * share)] for share in (0.2, 0.49, 0.51, 0.74, 0.76, 0.99)] == [255, 255, 0, 0, 254, 254]
    assert [second[int(width * share)] for share in (0.2, 0.3, 0.99)] == [255, 254, 254]


def test_shares_are_in_words():
    plot = share_plot(Words("n", "t", "x"), [Bar("run", {"computing": 3.0, "data": 1.0})])
    assert "computing 75% · data 25%" in plot.svg
