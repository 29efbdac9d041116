"""Traffic: no key that is read stays at home, and for what everybody uses, none moves that is not read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, per_head

from longspan.derive.cost import cost
from longspan.derive.mask import counts
from longspan.derive.traffic import Traffic, load, traffic
from longspan.errors import ShapeError
from longspan.layout import Layout, contiguous, striped, zigzag
from longspan.pattern import BigBird, Causal, Chunk, Dilated, LongNet, Pattern, SlidingWindow, Streaming

HEADS = 4
layouts = st.builds(
    lambda layout, length, ranks: layout(length, ranks),
    st.sampled_from([contiguous, zigzag, striped]),
    lengths,
    st.integers(1, 5),
)


def brute(pattern: Pattern, layout: Layout, size: int, heads: int = HEADS) -> np.ndarray:
    """Count the blocks that move from the dense mask, `[destination, source]`."""
    read = counts(pattern, length=layout.length, heads=heads).sum(dim=0).numpy() > 0
    moved = np.zeros((layout.ranks, layout.ranks), dtype=int)
    for destination in range(layout.ranks):
        seen = read[layout.positions(destination)].any(axis=0)
        for source in set(range(layout.ranks)) - {destination}:
            moved[destination, source] = sum(
                seen[list(piece[first : first + size])].any()
                for piece in layout.shards[source]
                for first in range(0, len(piece), size)
            )
    return moved


def blocks_of(found: Traffic) -> np.ndarray:
    moved = np.zeros((found.layout.ranks, found.layout.ranks), dtype=int)
    np.add.at(moved, (found.destination, found.source), -(-(found.stop - found.start) // found.size))
    return moved


@given(per_head, layouts, st.sampled_from([1, 4, 9]))
def test_what_is_read_is_sent(pattern: Pattern, layout: Layout, size: int):
    found = traffic(pattern, layout, heads=HEADS, size=size)
    read = counts(pattern, length=layout.length, heads=HEADS).sum(dim=0).numpy() > 0
    for destination in range(layout.ranks):
        assert found.runs(destination, destination) == ()
        for source in set(range(layout.ranks)) - {destination}:
            runs = found.runs(destination, source)
            sent = [place for run in runs for place in run]
            assert sent == sorted(set(sent))
            kept = np.delete(layout.positions(source), sent)
            assert not read[np.ix_(layout.positions(destination), kept)].any()
            assert sum(map(len, runs)) == found.tokens[destination, source]
            for run in runs:
                layout.span(source, run)
    per_rank = counts(pattern, length=layout.length, heads=HEADS).sum(dim=(0, 2)).numpy()
    expected = [per_rank[layout.positions(rank)].sum() for rank in range(layout.ranks)]
    assert load(pattern, layout, heads=HEADS).tolist() == expected


@pytest.mark.parametrize("layout", [contiguous, zigzag, striped])
@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(20), Streaming(9, sinks=2), ~Chunk(11)], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_everybody_uses_is_sent_exactly(layout, pattern: Pattern, ranks: int):
    made = layout(129, ranks)
    assert blocks_of(traffic(pattern, made, size=8)).tolist() == brute(pattern, made, 8, heads=1).tolist()


def test_a_window_with_sinks_moves_230_blocks_where_a_causal_ring_moves_896():
    """Each of ranks 1 to 7 reads the 32 blocks before its own, and ranks 2 to 7 the block of the sinks: 224 + 6."""
    layout = contiguous(32_768, 8)
    assert traffic(Streaming(4_096, sinks=4), layout).blocks == 230
    # Rank r of a causal ring reads the 32 r blocks before its own.
    assert traffic(Causal(), layout).blocks == 896


def test_a_dilated_pattern_stays_at_home_on_stripes():
    assert traffic(Causal() & Dilated(8), striped(1_000, 4)).blocks == 0


def test_a_million_tokens_on_many_ranks_are_counted():
    found = traffic(SlidingWindow(4_096), contiguous(1 << 20, 256))
    # 4,096 tokens a rank: each but the first reads the 32 blocks before its own.
    assert found.blocks == 32 * 255


@pytest.mark.parametrize(
    "pattern",
    [Streaming(300, sinks=4), Causal() & Dilated(16), LongNet((256, 1_024), (1, 4)), BigBird(64)],
    ids=str,
)
def test_the_work_of_many_stripes_is_counted_some_queries_at_a_time(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("longspan.derive.traffic._QUERIES", 600)
    layout = striped(2_000, 1_024)
    per_query = counts(pattern, length=layout.length, heads=HEADS).sum(dim=(0, 2)).numpy()
    expected = [per_query[layout.positions(rank)].sum() for rank in range(layout.ranks)]
    assert load(pattern, layout, heads=HEADS).tolist() == expected


def test_longnet_on_a_thousand_stripes_of_a_million_tokens_is_counted():
    pattern, layout = LongNet((2_048, 8_192, 32_768), (1, 4, 16)), striped(1 << 20, 1_024)
    pairs = load(pattern, layout, heads=16)
    assert pairs.sum() == cost(pattern, length=layout.length, heads=16).pairs
    # A later residue reads more of each segment.
    assert (np.diff(pairs) > 0).all()


def test_a_block_holds_something():
    with pytest.raises(ShapeError) as refused:
        traffic(Causal(), contiguous(8, 2), size=0)
    assert str(refused.value) == "A block holds at least one place.\n  asked  size=0\n  try    size=128"
