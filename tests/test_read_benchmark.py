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
    sizes = ["--tokens", "120", "--window", "10", "--parts", "4", "--json", str(report)]
    main(["--model", str(tmp_path / "model"), *sizes])
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    # Two layers, two key heads, keys and values of eight float32 numbers.
    token = 2 * 2 * 2 * 8 * 4
    assert rows["transformers-dense"]["cache_bytes"] == [30 * token, 60 * token, 90 * token, 120 * token]
    assert rows["dense"]["cache_bytes"][-1] >= 120 * token
    assert rows["transformers-sliding"]["cache_bytes"] == [9 * token] * 4
    # Window, sinks, and the sinks' keys once more to be turned.
    assert rows["sinks"]["cache_bytes"] == [(6 + 4 + 4) * token] * 4
    assert rows["window"]["cache_bytes"][-1] <= (9 + 64) * token
    # A byte for every number and four for every eight of them.
    assert rows["window-int8"]["cache_bytes"][-1] * 8 == rows["window"]["cache_bytes"][-1] * 3
    assert all(len(row["seconds"]) == 4 and row["tokens_per_second"] > 0 for row in rows.values())
    # Machine, an empty line and the heads of the columns come first.
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(rows)


@pytest.mark.parametrize(
    "options", [["--window", "4"], ["--tokens", "1"], ["--model", "no/such/folder"], ["--cases", "all"]]
)
def test_what_cannot_be_measured_is_said(options):
    with pytest.raises(SystemExit, match=r"There is no (model folder|case all)|A window is longer"):
        runpy.run_path(str(SCRIPT))["main"](options)
