"""The benchmark of a CUDA device makes every table, at sizes at which its figures mean nothing."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "gpu.py"))["main"].__globals__


def test_every_table_is_made(script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report, page = tmp_path / "new" / "gpu.json", tmp_path / "new" / "gpu.md"
    script["main"](["--device", "cpu", "--toy", "--json", str(report), "--table", str(page)])
    found = json.loads(report.read_text())
    for name in script["TABLES"]:
        assert found[name], name
        assert all(row["what"] != "failed" for row in found[name])
        assert f"## {name}" in page.read_text()
    assert all(row["exact"] for row in found["stream"])
    assert all(row["finite"] and row["output_error"] < 1e-5 for row in found["poison"])
    assert {row["length"] for row in found["patterns_by_length"]} == {96, 128}
    assert page.read_text() == capsys.readouterr().out


def test_a_table_that_fails_does_not_take_the_others_with_it(script: dict[str, Any], tmp_path: Path):
    report = tmp_path / "gpu.json"
    script["Bench"].memory = lambda bench: iter([1 // 0])
    with pytest.raises(SystemExit, match=r"These tables failed: memory\."):
        script["main"](["--device", "cpu", "--toy", "--only", "memory,decoding", "--json", str(report)])
    found = json.loads(report.read_text())
    assert found["memory"][0]["refused"].startswith("ZeroDivisionError")
    assert found["decoding"][0]["forward_seconds"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device on this machine")
def test_a_device_that_is_not_there_is_said(script: dict[str, Any]):
    with pytest.raises(SystemExit, match=r"There is no CUDA device here, so nothing was measured\."):
        script["main"](["--toy"])
