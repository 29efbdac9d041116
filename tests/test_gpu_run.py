"""A run of all tables: what fails, hangs or is cut off costs no other; and what `make gpu` does with it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import table
import torch
from conftest import NO_DEVICE, marks, pytest_collection_modifyitems

ROOT = Path(gpu.__file__).parents[1]
# A stand-in for the tables, which begins at once.
PROGRAM = """
import json, os, pathlib, signal, sys, time
asked, file = sys.argv[1], pathlib.Path(FILE)
def row(**found):
    print(json.dumps({"row": {"what": asked, **found}}), flush=True)
if asked == "dense":
    print("a library speaks")
    row(number=1)
    while '"number": 1' not in (file.read_text() if file.exists() else ""):
        time.sleep(0.01)
    row(number=2)
if asked == "window":
    row(number=3)
    os.kill(os.getpid(), signal.SIGABRT)
if asked == "lengths":
    row(number=4)
    time.sleep(60)
if asked == "stream":
    row(tokens=5)
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    report, page = tmp_path / "new" / "gpu.json", tmp_path / "new" / "gpu.md"
    script = tmp_path / "table.py"
    script.write_text(PROGRAM.replace("FILE", repr(str(report))))
    monkeypatch.setattr(gpu, "SCRIPT", script)
    return report, page


def run(files: tuple[Path, Path], *more: str) -> dict[str, Any]:
    gpu.main(["--device", "cpu", "--toy", "--json", str(files[0]), "--table", str(files[1]), *more])
    return json.loads(files[0].read_text())


def test_a_row_is_written_as_soon_as_it_is_measured(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    """The stand-in goes on only once it finds its first row in the file."""
    found = run(files, "--only", "dense,stream")
    assert [row["number"] for row in found["dense"]] == [1, 2]
    assert found["stream"] == [{"what": "stream", "tokens": 5}]
    printed = capsys.readouterr()
    assert "a library speaks" in printed.err
    assert files[1].read_text().strip() in printed.out
    assert [file.name for file in sorted(files[0].parent.iterdir())] == ["gpu.json", "gpu.md"]


def test_a_table_that_dies_or_hangs_leaves_its_rows_and_the_others(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    jobs = [gpu.Job(name, 1 if name == "lengths" else 60) for name in ("window", "lengths", "stream")]
    monkeypatch.setattr(gpu, "JOBS", jobs)
    with pytest.raises(SystemExit, match=r"These tables failed: window, lengths\."):
        run(files)
    found = json.loads(files[0].read_text())
    assert found["window"] == [
        {"what": "window", "number": 3},
        {"what": "failed", "refused": "window ended with -6"},
    ]
    assert found["lengths"] == [
        {"what": "lengths", "number": 4},
        {"what": "failed", "refused": "lengths was stopped after 1 seconds"},
    ]
    assert found["stream"] == [{"what": "stream", "tokens": 5}]


def test_no_table_is_begun_when_time_is_over(files: tuple[Path, Path]):
    with pytest.raises(SystemExit, match=r"These tables failed: stream\."):
        run(files, "--only", "stream", "--seconds", "0")
    found = json.loads(files[0].read_text())
    assert found["stream"][0]["refused"] == "stream was not begun: 0.0 seconds were over"


def test_every_table_can_be_made_the_most_important_first():
    assert all(callable(getattr(table.Bench, job.table)) for job in gpu.JOBS)
    assert [job.asked for job in gpu.JOBS[:3]] == ["dense", "window", "lengths"]
    # Of errors first those of what `attend` itself runs.
    assert next(job.kernel for job in gpu.JOBS if job.table == "errors") == "chosen"


def test_a_table_that_is_not_there_is_said():
    with pytest.raises(SystemExit, match=r"There is no table windows: there are dense, window, lengths"):
        gpu.main(["--device", "cpu", "--only", "windows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device on this machine")
def test_a_device_that_is_not_there_is_said():
    with pytest.raises(SystemExit, match=r"There is no CUDA device here, so nothing was measured\."):
        gpu.main(["--toy"])


PYTHON = """#!/bin/sh
echo "$PYTHONPATH $*" >> {record}
case "$*" in *{fails}*) exit 3;; esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("fails", "steps", "said"),
    [
        ("no-step", 5, ""),
        ("benchmarks/gpu.py", 5, "These failed: gpu.py"),
        ("benchmarks/", 5, "These failed: gpu.py attention.py"),
        ("is_available", 1, "Error 3"),
    ],
)
def test_a_step_that_fails_stops_no_other(tmp_path: Path, fails: str, steps: int, said: str):
    """With a Python of the machine's own: nothing is installed, and the package is found where it lies."""
    record, python = tmp_path / "record", tmp_path / "python"
    python.write_text(PYTHON.format(record=record, fails=fails))
    python.chmod(0o755)
    asked = ["make", "gpu", "READY=", f"BIN={tmp_path}", f"FIGURES={tmp_path}"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = record.read_text().splitlines()
    assert len(lines) == steps
    assert all(line.split()[0].split(":")[0] == str(ROOT) for line in lines)
    assert done.returncode == (2 if said else 0)
    assert said in done.stderr
    if steps == 5:
        # What both measure lies side by side.
        for line, name in zip(lines[1:3], ("gpu.py", "attention.py"), strict=True):
            assert f"benchmarks/{name}" in line
            assert f"--json {tmp_path}/{'gpu' if name == 'gpu.py' else 'attention.cuda'}.json" in line
        assert all("-m cuda and brief -k" in line for line in lines[3:])


def item(file: str, *, reason: str = "", **params: Any) -> Any:
    skips = [SimpleNamespace(kwargs={"reason": reason})] if reason else []
    made = SimpleNamespace(path=Path(file), iter_markers=lambda name: skips)
    if params:
        made.callspec = SimpleNamespace(params=params)
    return made


def test_tests_of_a_device_are_marked_by_what_they_say_of_themselves():
    assert marks(item("test_a.py")) == []
    assert marks(item("test_a.py", reason="another")) == []
    assert marks(item("test_a.py", device="cpu")) == []
    assert marks(item("test_a.py", device="cuda", kernel="flex")) == ["cuda"]
    assert marks(item("test_a.py", reason=NO_DEVICE, pattern=1)) == ["cuda"]
    # What runs once is brief, and so are files whose tests are few.
    assert marks(item("test_a.py", reason=NO_DEVICE)) == ["cuda", "brief"]
    assert marks(item("test_kernel_triton.py", pattern=1)) == ["cuda", "brief"]
    assert marks(item("test_cuda.py", device="cuda", kernel=None)) == ["cuda", "brief"]


def test_markers_are_given_when_tests_are_collected():
    given: list[str] = []
    collected = item("test_a.py", reason=NO_DEVICE)
    collected.add_marker = given.append
    pytest_collection_modifyitems([collected, item("test_a.py")])
    assert given == ["cuda", "brief"]
