"""Bins: the cells of a grid and the degrees of queries hold the pairs of the mask, to the last one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, relations, spans

from longspan.derive.bins import bins, degrees, edges
from longspan.derive.cost import cost
from longspan.derive.mask import counts
from longspan.pattern import S2, SCCA, SDA, Longformer, LongMixed, LongNet, Pattern, SlidingWindow

CELLS = st.tuples(st.integers(1, 12), st.integers(1, 12))


def summed(pattern: Pattern, queries: range, keys: range, cells: tuple[int, int]) -> np.ndarray:
    """Return the cells by summing the mask."""
    held = counts(pattern, queries=queries, keys=keys).numpy()
    rows, columns = edges(queries, cells[0]), edges(keys, cells[1])
    return np.array(
        [
            [held[top:bottom, left:right].sum() for left, right in pairwise(columns)]
            for top, bottom in pairwise(rows)
        ]
    )


@given(relations, lengths, CELLS)
def test_cells_of_a_text_sum_its_mask(pattern: Pattern, length: int, cells: tuple[int, int]):
    truth = summed(pattern, range(length), range(length), cells)
    assert (bins(pattern, length=length, cells=cells) == truth).all()


@given(relations, CELLS, st.data())
def test_cells_of_ranges_sum_their_mask(pattern: Pattern, cells: tuple[int, int], data: st.DataObject):
    queries, keys = data.draw(spans(129)), data.draw(spans(129))
    found = bins(pattern, queries=queries, keys=keys, cells=cells)
    assert (found == summed(pattern, queries, keys, cells)).all()


@given(relations, st.data())
def test_degrees_sum_the_rows_of_the_mask(pattern: Pattern, data: st.DataObject):
    queries, keys = data.draw(spans(129)), data.draw(spans(129))
    truth = counts(pattern, queries=queries, keys=keys).numpy().sum(axis=1)
    assert degrees(pattern, queries=queries, keys=keys).tolist() == truth.tolist()


@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(100),
        Longformer(40, dilation=3, global_tokens=5),
        LongNet((60, 180), (1, 3)),
        S2(70),
        SCCA(90),
        SDA(3),
        LongMixed(90),
    ],
    ids=str,
)
def test_cells_of_texts_of_many_blocks_sum_their_mask(pattern: Pattern):
    for head in range(4):
        alone = pattern.at_head(head, 4)
        for cells in ((7, 7), (64, 3)):
            truth = summed(alone, range(700), range(700), cells)
            assert (bins(alone, length=700, cells=cells) == truth).all()
        rows = counts(alone, length=700).numpy().sum(axis=1)
        assert (degrees(alone, length=700) == rows).all()


def test_cells_of_a_million_tokens_add_up():
    pattern = SlidingWindow(512).at_head(0, 1)
    found = bins(pattern, length=1_048_576, cells=(16, 16))
    assert found.sum() == cost(pattern, length=1_048_576).pairs
    assert (np.diag(found)[1:] == np.diag(found)[1]).all()
    assert (degrees(pattern, length=1_048_576) == np.minimum(np.arange(1_048_576) + 1, 512)).all()


def test_more_cells_than_tokens_leave_some_empty():
    assert bins(SlidingWindow(1).at_head(0, 1), length=2, cells=(4, 4)).sum() == 2
