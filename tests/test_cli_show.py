"""The command line: what `longspan show` prints and draws, how it refuses, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from longspan.cli.show import parse_range
from longspan.derive.picture import picture
from longspan.derive.reach import reach
from longspan.errors import InputError
from longspan.kernel.plan import plan
from longspan.pattern import LongMixed, SlidingWindow

SVG = "{http://www.w3.org/2000/svg}"


def test_show_draws_and_plans_and_looks(run):
    code, out, err = run("show", "SlidingWindow(3)", "--length", 8, "--heads", 1, "--layers", 3)
    assert (code, err) == (0, "")
    assert (
        out
        == """\
query ↓  key → 0 to 7
██· · · · · · ·
████· · · · · ·
██████· · · · ·
· ██████· · · ·
· · ██████· · ·
· · · ██████· ·
· · · · ██████·
· · · · · ██████
SlidingWindow(3)

"""
        + str(plan(SlidingWindow(3), length=8))
        + """

Reach of token 7 of 8
  layers  tokens seen  of all  farthest back
       1            3  37.50%              2
       2            5  62.50%              4
       3            7  87.50%              6
  the first token is seen after 4 layers
"""
    )


def test_queries_are_drawn_and_planned_alone(run):
    code, out, _ = run("show", "LongMixed(64)", "--length", "1k", "--queries", "1000:", "--width", 32)
    assert code == 0
    drawn, planned, _ = out.split("\n\n")
    ours = range(1000, 1024)
    assert drawn == str(picture(LongMixed(64), queries=ours, keys=range(1024), heads=8, cells=32))
    assert planned == str(plan(LongMixed(64), length=1024, queries=ours, heads=8, width=32))


@pytest.mark.parametrize("columns", [20, 80, 110])
def test_lines_fit_the_terminal(run, monkeypatch, columns):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: __import__("os").terminal_size((columns, 24)))
    code, out, _ = run("show", "LongMixed(64)", "--length", "1k")
    cells = [line for line in out.splitlines() if line and set(line) <= set("·░▒▓█ ")]
    assert code == 0
    assert max(map(len, cells)) in range(min(columns, 64) // 2, min(columns, 64) + 1)


def test_svg_has_a_title_and_a_legend(run, tmp_path):
    file = tmp_path / "s2.svg"
    code, out, _ = run("show", "S2(16)", "--length", 64, "--heads", 4, "--svg", file)
    assert code == 0 and out.endswith(f"\n\npicture in {file}\n")
    texts = [element.text for element in ElementTree.parse(file).iter(f"{SVG}text")]
    assert texts[0] == "64 tokens, 4 heads"
    assert texts[-3:] == ["S2(16)", "heads 0, 1", "heads 2, 3"]
    title = ElementTree.parse(file).find(f"{SVG}title")
    assert title is not None and title.text == "Which keys each query reads: S2(16), 64 tokens, 4 heads"


def test_a_million_tokens_are_shown(run):
    code, out, _ = run("show", "SlidingWindow(4096)", "--length", "1m")
    assert code == 0
    assert "4,286,580,736" in out.replace("34,292,645,888", "4,286,580,736")
    assert str(reach(SlidingWindow(4096), layers=32, length=1 << 20, heads=8)) in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["SlidingWindo(8)"],
            "There is no pattern called SlidingWindo.\n  asked  SlidingWindo(8)\n",
        ),
        (
            ["SlidingWindow(8, casual=False)"],
            "This text is no pattern.\n"
            "  asked  SlidingWindow(8, casual=False)\n"
            "  wrong  SlidingWindow has no argument `casual`; it takes window, causal\n"
            "  try    SlidingWindow(causal=...)\n",
        ),
        (["__import__('os').getcwd()"], "This text is no pattern.\n"),
        (["Window(0)"], "Window takes an integer of at least 1 for `size`.\n"),
        (["S2(8)", "--heads", "3"], "The heads cannot be divided equally among the parts of this pattern.\n"),
        (["Causal()", "--length", "0"], "This is not a length.\n"),
        (["Causal()", "--svg", "a.png"], "A file of this kind cannot be written.\n"),
        (["Causal()", "--svg", "none/a.svg"], "A file cannot be written.\n"),
        (
            ["Causal()", "--length", "100", "--queries", "50:200"],
            "These are no queries of the text.\n"
            "  asked   queries '50:200'\n"
            "  wanted  A:B with 0 <= A < B <= 100\n"
            "  try     --queries 36:100\n",
        ),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_bad_input_gets_one_message_and_code_2(run, arguments, text):
    code, out, err = run("show", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(text)
    assert "Traceback" not in err


def test_the_nearest_name_is_suggested(run):
    assert run("show", "SlidingWindo(8)")[2].endswith("  try    SlidingWindow\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0:4", range(4)),
        (":4", range(4)),
        ("1k:", range(1024, 4096)),
        (" 3 : 5 ", range(3, 5)),
        ("00:1", range(1)),
    ],
)
def test_ranges_are_read_as_people_write_them(text, found):
    assert parse_range(text, 4096) == found


@pytest.mark.parametrize("text", ["", "5", "5:5", "9:4", "0:4097", "a:b", "-3:4", "1:2:3"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(InputError):
        parse_range(text, 4096)


def test_show_does_not_load_the_models_packages():
    program = (
        "import sys; sys.argv = ['longspan', 'show', 'Causal()', '--length', '8']\n"
        "from longspan import cli\n"
        "try: cli.main()\n"
        "except SystemExit: print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "longspan.derive.reach" in loaded
    assert {"transformers", "matplotlib", "peft", "datasets"}.isdisjoint(loaded)
