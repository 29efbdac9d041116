"""Layouts: every position on exactly one rank, at lengths that the ranks do not divide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LENGTHS

from longspan.derive.traffic import load
from longspan.errors import ShapeError
from longspan.layout import contiguous, striped, zigzag
from longspan.pattern import Causal

LAYOUTS = [contiguous, zigzag, striped]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [0, *LENGTHS])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_position_lies_on_one_rank(layout, length: int, ranks: int):
    made = layout(length, ranks)
    positions = [made.positions(rank) for rank in range(made.ranks)]
    together = np.concatenate(positions)
    assert sorted(together.tolist()) == list(range(length))
    assert [len(shard) for shard in positions] == [made.places(rank) for rank in range(ranks)]
    assert together[made.order()].tolist() == list(range(length))
    held = [len(shard) for shard in positions]
    assert max(held) - min(held) <= (2 if layout is zigzag else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_places_know_their_positions(layout):
    made = layout(31, 3)
    for rank in range(3):
        whole = made.positions(rank)
        for taken in made.pieces(rank):
            assert list(made.span(rank, taken)) == whole[taken.start : taken.stop].tolist()
            assert list(made.span(rank, taken[1:2])) == whole[taken.start + 1 : taken.start + 2].tolist()


def test_zigzag_holds_one_chunk_from_either_end():
    assert zigzag(16, 2).shards == ((range(0, 4), range(12, 16)), (range(4, 8), range(8, 12)))


def test_causal_work_is_even_on_zigzag_and_striped_but_not_on_contiguous():
    balance = {}
    for layout in LAYOUTS:
        pairs = load(Causal(), layout(4096, 8))
        balance[layout] = pairs.max() / pairs.mean()
    assert balance[zigzag] == 1.0
    assert balance[striped] < 1.002
    assert balance[contiguous] > 1.8


def test_places_across_pieces_are_refused():
    with pytest.raises(ShapeError) as refused:
        zigzag(16, 2).span(0, range(2, 6))
    assert str(refused.value) == (
        "These places do not lie in one piece of the shard.\n"
        "  asked   places 2 to 6 of rank 0\n"
        "  pieces  (range(0, 4), range(12, 16))\n"
        "  try     places inside one of layout.pieces(rank)"
    )


@pytest.mark.parametrize("given", [(-1, 2), (5, 0)])
def test_impossible_layouts_are_refused(given: tuple[int, int]):
    with pytest.raises(ShapeError) as refused:
        striped(*given)
    assert str(refused.value) == (
        "A layout lays 0 or more tokens on 1 or more ranks.\n"
        f"  asked  length={given[0]}, ranks={given[1]}\n"
        "  try    zigzag(32768, ranks=8)"
    )


@given(st.sampled_from([contiguous, zigzag, striped]), st.integers(0, 60), st.integers(1, 5), st.data())
def test_some_tokens_lie_where_the_text_does(layout, length: int, ranks: int, data: st.DataObject):
    made = layout(length, ranks)
    first, last = sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    some = range(first, last, data.draw(st.integers(1, 7)))
    listed = np.array(
        sorted(data.draw(st.sets(st.integers(0, max(0, length - 1)))) if length else []), dtype=int
    )
    for tokens in (some, listed):
        for rank in range(ranks):
            held = made.positions(rank)
            places = np.flatnonzero(np.isin(held, tokens))
            expected = np.searchsorted(np.asarray(tokens), held[places])
            assert made.within(tokens).positions(rank).tolist() == expected.tolist()
            if tokens is some:
                found = [place for piece in made.places_of(rank, tokens) for place in piece]
                assert found == places.tolist()
