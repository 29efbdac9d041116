"""Reach: what a token sees after some layers is what the masks of those layers multiply to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LENGTHS, lengths, patterns, relations

from longspan.derive.mask import mask
from longspan.derive.reach import Reach, reach
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
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Window,
)

METHODS = [
    SlidingWindow(5),
    SlidingWindow(4, causal=False),
    Longformer(3, dilation=2),
    LongNet((8, 32), (1, 4)),
    S2(6),
    SCCA(4),
    SCCA(3, flow=4),
    SDA(3),
    LongMixed(4),
    Streaming(4, sinks=1),
    Causal() & Chunk(7),
    Causal() & Dilated(3) & Window(10),
    PerHead([SlidingWindow(3), Causal() & Dilated(4)]),
]


def seen_by_masks(stack: list[Pattern], length: int, query: int) -> list[np.ndarray]:
    """Return which tokens are seen after each layer: rows of a product of masks, with every token seeing itself."""
    state, rows = np.eye(length, dtype=bool), []
    for pattern in stack:
        read = mask(pattern, length=length, heads=4).any(dim=0).numpy() | np.eye(length, dtype=bool)
        state = (read.astype(np.float64) @ state) > 0
        rows.append(state[query])
    return rows


def check(found: Reach, rows: list[np.ndarray]) -> None:
    assert list(found.seen) == [row.sum() for row in rows]
    assert list(found.farthest) == [row.argmax() for row in rows]


@given(patterns, lengths, st.data())
def test_a_token_sees_what_the_product_of_masks_holds(pattern: Pattern, length: int, data: st.DataObject):
    query = data.draw(st.integers(0, length - 1))
    found = reach(pattern, layers=4, length=length, heads=4, query=query)
    check(found, seen_by_masks([pattern] * 4, length, query))


@given(st.lists(relations, min_size=1, max_size=4), lengths)
def test_layers_may_differ(stack: list[Pattern], length: int):
    check(reach(stack, length=length, heads=4), seen_by_masks(stack, length, length - 1))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pattern", METHODS, ids=str)
def test_the_first_token_is_seen_when_the_masks_say(pattern: Pattern, length: int):
    """Found by going on from the second layer, with cycles skipped, and by 200 products."""
    found = reach(pattern, layers=2, length=length, heads=4)
    rows = seen_by_masks([pattern] * 200, length, length - 1)
    truth = next((layer for layer, row in enumerate(rows, 1) if row[0]), None)
    assert found.first == truth
    assert found.settled <= (rows[1] == rows[-1]).all() or truth is None


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        (SlidingWindow(512), 2_053),
        (SlidingWindow(4096), 257),
        (S2(8192), 255),
        (SCCA(1024), 1_023),
        (LongMixed(1024), 1),
        (Streaming(508), 1),
        (Causal() & (Window(128) | Dilated(128)), 2),
        (LongNet((2048, 8192), (1, 4)), None),
    ],
    ids=str,
)
def test_a_million_tokens_are_seen_through(pattern: Pattern, first: int | None):
    found = reach(pattern, layers=4, length=1_048_576, heads=8)
    assert found.first == first
    assert found.settled or first is not None


def test_texts_of_many_blocks_equal_the_masks():
    for pattern in (
        Causal() & (Dilated(7) | Dilated(64)) & Window(500),
        LongNet((150, 300), (1, 7)),
        S2(300),
    ):
        check(reach(pattern, layers=3, length=700, heads=4), seen_by_masks([pattern] * 3, 700, 699))


def test_a_reach_is_printed_whole():
    assert (
        str(reach(Streaming(60), layers=12, length=4096))
        == """\
Reach of token 4,095 of 4,096
  layers  tokens seen  of all  farthest back
       1           64   1.56%          4,095
       2          123   3.00%          4,095
       4          241   5.88%          4,095
       8          477  11.65%          4,095
      12          713  17.41%          4,095
  the first token is seen after 1 layer"""
    )
    assert str(reach(Causal() & Chunk(100), layers=3, length=250)).splitlines()[1:] == [
        "  layers  tokens seen  of all  farthest back",
        "       1           50  20.00%             49",
        "  the first token is never seen, however many layers",
    ]
    mixed = reach([SlidingWindow(9), SlidingWindow(5)], length=250)
    assert str(mixed).splitlines()[-1] == "  the first token is not seen within 2 layers"
    assert (mixed.layers, mixed.share) == (2, 13 / 250)


@pytest.mark.parametrize(
    "asked",
    [
        {"layers": 0, "length": 9},
        {"length": 0},
        {"length": 9, "query": 9},
        {"length": 9, "query": -1},
    ],
    ids=str,
)
def test_a_reach_of_nothing_is_refused(asked: dict[str, int]):
    with pytest.raises(ShapeError):
        reach(Causal(), **asked)


def test_a_list_has_a_pattern_for_each_layer():
    with pytest.raises(ShapeError) as raised:
        reach([Causal(), SlidingWindow(4)], layers=3, length=9)
    assert (
        str(raised.value)
        == """\
A reach is that of a token of the text, over at least one layer, each with its pattern.
  asked     layers=3, length=9, query=8
  patterns  2
  try       layers=32, length=4096"""
    )


def test_heads_must_fit_the_pattern():
    with pytest.raises(PatternError):
        reach(S2(8), layers=2, length=31)
