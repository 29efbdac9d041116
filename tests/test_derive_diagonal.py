"""Diagonals: staircases hold every pair of their relation once, and far relations of residues are staircases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, relations, spans

from longspan.derive.diagonal import staircases
from longspan.derive.mask import counts
from longspan.derive.region import regions
from longspan.derive.terms import terms
from longspan.pattern import Causal, Chunk, Dilated, Every, Pattern, Window


def check(term: Pattern, queries: range, keys: range) -> bool:
    """Compare a term with its staircases pair by pair, and say whether it has any."""
    found = staircases(term, queries, keys)
    if found is None:
        return False
    truth = counts(term, queries=queries, keys=keys).numpy() > 0
    held = np.zeros(truth.shape, dtype=np.int64)
    for a, b, first in zip(found.query_class, found.key_class, found.first, strict=True):
        cell = held[a :: found.step, b :: found.step]
        rows, columns = np.indices(cell.shape)
        cell += rows - columns >= first
    assert (held == truth).all(), f"{term} over {queries} x {keys}"
    return True


steps = st.integers(1, 12)


@st.composite
def far(draw: st.DrawFn) -> Pattern:
    """Return a relation of residues without what is near."""
    step = draw(steps)
    offset = draw(st.integers(0, step - 1))
    every = Every(step, offset=offset, run=draw(st.integers(1, step - offset)))
    other = draw(
        st.sampled_from([every, every & every.T, Dilated(step, offset=offset), every & Dilated(step)])
    )
    near = draw(st.sampled_from([Window(draw(st.integers(1, 40))), Chunk(step), Chunk(2 * step)]))
    return draw(st.sampled_from([Causal() & other, Causal() & other - near, other, Causal() - near]))


@given(far(), lengths, lengths)
def test_staircases_of_a_text_hold_every_pair(term: Pattern, queries: int, keys: int):
    check(term, range(queries), range(keys))


@given(far(), st.data())
def test_staircases_of_ranges_hold_every_pair(term: Pattern, data: st.DataObject):
    check(term, data.draw(spans(129)), data.draw(spans(129)))


@given(relations, st.data())
def test_whatever_is_called_staircases_is_some(pattern: Pattern, data: st.DataObject):
    for term in terms(pattern):
        for region in regions(term, data.draw(spans(97)), data.draw(spans(97)), size=8):
            check(region.term, region.queries, region.keys)


@pytest.mark.parametrize(
    "term",
    [
        Causal(),
        Causal() & Every(4),
        Causal() & Every(4) - Window(9),
        Causal() & Every(8, offset=5, run=3) - Chunk(8),
        Causal() & Dilated(6, offset=2) - Window(7),
        Causal() & Every(5, offset=1) & Every(5, offset=1).T,
    ],
    ids=str,
)
def test_far_relations_of_residues_are_staircases(term: Pattern):
    assert check(term, range(97), range(97))


@pytest.mark.parametrize(
    "term",
    [Causal() & Window(9), Window(3), Causal() & Dilated(4) & Window(30), Causal() & Chunk(8)],
    ids=str,
)
def test_bands_and_chunks_are_none(term: Pattern):
    assert not check(term, range(97), range(97))
