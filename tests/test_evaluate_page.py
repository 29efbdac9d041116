"""Pages: well-formed, complete in themselves, and with every figure, for any measures and any number of models."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console
from transformers import Gemma2Config, LlamaConfig

from longspan.errors import PatternError
from longspan.evaluate import plot
from longspan.evaluate.evaluation import MEASURES, Evaluation, Protocol
from longspan.evaluate.page import html, markdown, save
from longspan.evaluate.passkey import Passkey
from longspan.evaluate.perplexity import Perplexity
from longspan.evaluate.reading import readings
from longspan.evaluate.report import Report
from longspan.evaluate.speed import Speed
from longspan.evaluate.table import table
from longspan.evaluate.task import TASKS, Scores
from longspan.pattern import Causal, SlidingWindow

LENGTHS, DEPTHS = (512, 1024, 4096), (0.0, 1.0)
CONFIG = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, head_dim=64, hidden_size=256)
VOID = {"meta", "wbr"}


def evaluation(label, perplexities, shares, *measures):
    by_depth = tuple((share, 1.0) for share in shares)
    return Evaluation(
        label=label,
        source=f"runs/{label}",
        context=512,
        parameters=1000,
        perplexity=Perplexity(LENGTHS, tuple(map(math.log, perplexities)), 256, 24, 6144, False)
        if "perplexity" in measures
        else None,
        passkey=Passkey(LENGTHS, DEPTHS, by_depth, 4, 0) if "passkey" in measures else None,
        tokens=180000,
        seconds=12.3,
        tasks=tuple(
            Scores(
                task,
                LENGTHS,
                DEPTHS if task == "needle" else (),
                by_depth if task == "needle" else tuple((share,) for share in shares),
                8,
                0,
            )
            for task in TASKS
            if task in measures
        ),
        speed=Speed(
            LENGTHS,
            (0.1, 0.2, 1.6),
            (0.01,) * 3,
            (10**6, 2 * 10**6, 8 * 10**6),
            (None,) * 3,
            "cpu",
            "float32",
        )
        if "speed" in measures
        else None,
    )


def report(*measures, **options):
    before = evaluation("a <b> & c", (3.5, 70, math.inf), (1, 0.5, 0.25), *measures)
    after = evaluation("after", (3.5, 3.25, 3), (1, 1, 0.875), *measures)
    return Report("a | novel", 3, (before, after), protocol=Protocol(measures=measures), **options)


FULL = report(
    *MEASURES,
    command="longspan eval 'a <b>'",
    day="2026-01-01",
    readings=readings([("after", CONFIG, ("SlidingWindow(64)",), 1024)], pattern=Causal(), length=4096),
)


class Checker(HTMLParser):
    """Notes whatever is left open, closed twice, or would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.faults, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.faults += [
            name for name, value in attributes if name in ("src", "href", "srcset") or "//" in (value or "")
        ]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")


@pytest.mark.parametrize("measures", [MEASURES, *((measure,) for measure in MEASURES)])
def test_a_page_is_well_formed_and_fetches_nothing(measures):
    page = html(report(*measures))
    checker = Checker()
    checker.feed(page)
    assert not checker.faults and not checker.open
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(checker.tags)
    assert "url(http" not in page and "@import" not in page
    assert "a &lt;b&gt; &amp; c" in page and "<b>" not in page
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(drawing)
    assert not re.search(r"[\s\">-](nan|inf)\b", page)


def test_a_page_has_all_there_is_to_show():
    page = html(FULL)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Summary",
        "Perplexity by context length",
        "Passkeys retrieved",
        "Tasks by context length",
        "Speed and memory by context length",
        "Which keys each query reads, and the plan for it",
        "How this was measured",
    ]
    # Two curves of perplexity, one of passkeys, one of tasks, three of speed; maps of passkeys and of needles.
    assert page.count('class="plot"') == 7 + 4
    assert page.count("Which keys each query reads: ") == 2
    for text in (
        "longspan eval &#x27;a &lt;b&gt;&#x27;",
        "2026-01-01",
        "SlidingWindow(64)",
        "a &lt;b&gt; &amp; c, after as measured, 4,096 tokens".replace("a &lt;b&gt; &amp; c, ", ""),
        "after while training, 1,024 tokens",
        "<strong>3.25</strong>",
        "not finite",
        "is 85.6% or more",
        "a &lt;b&gt; &amp; c: 512. after: 4,096.",
        "prefers-color-scheme:dark",
        'name="viewport"',
        "2.13" if FULL.versions["torch"].startswith("2.13") else FULL.versions["torch"],
    ):
        assert text in page, text


