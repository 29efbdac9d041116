"""Blocks: their rectangles make up the mask again, and finding them costs what they number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import LENGTHS, lengths, relations, spans

from longspan.derive.blocks import FULL, PARTIAL, TRIANGLE, Blocks, blocks
from longspan.derive.mask import counts
from longspan.pattern import (
    S2,
    SCCA,
    Causal,
    Chunk,
    Dilated,
    Every,
    Everything,
    LongNet,
    Nothing,
    Pattern,
    SlidingWindow,
    Streaming,
    Window,
)

PLACES = st.sampled_from([1, 3, 8, 16])
STEPS = st.tuples(st.sampled_from([1, 2, 5]), st.sampled_from([1, 2, 5]))


def places(side: object, residue: int, block: int, span: int, size: int) -> np.ndarray:
    """Return the places (row or column numbers of the mask) that one side of a rectangle covers."""
    inside = np.arange(block * size, min((block + span) * size, int(side.lengths[residue])))
    return residue + inside * side.step


def check_reassembled(found: Blocks, pattern: Pattern, queries: range, keys: range) -> None:
    """Reassemble the mask from its rectangles: disjoint, complete, full where they say so."""
    truth = counts(pattern, queries=queries, keys=keys).numpy() > 0
    covered = np.zeros(truth.shape, dtype=np.int64)
    area = 0
    for query_class, key_class, row, column, span, kind in zip(
        found.query_class, found.key_class, found.row, found.column, found.span, found.kind, strict=True
    ):
        rows = places(found.query_side, query_class, row, span, found.size)
        columns = places(found.key_side, key_class, column, span, found.size)
        if kind == TRIANGLE:
            columns = columns[: len(rows)]
            assert len(columns) == len(rows)
        assert len(rows) and len(columns)
        cell = np.ix_(rows, columns)
        covered[cell] += 1
        q, k = np.array(queries)[rows], np.array(keys)[columns]
        asked = f"{pattern}: kind {kind} at queries {q[0]}..{q[-1]}, keys {k[0]}..{k[-1]}"
        if kind == FULL:
            assert truth[cell].all(), asked
        elif kind == TRIANGLE:
            assert (truth[cell] == (k[None] <= q[:, None])).all(), asked
        else:
            assert kind == PARTIAL and span == 1, asked
        area += (len(rows) * (len(rows) + 1)) // 2 if kind == TRIANGLE else len(rows) * len(columns)
    assert covered.max(initial=0) <= 1
    assert not truth[covered == 0].any()
    assert found.area == area


@given(relations, lengths, PLACES)
@example(Causal().T, 31, 8)
@example(~Causal() | Window(1), 31, 8)
@example(Causal() & Window(12) | Chunk(9).T, 97, 8)
def test_blocks_of_a_text_make_up_the_mask(pattern: Pattern, length: int, size: int):
    check_reassembled(blocks(pattern, length=length, size=size), pattern, range(length), range(length))


@given(relations, PLACES, STEPS, st.data())
def test_blocks_of_ranges_and_residue_classes_make_up_the_mask(
    pattern: Pattern, size: int, steps: tuple[int, int], data: st.DataObject
):
    queries, keys = data.draw(spans(97)), data.draw(spans(97))
    found = blocks(pattern, queries=queries, keys=keys, size=size, steps=steps)
    check_reassembled(found, pattern, queries, keys)


@given(relations, PLACES)
def test_ranges_may_have_steps_of_their_own(pattern: Pattern, size: int):
    queries, keys = range(3, 90, 4), range(1, 97, 3)
    check_reassembled(blocks(pattern, queries=queries, keys=keys, size=size), pattern, queries, keys)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "pattern", [SlidingWindow(20), Streaming(16), SCCA(8), S2(16), LongNet((8, 32), (1, 4))], ids=str
)
def test_blocks_of_named_patterns_make_up_the_mask(pattern: Pattern, length: int):
    for head in range(4):
        alone = pattern.at_head(head, 4)
        check_reassembled(blocks(alone, length=length, size=8), alone, range(length), range(length))


def test_nothing_has_no_blocks_and_everything_has_one():
    assert len(blocks(Nothing(), length=129, size=8)) == 0
    everything = blocks(Everything(), length=129, size=8)
    assert (len(everything), everything.kind[0], everything.visited, everything.area) == (
        1,
        FULL,
        1,
        129 * 129,
    )


def test_a_causal_text_is_one_triangle():
    whole = blocks(Causal(), length=1000, size=128)
    assert (len(whole), whole.kind[0], whole.area) == (1, TRIANGLE, 500_500)


def test_empty_sides_have_no_blocks():
    assert len(blocks(Causal(), queries=range(0), keys=range(9))) == 0
    assert len(blocks(Causal(), queries=range(9), keys=range(0))) == 0


def test_a_dilated_pattern_is_full_in_its_residue_classes():
    plain = blocks(Dilated(4), length=512, size=16)
    classes = blocks(Dilated(4), length=512, size=16, steps=(4, 4))
    assert (plain.kind == PARTIAL).all()
    assert (classes.kind == FULL).all()
    assert len(classes) == 4


# Costs are counted, not timed.

GROWING = [
    (Causal() & Window(512), 1),
    (Window(300), 1),
    (Causal() & Chunk(256), 1),
    (Streaming(512).at_head(0, 1), 1),
    (SCCA(256).at_head(3, 4), 1),
    (S2(256).at_head(3, 4), 1),
    (Causal() & Dilated(8) & Window(2048), 8),
]


@pytest.mark.parametrize(("pattern", "step"), [pytest.param(*row, id=str(row[0])) for row in GROWING])
def test_finding_blocks_costs_what_they_number(pattern: Pattern, step: int):
    """Four times the text visits four times the rectangles, where the square has sixteen times the pairs."""
    found = [
        blocks(pattern, length=length * step, steps=(step, step)) for length in (16_384, 65_536, 262_144)
    ]
    for shorter, longer in pairwise(found):
        assert longer.visited <= 4.3 * shorter.visited
        assert len(longer) <= 4.3 * len(shorter)
    assert found[-1].visited <= 20 * len(found[-1])


@pytest.mark.parametrize("window", [512, 700])
def test_blocks_of_a_window_cover_little_more_than_its_pairs(window: int):
    length = 65_536
    found = blocks(Causal() & Window(window), length=length, size=128)
    assert found.area <= length * (window + 2 * 128)


def test_residues_that_two_steps_do_not_share_are_never_visited():
    found = blocks(Every(16), length=65_536, size=128, steps=(1, 16))
    assert (found.kind == FULL).all()
    assert found.area == 65_536 * 4096
