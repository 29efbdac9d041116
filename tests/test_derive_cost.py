"""The cost: the number of pairs is that of the mask, to the last one, and is found without the mask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, patterns, spans

from longspan.derive.cost import cost
from longspan.derive.mask import counts
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Dilated,
    Longformer,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    SlidingWindow,
    Streaming,
    Window,
)

METHODS = [
    SlidingWindow(100),
    Longformer(40, dilation=3, global_tokens=5),
    LongNet((60, 180), (1, 3)),
    S2(70),
    SCCA(90),
    SCCA(90, flow=4),
    SDA(),
    SDA(rows="selected"),
    LongMixed(90),
    Streaming(100),
]


@given(patterns, lengths)
def test_pairs_are_those_of_the_mask(pattern: Pattern, length: int):
    held = counts(pattern, length=length, heads=4)
    assert cost(pattern, length=length, heads=4).pairs == held.sum()


@given(patterns, st.data())
def test_pairs_of_ranges_are_those_of_their_mask(pattern: Pattern, data: st.DataObject):
    queries, keys = data.draw(spans(129)), data.draw(spans(129))
    held = counts(pattern, queries=queries, keys=keys, heads=4)
    assert cost(pattern, queries=queries, keys=keys, heads=4).pairs == held.sum()


@pytest.mark.parametrize("pattern", METHODS, ids=str)
@pytest.mark.parametrize("length", [600, 1000])
def test_pairs_of_texts_of_many_blocks_are_those_of_the_mask(pattern: Pattern, length: int):
    held = counts(pattern, length=length, heads=4)
    assert cost(pattern, length=length, heads=4).pairs == held.sum()


def test_pairs_of_a_window_over_a_million_tokens():
    """Every query reads the window, but for the first ones, whose windows are cut off."""
    length, window = 1_048_576, 512
    truth = length * window - window * (window - 1) // 2
    assert cost(SlidingWindow(window), length=length).pairs == truth
    assert cost(SlidingWindow(window), length=length, heads=8).pairs == 8 * truth


def test_a_pair_that_is_read_twice_costs_twice():
    once = cost(Causal() & Window(9), length=97)
    twice = cost((Causal() & Window(9)) + (Causal() & Window(9)), length=97)
    assert (twice.pairs, twice.forward_flops) == (2 * once.pairs, 2 * once.forward_flops)


def test_share_is_that_of_dense_attention():
    assert cost(Causal(), length=4, heads=2).share == 10 / 16
    assert cost(Dilated(2), length=4, heads=2).share == 8 / 16
    assert cost(Nothing(), length=4).share == 0
    assert cost(Causal(), queries=range(0), keys=range(4)).share == 0


def test_a_pair_takes_two_products_forward_and_five_backward():
    found = cost(Causal(), length=4, width=32)
    assert (found.pairs, found.forward_flops, found.backward_flops) == (10, 10 * 4 * 32, 10 * 10 * 32)


def test_a_decoding_step_costs_its_row():
    assert cost(Causal() & Window(100), queries=range(5000, 5001), keys=range(5001)).pairs == 100
    assert cost(Causal(), queries=range(5000, 5001), keys=range(5001)).pairs == 5001
