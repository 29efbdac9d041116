"""The benchmark of decoding runs, at sizes at which its figures mean nothing."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from tiny import byte_tokenizer, llama

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "generate.py"


def test_caches_are_bounded_or_grow(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    main, report = runpy.run_path(str(SCRIPT))["main"], tmp_path / "new" / "generate.json"
    cases = "dense,window,sinks,window-int8,window-pages,transformers-dense,transformers-sliding"
    sizes = ["--tokens", "320", "--window", "10", "--cases", cases, "--json", str(report)]
    main(["--model", str(tmp_path / "model"), *sizes])
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    held = {name: [found["cache_bytes"] for found in row["lengths"]] for name, row in rows.items()}
    # Two layers, two key heads, keys and values of eight float32 numbers.
    token = 2 * 2 * 2 * 8 * 4
    assert held["transformers-dense"] == [10 * token, 80 * token, 160 * token, 320 * token]
    assert held["dense"][-1] >= 320 * token
    assert held["transformers-sliding"] == [9 * token] * 4
    # Window, sinks, and the sinks' keys once more to be turned.
    assert held["sinks"] == [(6 + 4 + 4) * token] * 4
    assert held["window"][-1] <= (9 + 64) * token
    # Pages of sixteen tokens.
    assert held["window-pages"][-1] <= (9 + 64 + 2 * 16) * token
    # A byte for every number and four for every eight of them.
    assert held["window-int8"][-1] * 8 == held["window"][-1] * 3
    assert all(row["tokens_per_second"] > 0 and row["last_to_first"] > 0 for row in rows.values())
    assert all(found["of_transformers"] == 1 for found in rows["transformers-dense"]["lengths"])
    # Machine, a note, an empty line and the heads of the columns come first.
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(rows)


@pytest.mark.parametrize(
    "options", [["--window", "4"], ["--tokens", "1"], ["--model", "no/such/folder"], ["--cases", "all"]]
)
def test_what_cannot_be_measured_is_said(options):
    with pytest.raises(SystemExit, match=r"There is no (model folder|case all)|A window is longer"):
        runpy.run_path(str(SCRIPT))["main"](options)
