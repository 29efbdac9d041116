"""Pictures: every cell is the share of its pairs that the mask holds, in characters, SVG and PNG alike."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from strategies import patterns, spans

from longspan.derive.bins import edges
from longspan.derive.mask import counts, mask
from longspan.derive.panel import HUES, heads, rgb
from longspan.derive.picture import Picture, gallery, picture
from longspan.errors import InputError, PatternError, ShapeError
from longspan.pattern import S2, Causal, Chunk, Dilated, LongMixed, LongNet, PerHead, Sink, SlidingWindow

SVG = "{http://www.w3.org/2000/svg}"


def texts(drawn: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def painted(drawn: str) -> dict[str, float]:
    """Return the area painted in each colour."""
    areas: dict[str, float] = {}
    for path in ElementTree.fromstring(drawn).iter(f"{SVG}path"):
        sides = re.findall(r"h([\d.]+)v([\d.]+)h-", path.get("d", ""))
        colour = path.get("fill", "")
        areas[colour] = areas.get(colour, 0) + sum(float(across) * float(down) for across, down in sides)
    return areas


@given(patterns, st.sampled_from([4, 8]), st.integers(1, 40), st.data())
def test_cells_are_means_of_the_mask(pattern, heads, cells, data):
    queries, keys = data.draw(spans(97)), data.draw(spans(97))
    panel = picture(pattern, queries=queries, keys=keys, heads=heads, cells=cells).panels[0]
    often = counts(pattern, queries=queries, keys=keys, heads=heads).double().mean(dim=0).numpy()
    rows, columns = edges(queries, panel.shape[0]), edges(keys, panel.shape[1])
    means = [[often[a:b, c:d].mean() for c, d in pairwise(columns)] for a, b in pairwise(rows)]
    assert np.allclose(panel.often, means)
    assert max(panel.shape) <= cells


@given(patterns)
def test_all_formats_take_any_pattern(pattern):
    drawn = picture(pattern, length=31, heads=4)
    assert ElementTree.fromstring(drawn.svg).tag == f"{SVG}svg"
    assert drawn.text.splitlines()[-1] == str(pattern)


@pytest.mark.parametrize("length", [1, 2, 31, 64])
def test_up_to_64_tokens_a_cell_is_a_pair(length: int):
    panel = picture(SlidingWindow(5), length=length).panels[0]
    assert ((panel.often > 0) == mask(SlidingWindow(5), length=length).numpy()).all()
    assert not panel.binned


def test_text_shows_how_often():
    assert str(picture(LongNet((2, 4), (1, 2)), length=4, heads=1, title="LongNet")) == "\n".join(
        [
            "LongNet",
            "query ↓  key → 0 to 3",
            "22· · ·",
            "████· ·",
            "██· 22·",
            "· · ████",
            "LongNet((2, 4), (1, 2))",
        ]
    )


def test_text_shows_shares_of_pairs_and_of_heads():
    drawn = picture(S2(8), length=24, heads=2, cells=6)
    assert str(drawn) == "\n".join(
        [
            "query ↓  key → 0 to 23",
            "▒▒· · · · ·",
            "▒▒▒▒· · · ·",
            "· ▒▒▒▒· · ·",
            "· · ▒▒▒▒· ·",
            "· · · ▒▒▒▒·",
            "· · · · ▒▒▒▒",
            "S2(8)",
            "a cell is 4 × 4 pairs, paler where fewer are read",
        ]
    )


def test_wide_pictures_take_one_character_a_cell():
    lines = str(picture(SlidingWindow(3), length=64)).splitlines()
    assert lines[1:-1] == [("·" * max(0, n - 2) + "█" * min(3, n + 1)).ljust(64, "·") for n in range(64)]


def test_panels_that_fit_on_the_page_stand_side_by_side():
    narrow = gallery({"two": SlidingWindow(2), "three": SlidingWindow(3)}, length=8)
    wide = gallery({"two": SlidingWindow(2), "three": SlidingWindow(3)}, length=60)
    assert str(narrow).splitlines()[0].split() == ["two", "three"]
    assert str(wide) == "\n\n".join(str(Picture((panel,))) for panel in wide.panels)


def test_cells_take_in_as_much_downward_as_across():
    panel = picture(Causal(), queries=range(900, 1000), keys=range(1000), cells=50).panels[0]
    assert panel.shape == (5, 50)


def test_svg_names_what_it_shows():
    drawn = picture(Causal() & ~Sink(2), length=1200, title="a < b & c").svg
    assert texts(drawn) == [
        "a < b & c",
        "key 0 →",
        "1,199",
        "query 0 →",
        "1,199",
        "Causal() & ~Sink(2)",
        "a cell is 19 × 19 pairs, paler",
        "where fewer are read",
    ]
    assert "http" not in drawn.replace(SVG[1:-1], "")


def test_svg_paints_the_pairs_that_are_read():
    # At 32 tokens a cell of 6 pixels leaves one free on two sides.
    drawn = picture(SlidingWindow(3), length=32).svg
    assert painted(drawn) == {HUES[0]: 25 * mask(SlidingWindow(3), length=32).sum()}


def test_svg_tells_heads_apart():
    pattern = PerHead([Causal() & Chunk(2), Causal() & Dilated(2, offset=1)])
    drawn = picture(pattern, length=8, heads=4).svg
    areas = painted(drawn)
    # The diagonal is read by the first two heads only, four pairs by all, and twelve by the last two only.
    mixed = next(colour for colour in areas if colour not in HUES)
    assert [areas[colour] / 23**2 for colour in (HUES[0], mixed, HUES[1])] == [8, 4, 12]
    assert texts(drawn)[-2:] == ["heads 0, 1", "heads 2, 3"]


def test_svg_tells_how_often():
    drawn = picture(LongNet((2, 4, 8), (1, 2, 4)), length=8, heads=1).svg
    assert set(painted(drawn)) == set(HUES[:3])
    assert texts(drawn)[-3:] == ["once", "twice", "more often"]


def test_more_heads_than_colours_differ_in_strength():
    panel = picture(LongMixed(4), length=16, heads=32).panels[0]
    assert not panel.coloured
    assert panel.legend == ()
    assert panel.note == "32 heads, paler where fewer are read"


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ((0,), "head 0"),
        ((2, 3), "heads 2, 3"),
        ((2, 3, 4), "heads 2–4"),
        ((0, 4, 8, 12), "heads 0, 4 … 12"),
        ((0, 1, 5), "heads 0, 1, 5"),
    ],
)
def test_heads_have_short_names(numbers: tuple[int, ...], name: str):
    assert heads(numbers) == name


def test_long_texts_cost_what_their_blocks_cost():
    panel = picture(SlidingWindow(4096), length=1_048_576).panels[0]
    assert panel.shape == (64, 64)
    assert np.count_nonzero(panel.often) == 127


@pytest.mark.parametrize("length", [8, 200])
def test_png_shows_the_same_cells(length: int, tmp_path: Path):
    drawn = picture(SlidingWindow(3), length=length, title="three")
    drawn.save(tmp_path / "new" / "window.png")
    pixels = np.rint(imread(tmp_path / "new" / "window.png")[:, :, :3] * 255)
    blue = (pixels == rgb(HUES[0])[0]).all(axis=2)
    assert blue.any() == (drawn.panels[0].often == 1).any()
    height, width = pixels.shape[:2]
    size = ElementTree.fromstring(drawn.svg)
    assert (width, height) == (2 * float(size.get("width", 0)), 2 * float(size.get("height", 0)))


def test_files_hold_what_is_shown(tmp_path: Path):
    drawn = picture(Causal(), length=5)
    for ending, content in ((".txt", str(drawn) + "\n"), (".svg", drawn.svg), (".SVG", drawn.svg)):
        drawn.save(tmp_path / f"causal{ending}")
        assert (tmp_path / f"causal{ending}").read_text(encoding="utf-8") == content
    assert drawn._repr_svg_() == drawn.svg


def test_other_endings_are_refused():
    with pytest.raises(InputError) as raised:
        picture(Causal(), length=5).save("out/causal.jpeg")
    assert (
        str(raised.value)
        == """\
A picture is saved as text, SVG or PNG.
  asked   out/causal.jpeg
  ending  .jpeg
  try     causal.svg; the endings are .txt, .svg, .png"""
    )


def test_png_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError) as raised:
        picture(Causal(), length=5).save(tmp_path / "causal.png")
    assert (
        str(raised.value)
        == f"""\
A PNG picture needs matplotlib, which is not installed.
  asked  {tmp_path / "causal.png"}
  try    pip install matplotlib, or causal.svg, which needs nothing"""
    )


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ShapeError) as raised:
        picture(Causal(), length=0)
    assert (
        str(raised.value)
        == """\
A picture shows at least one query, one key, one head and one cell.
  queries  range(0, 0)
  keys     range(0, 0)
  heads    None
  cells    64
  try      length=64"""
    )


def test_heads_that_differ_need_their_number():
    with pytest.raises(PatternError) as raised:
        picture(LongMixed(8), length=32)
    assert (
        str(raised.value)
        == """\
This pattern differs from head to head, so it has no single relation.
  pattern  LongMixed(8)
  try      pattern.at_head(head, heads), or name the number of heads where one is asked for"""
    )
