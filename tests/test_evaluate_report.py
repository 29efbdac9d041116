"""The report: its JSON, its table and its chart, from figures that are known beforehand."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from tiny import byte_tokenizer, llama

from longspan.evaluate.chart import _maps, chart
from longspan.evaluate.evaluation import Evaluation, Protocol, evaluate
from longspan.evaluate.passkey import Passkey
from longspan.evaluate.perplexity import Perplexity
from longspan.evaluate.report import Report
from longspan.evaluate.table import table
from longspan.text.documents import Document
from longspan.text.encoding import encode

LENGTHS = (512, 1024, 4096)


def evaluation(label, perplexities, shares, *, context=512, text_bytes=6144):
    return Evaluation(
        label=label,
        source=f"models/{label}",
        context=context,
        parameters=1000,
        perplexity=Perplexity(
            LENGTHS,
            tuple(math.log(value) for value in perplexities),
            stride=256,
            segments=24,
            text_bytes=text_bytes,
            crossing=False,
        ),
        passkey=Passkey(LENGTHS, (0.0, 1.0), shares, trials=4, seed=0),
        tokens=180000,
        seconds=12.34,
    )


BEFORE = evaluation("before", (3.5, 7, 14), ((1.0, 1.0), (0.0, 0.5), (0.0, 0.25)))
AFTER = evaluation("after", (3.5, 3.25, 3), ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)), context=4096)
REPORT = Report("a novel", 3, (BEFORE, AFTER))


def test_the_json_has_every_figure_under_the_keys_of_its_schema(tmp_path):
    REPORT.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == REPORT.json()
    assert set(saved.pop("versions")) == {"longspan", "python", "torch", "transformers"}
    after = saved["models"].pop()
    assert after["perplexity"] == {"512": 3.5, "1024": 3.25, "4096": 3.0}
    assert saved == {
        "schema": "longspan/evaluation/1",
        "text": {"source": "a novel", "documents": 3},
        "protocol": {
            "lengths": [512, 1024, 4096],
            "stride": 256,
            "segments": 24,
            "predicted_tokens": 6144,
            "crossing_documents": False,
            "depths": [0.0, 1.0],
            "trials": 4,
            "seed": 0,
            "pattern": None,
        },
        "models": [
            {
                "label": "before",
                "source": "models/before",
                "context": 512,
                "parameters": 1000,
                "dtype": "float32",
                "tokens": 180000,
                "seconds": 12.3,
                "perplexity": {"512": 3.5, "1024": 7.0, "4096": 14.0},
                "bits_per_byte": {"512": 1.807355, "1024": 2.807355, "4096": 3.807355},
                "loss": {"512": 1.252763, "1024": 1.94591, "4096": 2.639057},
                "passkey": {
                    "512": {"share": 1.0, "by_depth": [1.0, 1.0]},
                    "1024": {"share": 0.25, "by_depth": [0.0, 0.5]},
                    "4096": {"share": 0.125, "by_depth": [0.0, 0.25]},
                },
            }
        ],
    }


def test_figures_that_are_not_finite_are_null():
    report = Report("a novel", 3, (evaluation("broken", (3, math.inf, math.nan), AFTER.passkey.shares),))
    assert report.json()["models"][0]["perplexity"] == {"512": 3.0, "1024": None, "4096": None}
    json.dumps(report.json(), allow_nan=False)


def test_the_table_has_a_row_per_model_and_a_column_per_length():
    assert (
        printed(REPORT)
        == """\
Perplexity by context length (the last 256 tokens of 24 windows)

 model     512   1,024   4,096
 ─────────────────────────────
 before   3.50    7.00   14.00
 after    3.50    3.25    3.00

Passkeys retrieved by length (of 8 prompts)

 model     512   1,024   4,096   weakest
 ────────────────────────────────────────────────────
 before   100%     25%     12%   0% at 1,024, depth 0
 after    100%    100%    100%

text: a novel, 3 held-out documents"""
    )


def test_the_notes_say_what_was_out_of_the_ordinary():
    crossing = replace(AFTER, perplexity=replace(AFTER.perplexity, crossing=True))
    report = Report("a novel", 1, (crossing,), pattern="Causal() & Window(512)")
    assert printed(report).endswith(
        "text: a novel, 1 held-out document\n"
        "attention: Causal() & Window(512)\n"
        "windows cross document borders: too few documents are as long as the longest window"
    )
    assert report.json()["protocol"]["pattern"] == "Causal() & Window(512)"
    assert report.json()["protocol"]["crossing_documents"] is True


def test_models_of_different_tokenizers_are_compared_by_bits_per_byte():
    other = evaluation("other", (40, 50, 60), BEFORE.passkey.shares, text_bytes=4 * 6144)
    shown = printed(Report("a novel", 3, (BEFORE, other)))
    assert "Bits per byte by context length (the models' tokens differ: compare these)" in shown
    assert " other    1.330   1.411   1.477" in shown


def test_large_perplexities_stay_short():
    shown = printed(
        Report("a novel", 3, (evaluation("x", (123.456, 45678.9, math.inf), BEFORE.passkey.shares),))
    )
    assert " x       123.5   45,679   not finite" in shown


def printed(report):
    console = Console(width=110, file=None)
    with console.capture() as capture:
        console.print(table(report))
    return "\n".join(line.rstrip() for line in capture.get().strip().splitlines())


@pytest.mark.parametrize(
    "models",
    [
        [BEFORE],
        [BEFORE, AFTER],
        [BEFORE, evaluation("wild", (3, 400, math.inf), BEFORE.passkey.shares, context=None), AFTER],
        [evaluation(f"model {number}", (9, 8, 7), AFTER.passkey.shares) for number in range(8)],
    ],
)
def test_the_chart_is_drawn_for_any_number_of_models(tmp_path, models):
    file = tmp_path / "curves.png"
    chart(Report("a novel", 3, tuple(models)), file)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1600, 1152)


@pytest.mark.parametrize("models", [1, 2, 3])
def test_the_maps_show_the_beginning_of_the_text_at_the_top(models):
    figure = Figure()
    _maps(figure.subfigures(1, 1), Report("a novel", 3, (BEFORE,) * models))
    for axes in figure.subfigs[0].axes[:models]:
        assert axes.yaxis_inverted()
        # By depth from the top, at the three lengths.
        assert [text.get_text() for text in axes.texts] == ["100", "0", "0", "100", "50", "25"]
        assert axes.get_yticks()[0] < axes.get_yticks()[1]


def test_an_evaluation_counts_what_it_read():
    tokenizer = byte_tokenizer()
    text = encode([Document("a", "some text to read, " * 100)], tokenizer)
    parts, last = [], {}

    def begin(part):
        parts.append(part)
        return lambda done, total: last.__setitem__(part, (done, total))

    protocol = Protocol(lengths=(128, 256), stride=64, segments=3, depths=(0.0, 1.0), trials=2, seed=1)
    found = evaluate(llama(), tokenizer, text, label="tiny", protocol=protocol, progress=begin)
    assert (found.label, found.source, found.context, found.parameters) == ("tiny", "tiny", 256, 31968)
    assert parts == ["tiny, perplexity", "tiny, passkey"]
    assert last == {"tiny, perplexity": (1152, 1152), "tiny, passkey": (1536, 1536)}
    assert found.tokens == 1152 + 1536
    assert found.seconds > 0
    assert found.passkey.seed == 1
