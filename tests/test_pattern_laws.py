"""The laws of patterns: what operators do to counts, what the range reading promises, what is printed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import atoms, patterns, per_head, positions, relations

from longspan.pattern import Causal, Chunk, Dilated, Every, Pattern, PerHead, Prefix, Sink, Window
from longspan.pattern.expression import parse
from longspan.pattern.progression import Progression

HEADS = 4


def counts(pattern: Pattern, queries: range = range(45), keys: range = range(45)) -> np.ndarray:
    q, k = torch.tensor(queries), torch.tensor(keys)
    return pattern.count(q[:, None], k[None]).expand(len(q), len(k)).numpy()


def contained(pattern: Pattern, queries: range = range(45), keys: range = range(45)) -> np.ndarray:
    q, k = torch.tensor(queries), torch.tensor(keys)
    return pattern.contains(q[:, None], k[None]).expand(len(q), len(k)).numpy()


# Operators.


@given(relations, relations)
def test_intersection_multiplies_counts(left: Pattern, right: Pattern):
    assert (counts(left & right) == counts(left) * counts(right)).all()


@given(relations, relations)
def test_sum_adds_counts(left: Pattern, right: Pattern):
    assert (counts(left + right) == counts(left) + counts(right)).all()


@given(relations, relations)
def test_union_counts_once(left: Pattern, right: Pattern):
    assert (counts(left | right) == ((counts(left) > 0) | (counts(right) > 0))).all()


@given(relations)
def test_complement_counts_what_is_not_in_it_once(pattern: Pattern):
    assert (counts(~pattern) == (counts(pattern) == 0)).all()


@given(relations, relations)
def test_difference_keeps_counts_outside_the_other(left: Pattern, right: Pattern):
    assert (counts(left - right) == counts(left) * (counts(right) == 0)).all()


@given(relations)
def test_transposition_exchanges_query_and_key(pattern: Pattern):
    assert (counts(pattern.T) == counts(pattern).T).all()
    assert (counts(pattern.T, range(9), range(20, 40)) == counts(pattern, range(20, 40), range(9)).T).all()


@given(relations)
def test_what_is_contained_is_what_is_counted(pattern: Pattern):
    truth = contained(pattern)
    assert truth.dtype == np.bool_
    assert (truth == (counts(pattern) > 0)).all()


@given(relations, relations)
def test_de_morgan(left: Pattern, right: Pattern):
    assert (counts(~(left | right)) == counts(~left & ~right)).all()
    assert (counts(~(left & right)) == counts(~left | ~right)).all()


@given(relations)
def test_two_complements_leave_the_pairs(pattern: Pattern):
    assert (contained(~~pattern) == contained(pattern)).all()


@given(relations, relations, relations)
def test_grouping_does_not_matter(first: Pattern, second: Pattern, third: Pattern):
    assert first & second & third == first & (second & third)
    assert first | second | third == first | (second | third)
    assert first + second + third == first + (second + third)


@given(relations, st.integers(0, 9))
def test_a_shift_by_the_period_changes_no_pair(pattern: Pattern, periods: int):
    shift = 0 if pattern.period is None else pattern.period * periods
    moved = range(shift, shift + 45)
    assert (counts(pattern, moved, moved) == counts(pattern)).all()


# Heads.


@given(per_head, st.sampled_from([4, 8]))
def test_heads_are_dealt_to_parts_in_groups_of_neighbours(pattern: PerHead, heads: int):
    group = heads // len(pattern.parts)
    for head in range(heads):
        truth = pattern.parts[head // group].at_head(head % group, group)
        assert (counts(pattern.at_head(head, heads)) == counts(truth)).all()


@given(patterns)
def test_a_head_of_a_transposed_pattern_is_the_transposed_head(pattern: Pattern):
    for head in range(HEADS):
        assert (counts(pattern.T.at_head(head, HEADS)) == counts(pattern.at_head(head, HEADS)).T).all()


@given(relations)
def test_a_relation_is_the_same_in_every_head(pattern: Pattern):
    assert (counts(pattern.at_head(3, HEADS)) == counts(pattern)).all()


# The range reading.


def check_bracket(pattern: Pattern, queries: range, keys: range) -> None:
    bracket = pattern.count(Progression.of(queries), Progression.of(keys))
    truth = counts(pattern, queries, keys)
    low, high = int(np.asarray(bracket.low)), int(np.asarray(bracket.high))
    asked = f"{pattern} over {queries} x {keys}: {low}..{high}, truly {truth.min()}..{truth.max()}"
    assert low <= truth.min() and truth.max() <= high, asked
    assert not bracket.empty or not truth.any(), asked
    assert not bracket.full or truth.all(), asked


@given(relations, positions(), positions())
@example(Chunk(5, offset=3, shift=2), range(0, 1), range(0, 14, 13))
@example(~(Window(3) + Causal()), range(7, 8), range(0, 60, 3))
@example(Every(3, within=7), range(0, 1), range(2, 40, 7))
def test_the_range_reading_brackets_the_exact_counts(pattern: Pattern, queries: range, keys: range):
    check_bracket(pattern, queries, keys)


@given(atoms, positions(), positions())
def test_the_range_reading_of_an_atom_brackets_its_counts(pattern: Pattern, queries: range, keys: range):
    check_bracket(pattern, queries, keys)


@given(relations, st.integers(0, 99), st.integers(0, 99))
def test_the_range_reading_of_one_pair_is_exact(pattern: Pattern, q: int, k: int):
    bracket = pattern.count(Progression.of(range(q, q + 1)), Progression.of(range(k, k + 1)))
    assert bracket.low == bracket.high == counts(pattern, range(q, q + 1), range(k, k + 1)).item()


@given(
    relations, st.lists(positions(), min_size=2, max_size=6), st.lists(positions(), min_size=2, max_size=6)
)
def test_many_rectangles_are_read_like_each_of_them(
    pattern: Pattern, queries: list[range], keys: list[range]
):
    bracket = pattern.count(stacked(queries, axis=1), stacked(keys, axis=0))
    shape = (len(queries), len(keys))
    low, high = np.broadcast_to(bracket.low, shape), np.broadcast_to(bracket.high, shape)
    for row, q in enumerate(queries):
        for column, k in enumerate(keys):
            alone = pattern.count(Progression.of(q), Progression.of(k))
            assert (low[row, column], high[row, column]) == (alone.low, alone.high)


def stacked(ranges: list[range], *, axis: int) -> Progression:
    sides = [Progression.of(positions) for positions in ranges]
    return Progression(
        *(
            np.expand_dims(np.array([getattr(side, name) for side in sides], dtype=np.int64), axis)
            for name in ("low", "high", "step")
        )
    )


@st.composite
def _blocks(draw: st.DrawFn) -> range:
    start = draw(st.integers(0, 120))
    return range(start, start + draw(st.integers(1, 20)))


@given(
    st.one_of(
        st.just(Causal()),
        st.builds(Window, st.integers(1, 40)),
        st.builds(Sink, st.integers(1, 40)),
        st.builds(Prefix, st.integers(1, 40)),
        st.builds(Chunk, st.integers(1, 40)),
    ),
    _blocks(),
    _blocks(),
)
def test_blocks_of_neighbours_are_decided_wherever_they_can_be(pattern: Pattern, queries: range, keys: range):
    """A reading that always answers "partial" is sound too; for these patterns no better than ours exists."""
    bracket = pattern.count(Progression.of(queries), Progression.of(keys))
    truth = counts(pattern, queries, keys)
    assert bracket.low == truth.min()
    assert bracket.high == truth.max()


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 60))
def test_residue_classes_are_decided_in_their_own_step(step: int, first_q: int, first_k: int):
    queries, keys = range(first_q, first_q + 20 * step, step), range(first_k, first_k + 20 * step, step)
    for pattern in (Dilated(step), Every(step), Every(step).T, Dilated(step) & Every(step)):
        bracket = pattern.count(Progression.of(queries), Progression.of(keys))
        truth = counts(pattern, queries, keys)
        assert bracket.low == truth.min() == truth.max() == bracket.high


# Values.


@given(patterns)
def test_a_printed_pattern_is_parsed_to_the_same_pattern(pattern: Pattern):
    assert parse(str(pattern)) == pattern


@given(patterns)
def test_equal_expressions_are_equal_values(pattern: Pattern):
    twin = pickle.loads(pickle.dumps(pattern))
    assert twin is not pattern
    assert twin == pattern == copy.deepcopy(pattern)
    assert hash(twin) == hash(pattern)
    assert {pattern: "found"}[twin] == "found"


@given(relations)
def test_an_operator_makes_another_value(pattern: Pattern):
    assert ~pattern != pattern
    assert pattern != pattern.T


def test_fields_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign to field 'size'"):
        Window(4).size = 5
