"""The benchmark runs, at sizes at which its figures mean nothing."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.errors import PlanError

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--heads", "4", "--width", "8", "--repeats", "1"]


@pytest.fixture
def script() -> dict[str, Any]:
    """The names of the script, as its own functions see them."""
    return runpy.run_path(str(FOLDER / "attention.py"))["main"].__globals__


def test_every_pattern_is_measured(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "new" / "attention.json"
    script["main"](["--lengths", "32,64", "--json", str(report), *SMALL])
    rows = json.loads(report.read_text())["rows"]
    assert {(row["name"], row["length"]) for row in rows} >= {
        (str(pattern), length) for pattern, _ in script["PATTERNS"] for length in (32, 64)
    }
    for row in rows:
        assert len(row["forward_times"]) == len(row["backward_times"]) == 1
        assert row["forward"] == row["forward_times"][0]
        assert row["forward_of_product"] > 0
        assert row["backward_gain"] > 0
    # Machine, yardstick, an empty line and the heads of the columns come first.
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(rows)


@pytest.mark.parametrize("kind", [PlanError, torch.OutOfMemoryError])
def test_what_no_kernel_can_run_is_said(
    script: dict[str, Any],
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def attend(*tensors: object, pattern: object) -> None:
        raise kind("No kernel can run this pattern on these tensors.")

    monkeypatch.setitem(script, "attend", attend)
    script["main"](["--lengths", "16", *SMALL])
    printed = capsys.readouterr().out
    refused = len(script["PATTERNS"]) + len(script["VARIANTS"])
    assert printed.count(": No kernel can run this pattern on these tensors.") == refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device on this machine")
def test_a_device_that_is_not_there_is_said(script: dict[str, Any]):
    with pytest.raises(SystemExit, match=r"There is no CUDA device here, so nothing was measured\."):
        script["main"](["--device", "cuda", *SMALL])


def test_planning_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script = runpy.run_path(str(FOLDER / "planning.py"))
    report = tmp_path / "planning.json"
    script["main"](["--lengths", "512", "--json", str(report)])
    rows = json.loads(report.read_text())["rows"]
    assert [row["pattern"] for row in rows] == list(map(str, script["patterns"](512)))
    # What is kept is found again without any work, and what is forgotten is not.
    assert all(row["again"] < row["cold"] for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_ranks_are_counted_and_one_step_runs(tmp_path: Path):
    report = tmp_path / "ranks.json"
    small = ["--lengths", "512", "--ranks", "4", "--step", "256"]
    found = subprocess.run(
        [sys.executable, str(FOLDER / "ranks.py"), *small, "--json", str(report)],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    written = json.loads(report.read_text())
    assert {row["ranks"] for row in written["rows"]} == {4}
    assert [row["length"] for row in written["steps"]] == [256, 256]
    for row in written["steps"]:
        assert row["two_ranks"] > 0
        for trace in row["traces"]:
            # While its own keys are read, those of the other rank are on their way.
            assert 0 < trace["in_flight_while_computing_ms"] <= trace["in_flight_ms"]
    assert "one step on two ranks" in found.stdout


def test_intervals_overlap():
    overlap = runpy.run_path(str(FOLDER / "steps.py"))["overlap"]
    assert overlap([(0, 4), (10, 11)], [(1, 2), (3, 6), (10.5, 20)]) == 1 + 1 + 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a process is read as Linux tells it")
def test_growth_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script = runpy.run_path(str(FOLDER / "growth.py"))
    report = tmp_path / "growth.json"
    script["main"](
        ["--lengths", "256,1024", "--only", "SlidingWindow", "--repeats", "2", "--json", str(report)]
    )
    (row,) = json.loads(report.read_text())["rows"]
    short, long = row["seconds"]
    assert row["growth"] == pytest.approx(long / 1024 / (short / 256))
    assert row["workspace_bytes"] >= 0
    assert len(capsys.readouterr().out.splitlines()) == 3