def test_results_come_first_and_what_was_measured_last():
    shown = markdown(FULL)
    summary, rest = shown.split("## Perplexity by context length")
    assert (
        "| model | perplexity at 512 | perplexity at 4,096 | passkeys at 512 | passkeys at 4,096 | effective length | "
        "context |\n" in summary
    )
    assert "| after | 3.50 | 3.00 | 100% | 94% | 4,096 | 512 |\n" in summary
    assert "parameters" not in summary
    last = rest.split("## How this was measured")[1]
    assert "| model | from | parameters | dtype | tokens read | seconds |\n" in last
    assert "| after | runs/after | 1,000 | float32 | 180,000 | 12 |\n" in last


def test_the_best_is_the_least_where_less_is_better():
    """Memory, keys and values kept, and time for a token written; tokens read per second are best at the most."""
    first, second = FULL.evaluations
    small = replace(
        second.speed, reading=(0.05,) * 3, writing=(0.005,) * 3, cache=(10**5,) * 3, peak=(10**9,) * 3
    )
    large = replace(first.speed, peak=(2 * 10**9,) * 3)
    shown = markdown(
        replace(FULL, evaluations=(replace(first, speed=large), replace(second, speed=small)))
    ).split("## Speed and memory")[1]
    rows = re.findall(r"^\| (?:a .*|after) \|.*$", shown, flags=re.MULTILINE)[:8]
    assert [("after" in row, "**" in row) for row in rows] == [(False, False), (True, True)] * 4
    assert rows[-1] == "| after | **1.0 GB** | **1.0 GB** | **1.0 GB** |"


def test_names_are_broken_at_their_joints_only():
    named = replace(FULL.evaluations[0], label="some/long_name-of-1B", source="out/long_name")
    page = html(replace(FULL, evaluations=(named, *FULL.evaluations[1:])))
    shown = "some/<wbr>long_<wbr>name-of-1B"
    for place in ("<h1>{}", '<th scope="row">{}</th>', "</svg>{}</li>", "<figcaption>{}: % found"):
        assert place.format(shown) in page
    assert '<th scope="row">out/<wbr>long_<wbr>name</th>' in page
    assert "<title>some/long_name-of-1B and after" in page
    # A browser takes this for leave to break a word anywhere, and makes columns one letter wide.
    assert not re.search(r"\bth[^{]*\{[^}]*anywhere", page)


