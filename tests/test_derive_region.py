"""Regions: with their repetitions they hold every pair of a term once, and in words that mean the same there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, relations, spans

from longspan.derive.mask import counts
from longspan.derive.region import regions
from longspan.derive.terms import terms
from longspan.pattern import (
    S2,
    SCCA,
    Causal,
    Chunk,
    Dilated,
    LongNet,
    Pattern,
    Prefix,
    Random,
    Sink,
    SlidingWindow,
    Window,
)

SIZES = st.sampled_from([1, 4, 16])


def check_regions(pattern: Pattern, queries: range, keys: range, size: int) -> None:
    truth = counts(pattern, queries=queries, keys=keys).numpy()
    found, covered = np.zeros_like(truth), np.zeros_like(truth)
    for term in terms(pattern):
        covered[:] = 0
        for region in regions(term, queries, keys, size=size):
            held = counts(region.term, queries=region.queries, keys=region.keys).numpy() > 0
            for again in range(region.times):
                row, column = region.query + again * region.advance[0], region.key + again * region.advance[1]
                cell = np.s_[row : row + len(region.queries), column : column + len(region.keys)]
                assert found[cell].shape == held.shape
                found[cell] += held
                covered[cell] += 1
        assert covered.max(initial=0) <= 1
    assert (found == truth).all(), f"{pattern} over {queries} x {keys}"


@given(relations, lengths, SIZES)
def test_regions_of_a_text_hold_every_pair(pattern: Pattern, length: int, size: int):
    check_regions(pattern, range(length), range(length), size)


@given(relations, SIZES, st.data())
def test_regions_of_ranges_hold_every_pair(pattern: Pattern, size: int, data: st.DataObject):
    check_regions(pattern, data.draw(spans(129)), data.draw(spans(129)), size)


@given(SIZES)
def test_tables_come_back_where_they_were(size: int):
    first, second = Random(2, size=4, stream=1), Random(1, size=4, stream=2)
    for pattern in (first & ~second | Sink(5), (second | Sink(5)) & ~(first & Window(50)).T):
        check_regions(Causal() & pattern, range(97), range(97), size)


@given(relations, SIZES)
def test_ranges_may_have_steps(pattern: Pattern, size: int):
    check_regions(pattern, range(3, 127, 4), range(1, 128, 3), size)


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (SlidingWindow(512), 2),
        (Causal() & Chunk(1000, offset=300), 3),
        (S2(1024).at_head(1, 2), 3),
        (SCCA(1024).at_head(1, 2), 2),
        (LongNet().at_head(5, 8), 9),
        (Causal() & Dilated(8, offset=3) & Window(4096), 5),
        (Causal() & (Window(100) | Sink(4)), 3),
        (Causal() | Prefix(1000), 4),
    ],
    ids=str,
)
def test_a_million_tokens_are_few_regions(pattern: Pattern, most: int):
    text = range(1_048_576)
    found = [region for term in terms(pattern) for region in regions(term, text, text, size=128)]
    assert len(found) <= most


def test_chunks_begin_where_the_pattern_says():
    (first, body) = regions(Causal() & Chunk(1000, offset=300), range(10_300), range(10_300), size=128)
    assert (first.queries, first.keys) == (range(300), range(300))
    assert (body.queries, body.keys, body.times) == (range(300, 1300), range(300, 1300), 10)


def test_residues_count_from_the_chunk_they_are_in():
    """A step that does not divide the segment has its own residues in each."""
    (body, end) = regions(LongNet((100,), (3,)).at_head(0, 1), range(250), range(250), size=16)
    assert (body.times, body.term.steps, end.term.steps) == (2, (3, 3), (3, 3))
