"""The papers in small, at a size at which the figures mean nothing: every part runs, once, and says what came out."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_tokenizer, llama

from longspan.extend import stretch
from longspan.extend.search import Budget

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--length", "512", "--steps", "2", "--segments", "1", "--shortest", "128", "--seeds", "1"]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command, on a tiny model and a small text, with the file of its figures."""
    llama(positions=64).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "novel.txt").write_text("It was the best of times, it was the worst of times.\n" * 200)
    monkeypatch.syspath_prepend(str(FOLDER))
    names = runpy.run_path(str(FOLDER / "papers.py"))["main"].__globals__
    for name, size in {"width": 16, "heads": 4, "length": 256}.items():
        monkeypatch.setitem(names["SCRATCH"], name, size)
    for name in ("SCCA fixed", "SDA", "LongMixed", "LongNet"):
        monkeypatch.delitem(names["cells"].__globals__["PATTERNS"], name)
    monkeypatch.setattr(
        stretch, "BUDGET", Budget(population=3, parents=2, mutations=0, crossovers=0, rounds=0)
    )
    given = ["--model", tmp_path / "tiny", "--text", tmp_path / "novel.txt"]
    given += ["--json", tmp_path / "new" / "papers.json", "--page", tmp_path / "papers.md", *SMALL]

    def run(*arguments: str) -> dict[str, Any]:
        names["main"]([*map(str, given), *arguments])
        return json.loads((tmp_path / "new" / "papers.json").read_text())

    run.names, run.folder = names, tmp_path
    return run


def test_every_part_runs_and_shared_cells_run_once(script: Any, capsys: pytest.CaptureFixture[str]):
    report = script()
    parts = {name: len(ways) for name, ways in report["parts"].items()}
    assert parts == {
        "patterns": 8,
        "positions": 12,
        "windows": 4,
        "adapters": 4,
        "skipping": 2,
        "leak": 2,
    }
    # Dense training by YaRN is a way of four parts.
    assert len(report["cells"]) == sum(parts.values()) - 3
    printed, page = capsys.readouterr().out, (script.folder / "papers.md").read_text()
    assert printed.startswith("29 cells to run, about ")
    for title in ("Patterns of sparse training", "Positions", "Windows by layer", "Groups that wrap around"):
        assert f"## {title}" in printed and f"## {title}" in page
    assert page.count(" better than ") == 4 + 4 + 3 + 2 + 1 + 1
    leaks = {way["name"]: report["cells"][way["cells"][0]]["leaks"] for way in report["parts"]["leak"]}
    assert leaks["S2"] == 0 and leaks["wrapped"] > 0
    again = script("--part", "positions")
    assert "cells to run" not in capsys.readouterr().out and again == report


def test_a_run_that_was_killed_goes_on(script: Any, monkeypatch: pytest.MonkeyPatch):
    carried_out, done = script.names["_carried_out"], []

    def killed(cell: Any, *rest: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(cell)
        return carried_out(cell, *rest)

    with monkeypatch.context() as patch:
        patch.setitem(script.names, "_carried_out", killed)
        with pytest.raises(KeyboardInterrupt):
            script("--part", "leak")
    held = json.loads((script.folder / "new" / "papers.json").read_text())
    assert len(held["cells"]) == 1
    after = script("--part", "leak")
    assert len(after["cells"]) == 2 and after["cells"].items() >= held["cells"].items()
    with pytest.raises(SystemExit, match="holds figures of another model, length or number of steps"):
        script("--steps", "3")


def test_claims_are_judged_by_all_seeds(script: Any):
    page = script.names["table"].__globals__

    def said(fixed: list[float], flow: list[float]) -> str:
        cells = {
            f"{way}{n}": {"dense": {"64": value}}
            for way, values in (("S2", fixed), ("SCCA flow", flow))
            for n, value in enumerate(values)
        }
        ways = [
            {"name": f"{way}, 8x", "cells": [f"{way}{n}" for n in range(2)]} for way in ("S2", "SCCA flow")
        ]
        lines = page["table"]({"parts": {"patterns": ways}, "cells": cells}, "patterns").splitlines()
        return next(line for line in lines if line.startswith("- S2, 8x better than SCCA flow, 8x"))

    source = "(9.41 and 9.47 on PG19 at 8,192 tokens, arXiv 2312.07305)"
    assert said([2.25, 2.5], [2.5, 2.75]) == (
        f"- S2, 8x better than SCCA flow, 8x {source}: **reproduced** by dense 64: 2.375 ± 0.177 and 2.625 ± 0.177, "
        "2 seeds."
    )
    assert "**the other way round**" in said([2.5, 2.75], [2.25, 2.5])
    assert "not told apart" in said([2.5, 2.25], [2.25, 2.5])
