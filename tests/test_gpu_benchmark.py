"""The tables of a CUDA device, each made on cpu at sizes at which its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import costs
import meter
import pytest
import table
import torch
from goals import decided
from torch import Tensor

from longspan import Causal, SlidingWindow, attend
from longspan.kernel import rates

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> table.Bench:
    return table.Bench(meter.TOY, CPU, torch.float32)


def unmeasured(sizes: meter.Sizes, device: str = "cpu") -> table.Bench:
    """Return tables of some sizes and device, on which nothing was measured."""
    made = table.Bench.__new__(table.Bench)
    made.sizes, made.device, made.dtype = sizes, torch.device(device), torch.float32
    return made


def test_attention_is_held_against_each_of_pytorchs_kernels(bench: table.Bench):
    rows = list(bench.dense())
    assert [row["what"] for row in rows] == ["longspan", "PyTorch, math", "PyTorch, math, keys repeated"]
    assert all(row["tflops"] > 0 and row["of_product"] > 0 for row in rows)


def test_a_way_that_fails_leaves_the_others(bench: table.Bench):
    own, other = bench.window()
    assert own["planning_seconds"] > 0 and other["planning_seconds"] > 0 and own["tflops"] > 0
    assert other["refused"].startswith("NotImplementedError: FlexAttention does not support backward")


def test_a_mask_that_cannot_be_made_leaves_the_others(bench: table.Bench, monkeypatch: pytest.MonkeyPatch):
    def full(*given: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(table, "create_block_mask", full)
    other, own = bench.window()
    assert other["refused"] == "OutOfMemoryError: CUDA out of memory." and own["tflops"] > 0


def test_patterns_read_as_many_keys_a_token_at_every_length(bench: table.Bench):
    """What grows with the text could not show that time does not."""
    assert [row["length"] for row in bench.lengths()] == [96] * 4 + [128] * 4
    real = unmeasured(meter.Sizes())
    keys = [
        [real.plan(pattern, length).pairs / length for pattern in real.patterns(length)]
        for length in (real.sizes.medium, real.sizes.long)
    ]
    assert keys[1] == pytest.approx(keys[0], rel=0.01)


def test_gradients_are_not_added_up(bench: table.Bench):
    """Sums over rounds are read and written once more, within the time that is measured."""
    leaves, seed = bench.tensors(16)
    assert [leaf.shape[1] for leaf in leaves] == [4, 2, 2]
    assert all(seconds > 0 for seconds in bench.turn(partial(attend, pattern=SlidingWindow(4)), leaves, seed))
    assert all(leaf.grad is None for leaf in leaves)


def test_rounds_are_taken_in_turns(bench: table.Bench):
    order: list[str] = []

    def way(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        order.append(name)
        return attend(query, key, value, Causal())

    rows = list(bench.rates({name: partial(way, name) for name in "ab"}, Causal(), 16))
    assert order == ["a", "b", "a", "b"]
    assert [row["pairs"] for row in rows] == [4 * 16 * 17 // 2] * 2


def test_plans_are_made_by_the_kernel_that_runs_and_by_lists(bench: table.Bench):
    rows = list(bench.planning())
    assert [row["asked"] for row in rows] == ["none"] * 7 + ["flex"] * 7
    assert {row["kernel"] for row in rows[7:]} == {"flex"}
    assert all(row["planning_seconds"] > 0 for row in rows)


def test_memory_is_that_beside_all_tensors(bench: table.Bench, monkeypatch: pytest.MonkeyPatch):
    (row,) = bench.memory()
    # Query, output and their gradients on four heads, key, value and their gradients on two.
    assert row["tensor_bytes"] == (4 * 4 + 4 * 2) * 192 * 16 * 4

    def full(*given: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf many bytes.")

    monkeypatch.setattr(table, "attend", full)
    (row,) = bench.memory()
    assert row["refused"] == "OutOfMemoryError: CUDA out of memory."


def test_a_stream_is_planned_before_it_is_timed(bench: table.Bench, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, tuple[Any, ...], int]] = []
    true_read = table.read

    def read(source: Any, tokens: int, *terms: Any, chunk: int, samples: Any) -> Any:
        asked.append((tokens, terms, chunk))
        return true_read(source, tokens, *terms, chunk=chunk, samples=samples)

    monkeypatch.setattr(table, "read", read)
    rows = list(bench.stream())
    assert [row["tokens"] for row in rows] == [128, 256, 512]
    assert all(row["exact"] for row in rows)
    # A text of one chunk is read whole, others over two chunks, by the same terms.
    assert [tokens for tokens, *_ in asked] == [128, 128, 128, 256, 128, 512]
    assert all(warm[1:] == timed[1:] for warm, timed in zip(asked[::2], asked[1::2], strict=True))


def test_one_query_is_timed(bench: table.Bench):
    assert all(row["forward_seconds"] > 0 and row["pytorch_seconds"] > 0 for row in bench.decoding())


def test_every_family_keeps_to_its_budget(bench: table.Bench):
    rows = list(bench.errors())
    assert len(rows) == len(table.families(meter.TOY.checked))
    assert all(row["finite"] and 0 < row["of_budget"] <= 1 for row in rows)
    # A kernel that does not run says why, in the words of the refusal that is about it.
    row = next(bench.errors("flash"))
    assert row["refused"] == "PlanError: flash  runs on cuda, got cpu"


@pytest.mark.parametrize("wrong", [0.001, torch.nan])
def test_a_wrong_result_is_seen(bench: table.Bench, wrong: float, monkeypatch: pytest.MonkeyPatch):
    true_attend = meter.attend_with_lse

    def attend_with_lse(*given: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output, lse = true_attend(*given, **options)
        return output + wrong * (torch.arange(output.shape[2]) == 5)[:, None], lse

    monkeypatch.setattr(meter, "attend_with_lse", attend_with_lse)
    row = bench.against_truth(SlidingWindow(9), None)
    assert row["of_budget"] > 1
    assert row["finite"] == (wrong == wrong)


def test_costs_stand_beside_those_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "costs.json"
    costs.main(["--toy", "--json", str(file)])
    rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
    pair = rows["a pair of attend"]["seconds"]
    for name, taken in (
        ("merge of a row, MERGE", rates.MERGE),
        ("a call of PyTorch's attention, CALL", rates.CALL),
        ("a band more of attend, CALL", rates.CALL),
        ("a call of compiled FlexAttention, COMPILED", rates.COMPILED),
    ):
        assert rows[name]["in_rates"] == taken
        assert rows[name]["times"] == pytest.approx(rows[name]["seconds"] / pair / taken)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


CLEAN = """========= COMPUTE-SANITIZER
{"facts": {}}
{"row": {"what": "Causal()", "finite": true}}
========= ERROR SUMMARY: 0 errors
"""


def test_the_sanitizer_sees_every_allocation(monkeypatch: pytest.MonkeyPatch):
    """What a cache of memory hands out lies within what the tool knows, wherever it is read."""
    asked: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.update(options, command=command)
        return subprocess.CompletedProcess(command, 0, CLEAN, "")

    monkeypatch.setattr(table.subprocess, "run", run)
    monkeypatch.setattr(table.shutil, "which", lambda name: f"/tools/{Path(name).name}")
    (row,) = unmeasured(meter.TOY, "cuda").sanitizer("triton")
    assert row == {"what": "compute-sanitizer memcheck", "kernel": "triton", "patterns": 1, "errors": 0}
    assert asked["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert asked["command"][0] == "/tools/compute-sanitizer"
    assert asked["command"][-2:] == ["errors:triton", "--toy"]


@pytest.mark.parametrize(
    ("printed", "code", "found"),
    [
        (CLEAN.replace(": 0", ": 3"), 99, {"patterns": 1, "errors": 3}),
        # Clean, since nothing ran.
        (
            CLEAN.replace('"finite": true', '"refused": "no"'),
            0,
            {"refused": "ended with 0 after 0 patterns: ERROR SUMMARY: 0 errors"},
        ),
        (
            "========= Error: Device not supported\n",
            1,
            {"refused": "ended with 1 after 0 patterns: Error: Device not supported"},
        ),
    ],
)
def test_what_the_sanitizer_says_is_read(printed: str, code: int, found: dict[str, Any]):
    assert table.sanitized(printed, code) == found


def test_a_table_is_made_by_a_process_of_its_own():
    command = [sys.executable, table.__file__, "memory", "--device", "cpu", "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts, row = map(json.loads, done.stdout.splitlines())
    assert facts["facts"]["dtype"] == "float32" and facts["facts"]["sizes"]["longest"] == 192
    report = {**facts["facts"], "memory": [row["row"]]}
    assert [goal["reached"] for goal in decided(report)["memory"]] == [None]


def test_a_table_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fails(bench: table.Bench, kernel: str) -> Any:
        yield {"what": "first"}
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(table.Bench, "errors", fails)
    monkeypatch.setattr(table.os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        table.main(["errors:flex", "--device", "cpu", "--toy"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["row"] for line in lines[1:]] == [
        {"what": "first"},
        {
            "what": "failed",
            "kernel": "flex",
            "refused": "RuntimeError: CUDA error: an illegal memory access was encountered",
        },
    ]
