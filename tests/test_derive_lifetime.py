"""Lifetimes: no key that is read later is called dead, and the methods of the literature keep not one too many."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns

from longspan.derive.lifetime import alive, live, most_live
from longspan.derive.mask import mask
from longspan.errors import PatternError, ShapeError
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Chunk,
    Dilated,
    Longformer,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    PerHead,
    Prefix,
    SlidingWindow,
    Streaming,
)

LENGTH = 61
EXACT = [
    Causal(),
    SlidingWindow(9),
    Streaming(7, sinks=3),
    Longformer(5, global_tokens=2),
    S2(14),
    SCCA(9),
    SCCA(7, flow=4),
    SDA(4),
    SDA(4, rows="selected"),
    LongMixed(8),
    Causal() & (Chunk(13) | Prefix(5)),
]


def read_later(pattern: Pattern, at: int, heads: int) -> list[set[int]]:
    """The keys before `at` that some query from `at` to the end of the text reads, by the mask."""
    found = mask(pattern, queries=range(at, LENGTH), keys=range(at), heads=heads).any(1)
    return [set(row.nonzero().flatten().tolist()) for row in found]


def positions(parts: tuple[range, ...]) -> list[int]:
    return [position for part in parts for position in part]


@given(patterns, st.integers(0, LENGTH))
def test_no_key_that_is_read_later_is_dead(pattern: Pattern, at: int):
    for kept, needed in zip(
        live(pattern, at=at, until=LENGTH, heads=4), read_later(pattern, at, 4), strict=True
    ):
        assert needed <= set(positions(kept))
        assert positions(kept) == sorted(set(positions(kept)))
        assert all(position < at for position in positions(kept))


@given(patterns, st.integers(0, LENGTH))
def test_a_text_that_goes_on_keeps_no_less(pattern: Pattern, at: int):
    bounded, endless = live(pattern, at=at, until=LENGTH, heads=4), live(pattern, at=at, heads=4)
    for some, all_ in zip(bounded, endless, strict=True):
        assert set(positions(some)) <= set(positions(all_))


@pytest.mark.parametrize("pattern", EXACT, ids=str)
def test_methods_keep_exactly_what_is_read_later(pattern: Pattern):
    # So far from the end that every key which is ever read again is read before it.
    for at in range(LENGTH - 16):
        for kept, needed in zip(
            live(pattern, at=at, until=LENGTH, heads=4), read_later(pattern, at, 4), strict=True
        ):
            assert set(positions(kept)) == needed


def test_a_mixture_keeps_at_most_its_dilation_too_many():
    pattern = LongNet((8, 24), (1, 3))
    for at in range(LENGTH - 16):
        for kept, needed in zip(
            live(pattern, at=at, until=LENGTH, heads=4), read_later(pattern, at, 4), strict=True
        ):
            assert len(set(positions(kept)) - needed) <= 24 // 3


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (Causal(), (range(100),)),
        (SlidingWindow(8), (range(93, 100),)),
        (SlidingWindow(1), ()),
        (Streaming(8, sinks=1), (range(1), range(93, 100))),
        (Streaming(99, sinks=4), (range(100),)),
        (Causal() & Dilated(3), (range(100),)),
        (Causal() & Chunk(30), (range(90, 100),)),
        (Causal() & Chunk(50), ()),
        (Nothing(), ()),
    ],
    ids=str,
)
def test_what_is_kept_is_written_as_progressions(pattern: Pattern, kept: tuple[range, ...]):
    assert live(pattern, at=100) == kept


def test_heads_keep_their_own():
    found = live(PerHead([SDA(2, rows="selected"), SlidingWindow(3)]), at=9, heads=4)
    assert found == ((range(0, 9, 2),), (range(1, 8, 2),), (range(7, 9),), (range(7, 9),))


def test_positions_may_differ_from_row_to_row():
    keys = np.array([[4, 5, 6], [4, 5, 6]])
    found = alive(Causal() & SlidingWindow(3).at_head(0, 1), keys, at=np.array([[7], [8]]))
    assert found.tolist() == [[False, True, True], [False, False, True]]


@pytest.mark.parametrize("pattern", EXACT, ids=str)
def test_the_most_that_is_ever_live_is_live_at_some_time(pattern: Pattern):
    for head in range(4):
        single = pattern.at_head(head, 4)
        held = [len(positions(live(single, at=at, until=LENGTH))) for at in range(LENGTH)]
        assert most_live(single, length=LENGTH) == max(held)


@given(patterns)
def test_what_is_live_is_never_more_than_the_most(pattern: Pattern):
    single = pattern.at_head(0, 4)
    most = most_live(single, length=LENGTH)
    assert all(len(positions(live(single, at=at, until=LENGTH))) <= most for at in range(0, LENGTH, 7))


def test_a_long_text_costs_what_is_kept():
    begin = time.process_time()
    assert live(Streaming(512), at=100_000_000) == (range(4), range(99_999_489, 100_000_000))
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("at", [-1, 2.5, True])
def test_a_position_is_a_number(at: object):
    with pytest.raises(ShapeError) as caught:
        live(Causal(), at=at)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "A position is an integer of at least 0.\n"
        f"  asked  at={at!r}\n"
        "  try    at=1024, the number of tokens read so far"
    )


def test_heads_that_differ_need_their_number():
    with pytest.raises(PatternError):
        live(SDA(), at=5)
