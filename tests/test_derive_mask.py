"""The mask and its counts: shapes, ranges, heads, and the terms that a pattern is cut into."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, patterns, relations, spans

from longspan.derive.mask import counts, mask
from longspan.derive.terms import terms
from longspan.pattern import Causal, LongNet, Pattern, PerHead, Sink, Window


@given(patterns, lengths)
def test_a_mask_holds_the_pairs_that_are_counted(pattern: Pattern, length: int):
    counted = counts(pattern, length=length, heads=4)
    held = mask(pattern, length=length, heads=4)
    assert counted.shape == held.shape == (4, length, length)
    assert (counted.dtype, held.dtype) == (torch.int64, torch.bool)
    assert torch.equal(held, counted > 0)
    assert counted.min() >= 0


@given(relations, st.data())
def test_a_part_of_the_mask_is_the_mask_of_a_part(pattern: Pattern, data: st.DataObject):
    queries, keys = data.draw(spans(97)), data.draw(spans(97))
    whole = counts(pattern, length=97)
    part = counts(pattern, queries=queries, keys=keys)
    assert torch.equal(part, whole[queries.start : queries.stop, keys.start : keys.stop])


def test_a_pattern_without_heads_needs_no_heads():
    assert mask(Causal(), length=3).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_a_missing_side_follows_from_the_length():
    assert mask(Causal() & Window(2), queries=range(5, 6), length=7).int().tolist() == [[0, 0, 0, 0, 1, 1, 0]]
    assert mask(Sink(1), length=2, keys=range(0)).shape == (2, 0)


def test_heads_stand_first():
    drawn = counts(PerHead([Causal(), LongNet((2, 4), (1, 2))]), length=4, heads=2)
    assert drawn.tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[2, 0, 0, 0], [1, 1, 0, 0], [1, 0, 2, 0], [0, 0, 1, 1]],
    ]


@given(patterns, st.sampled_from([2, 31]))
def test_terms_are_relations_whose_counts_add_up(pattern: Pattern, length: int):
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    for head in range(4):
        alone = pattern.at_head(head, 4)
        added = sum(term.contains(q, k).long() for term in terms(alone))
        assert torch.equal(added.expand(length, length), counts(alone, length=length))


@pytest.mark.parametrize("heads", [1, 5])
def test_heads_that_share_a_relation_have_the_same_mask(heads: int):
    held = mask(Causal() & Window(4), length=31, heads=heads)
    assert torch.equal(held, mask(Causal() & Window(4), length=31).expand(heads, 31, 31))
