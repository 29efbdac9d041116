"""Strands: their pairs and those of the other terms are the pattern's, each as often."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, per_head

from longspan.derive.mask import counts
from longspan.derive.strand import strands
from longspan.pattern import Causal, Chunk, Dilated, Every, LongNet, Pattern, Window

HEADS = 4
thin = st.builds(
    lambda step, offset, part: part & Every(step, offset=offset % step) & Every(step, offset=offset % step).T,
    st.integers(1, 12),
    st.integers(0, 11),
    per_head,
)


@given(st.one_of(per_head, thin), lengths)
def test_strands_hold_the_pairs_of_the_pattern(pattern: Pattern, length: int):
    for head in range(HEADS):
        single = pattern.at_head(head, HEADS)
        whole, found = strands(single, length=length)
        pairs = sum((counts(term, length=length).numpy() for term in whole), np.zeros((length, length), int))
        for strand in found:
            at = np.ix_(strand.tokens, strand.tokens)
            pairs[at] += counts(strand.pattern, length=len(strand.tokens)).numpy()
        assert (pairs == counts(single, length=length).numpy()).all()


def test_a_branch_of_longnet_is_a_shorter_text():
    """A billion tokens, of which the longest branch keeps 2,048 a head, are cut without looking at them."""
    branches = [2048 << k for k in range(20)], [1 << k for k in range(20)]
    whole, found = strands(LongNet(*map(tuple, branches)).at_head(5, heads=32), length=1_000_000_000)
    assert whole == (Causal() & Chunk(2048),)
    assert [strand.tokens.step for strand in found] == [1 << k for k in range(1, 20)]
    assert {str(strand.pattern) for strand in found} == {"Causal() & Chunk(2048)"}


def test_what_reads_every_token_has_no_strands():
    for pattern in (Causal() & Dilated(8), Every(4), Causal() & Window(9) & Every(3)):
        assert strands(pattern, length=100)[1] == ()
