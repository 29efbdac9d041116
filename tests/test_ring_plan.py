"""The plan across ranks: which strategy is taken, what it costs, and how it reads."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from longspan import Causal, LongNet, SlidingWindow, Streaming
from longspan.layout import contiguous, striped, zigzag
from longspan.pattern import Chunk, Dilated, Everything, Pattern, Sink
from longspan.ring import STRATEGIES, plan, rotation

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "ranks.py"


@pytest.mark.parametrize(
    ("pattern", "layout", "heads", "chosen"),
    [
        (SlidingWindow(512), contiguous, (8, 8), "exchange"),
        (Streaming(512, sinks=4), zigzag, (8, 8), "exchange"),
        # A few keys that everybody reads are told to all at once.
        (Chunk(1024) | Sink(16), contiguous, (8, 8), "gather"),
        (Everything(), contiguous, (2, 2), "ring"),
        (Causal(), zigzag, (2, 1), "ring"),
        (Causal(), zigzag, (32, 32), "ulysses"),
        (Causal() & Dilated(8), striped, (8, 8), "exchange"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_cheapest_strategy_is_taken(pattern: Pattern, layout, heads: tuple[int, int], chosen: str):
    made = plan(pattern, layout(8192, 8), heads=heads[0], key_heads=heads[1])
    assert made.strategy == chosen
    assert plan(pattern, layout(8192, 8), heads=heads[0], key_heads=heads[1]) is made


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", [contiguous, zigzag, striped])
def test_what_one_sends_another_receives(layout, strategy: str):
    made = plan(Streaming(300, sinks=2), layout(2001, 5), heads=6, key_heads=3, width=8, strategy=strategy)
    assert made.sent.sum() == made.received.sum() == made.moved.sum()
    assert not made.moved.diagonal().any()
    assert not made.gradients.diagonal().any()
    tokens = made.traffic.tokens
    per_token = 3 * 16 * 4
    if strategy == "exchange":
        assert (made.moved == tokens * per_token).all()
    if strategy in ("ring", "gather"):
        assert (made.received >= tokens.sum(axis=1) * per_token).all()


def test_a_causal_ring_passes_on_what_is_needed_further_on():
    made = plan(Causal(), contiguous(32_768, 8), strategy="ring", width=1, dtype="float32")
    # 896 blocks of 128 keys and as many values, 4 bytes each.
    assert made.moved.sum() == 896 * 128 * 2 * 4


def test_what_a_branch_of_longnet_keeps_is_all_that_moves():
    """Segments of the whole text of which 256 tokens are kept: as many keys move however long the text is."""
    received = []
    for length in (1 << 14, 1 << 17, 1 << 20):
        pattern = LongNet((256, length), (1, length // 256))
        made = plan(pattern, contiguous(length, 4), heads=2, width=8)
        # The last rank needs the 192 kept tokens of the others, of each head by itself.
        received.append(made.received.tolist())
        assert [thread.heads for thread in made.threads] == [(0,), (1,)]
        assert made.blocks == 2 * (1 + 2 + 3)
    assert received == [[64 * before * 2 * 16 * 4 for before in range(4)]] * 3


def test_keys_that_come_anyway_come_once():
    """On stripes the window of LongNet needs every key, so its long branch asks for none; elsewhere it does."""
    pattern = LongNet((256, 4_096), (1, 4))
    made = plan(pattern, striped(4_096, 16), heads=4, width=8)
    assert (made.threads, made.rest) == ((), pattern)
    assert (
        made.moved.sum() == plan(Causal(), striped(4_096, 16), heads=4, width=8, strategy="ring").moved.sum()
    )
    assert plan(pattern, contiguous(4_096, 16), heads=4, width=8).threads


def test_every_rank_of_ulysses_does_the_same():
    made = plan(Causal(), contiguous(1000, 4), heads=8, strategy="ulysses")
    assert made.balance == 1.0
    assert plan(Causal(), contiguous(1000, 4), heads=8, strategy="ring").balance > 1.7


def test_the_plan_reads_well():
    assert str(plan(SlidingWindow(256), contiguous(3072, 3), heads=2, width=8)) == (
        "Plan across ranks\n"
        "  pattern   SlidingWindow(256)\n"
        "  layout    contiguous, 3,072 tokens on 3 ranks\n"
        "  heads     2 on 2 key heads\n"
        "  strategy  exchange\n"
        "  needed    4 key blocks of 128 from other ranks\n"
        "  received  by the busiest rank, 65,536 bytes under gather\n"
        "  received  by the busiest rank, 32,768 bytes under exchange\n"
        "  received  by the busiest rank, 32,768 bytes under ring\n"
        "  received  by the busiest rank, 229,376 bytes under ulysses\n"
        "  balance   1.043, the slowest rank over the mean\n"
        "  rank 0    sends 32,768, receives 0 bytes, computes 459,008 pairs\n"
        "  rank 1    sends 32,768, receives 32,768 bytes, computes 524,288 pairs\n"
        "  rank 2    sends 0, receives 32,768 bytes, computes 524,288 pairs"
    )


def test_the_benchmark_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = tmp_path / "new" / "ranks.json"
    script = runpy.run_path(str(SCRIPT))["main"].__globals__
    # What runs has a test of its own.
    script["steps"] = lambda cases: []
    script["main"](
        ["--lengths", "1024", "--ranks", "2,128", "--heads", "4", "--key-heads", "2", "--json", str(report)]
    )
    rows = json.loads(report.read_text())["rows"]
    # Every pattern in every layout, on few ranks and on many.
    assert len(rows) == 2 * (len(script["DENSE"]) + 3 * len(script["PATTERNS"]))
    assert all(row["balance"] >= 1 and row["bytes"] >= row["busiest_bytes"] >= 0 for row in rows)
    # Heads, an empty line, the heads of the columns, for each setting an empty line and a title; four lines of steps.
    assert len(capsys.readouterr().out.splitlines()) == 3 + 2 * 2 + len(rows) + 4


def test_a_share_of_a_longer_text_is_replayed(monkeypatch: pytest.MonkeyPatch, capsys):
    script = runpy.run_path(str(SCRIPT.with_name("share.py")))["main"].__globals__
    # What the script puts in the place of other ranks goes again with the test.
    monkeypatch.setattr(rotation, "Link", rotation.Link)
    monkeypatch.setattr(rotation.Turn, "rank", rotation.Turn.rank)
    monkeypatch.setitem(script, "BASE", 2_048)
    assert script["main"](["--length", "32768", "--ranks", "8", "--heads", "2", "--width", "8"]) > 0
    printed = capsys.readouterr().out
    assert (
        "contiguous, 32,768 tokens on 8 ranks, 2 heads of width 8, float32; rank 4 holds 4,096 tokens"
        in printed
    )
    assert "received 131,072 bytes" in printed