def test_markdown_has_the_same_tables_and_characters_for_pictures(tmp_path):
    save(FULL, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(FULL) and text.endswith("|\n")
    assert text.startswith("# a \\<b\\> & c and after at 512 to 4,096 tokens\n\n## Summary\n")
    assert "| after | 3.50 | **3.25** | **3.00** |" in text
    assert "| depth | 512 | 1k | 4k |\n| --- | ---: | ---: | ---: |\n| 0 | 100% | 50% | 25% |\n" in text
    assert "```text\nquery ↓  key → 0 to 1,023\n" in text and "```text\nPlan\n" in text
    assert "a \\| novel, 3 documents held out" in text
    assert "<svg" not in text
    # Every table has as many cells in each row as in its head.
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    save(FULL, tmp_path / "report.HTML")
    assert (tmp_path / "report.HTML").read_text() == html(FULL)


def test_the_figures_of_tasks_and_speed_are_in_the_json_and_in_the_table(tmp_path):
    saved = FULL.json()
    after = saved["models"][1]
    assert saved["command"] == "longspan eval 'a <b>'"
    assert saved["protocol"]["effective_threshold"] == 0.856
    assert after["tasks"]["needle"]["1024"] == {"share": 1.0, "by_depth": [1.0, 1.0]}
    assert after["tasks"]["variables"]["4096"] == {"share": 0.875}
    assert list(after["tasks"]) == list(TASKS)
    assert after["tasks_mean"] == {"512": 1.0, "1024": 1.0, "4096": pytest.approx(0.883929)}
    assert [model["effective_length"] for model in saved["models"]] == [512, 4096]
    assert after["speed"]["512"] == {
        "reading_seconds": 0.1,
        "writing_seconds": 0.01,
        "cache_bytes": 10**6,
        "peak_bytes": None,
    }
    shown = printed(FULL)
    for line in (
        " variables        a <b> & c   100%     50%     25%",
        " a <b> & c   100%     54%     30%   512",
        " after       100%    100%     88%   4,096",
        " after       5,120   5,120   2,560",
        " after       1.0 MB   2.0 MB   8.0 MB",
    ):
        assert line in shown, line
    only = report("variables").json()
    assert only["protocol"]["trials"] == Protocol().trials and "perplexity" not in only["models"][0]


def printed(shown):
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table(shown))
    return capture.get()


def test_curves_stand_where_their_values_are():
    svg = ElementTree.fromstring(
        plot.curves(
            (512, 1024, 4096), [("a", (0.0, 0.5, math.nan)), ("b", (1.0, 1.0, 1.0))], title="x", percent=True
        )
    )
    marks = [
        [float(part) for part in re.findall(r"[\d.]+", mark.get("transform"))]
        for mark in svg.iter("path")
        if mark.get("class") == "mark"
    ]
    (low, half, *top) = marks
    # What is not finite has no mark; lengths are spaced by powers of two.
    assert len(top) == 3
    assert low[1] > half[1] > top[0][1] and half[1] == pytest.approx((low[1] + top[0][1]) / 2, abs=0.1)
    assert (top[2][0] - top[1][0]) == pytest.approx(2 * (top[1][0] - top[0][0]), abs=0.3)


@pytest.mark.parametrize("values", [(1.5,), (0.0, 0.0), (math.inf,), (1e-6, 5e6), (7.0, 7.0)])
def test_curves_are_drawn_for_any_values(values):
    svg = plot.curves((512, 1024)[: len(values)], [("a", values)], title="x")
    for text in re.findall(r' (?:y|y1|x)="([^"]*)"', svg):
        assert -1 <= float(text) <= 400
    assert "nan" not in svg and svg.count("<text") < 16


def test_every_pattern_is_drawn_once():
    models = [
        ("a", CONFIG, (), 0),
        ("b", CONFIG, ("Causal()", "SlidingWindow(8)", "Causal()"), 64),
    ]
    found = readings(models, pattern=SlidingWindow(16), length=128)
    assert [
        (reading.labels, reading.occasion, str(reading.pattern), reading.length) for reading in found
    ] == [
        (("a", "b"), "as measured", "SlidingWindow(16)", 128),
        (("b",), "while training (layers 0, 2)", "Causal()", 64),
        (("b",), "while training (layers 1)", "SlidingWindow(8)", 64),
    ]
    assert readings(models[:1], pattern=None, length=128) == ()


def test_patterns_are_drawn_inside_the_windows_of_the_model():
    config = Gemma2Config(**CONFIG.to_dict() | {"sliding_window": 8, "layer_types": None})
    found = readings([("a", config, ("Causal()",), 64)], pattern=None, length=128)
    assert [(reading.occasion, str(reading.pattern)) for reading in found] == [
        ("while training (layers 0, 2)", "Causal() & Window(8)"),
        ("while training (layers 1)", "Causal()"),
    ]


def test_a_pattern_that_does_not_fit_its_model_is_refused():
    with pytest.raises(PatternError, match="cannot be divided equally"):
        readings([("b", CONFIG, ("PerHead([Causal(), Causal(), Causal()])",), 64)], pattern=None, length=64)
