"""Simplify: shorter expressions that count the same pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import relations

from longspan.derive.terms import terms
from longspan.pattern import (
    Causal,
    Chunk,
    Dilated,
    Every,
    Everything,
    Keys,
    LongNet,
    Nothing,
    Pattern,
    Prefix,
    Sink,
    Window,
    simplify,
)

TWICE = Causal() + Window(3)


def counts(pattern: Pattern) -> np.ndarray:
    places = torch.arange(45)
    return pattern.count(places[:, None], places[None]).expand(45, 45).numpy()


def size(pattern: Pattern) -> int:
    return 1 + sum(map(size, pattern.operands))


@given(relations)
def test_every_pair_counts_as_often(pattern: Pattern):
    short = simplify(pattern)
    assert (counts(short) == counts(pattern)).all(), f"{pattern} became {short}"


@given(relations)
def test_no_expression_grows_and_none_is_simplified_twice(pattern: Pattern):
    short = simplify(pattern)
    assert size(short) <= size(pattern)
    assert simplify(short) == short


@given(relations)
def test_terms_add_up_to_the_pattern(pattern: Pattern):
    total = sum((counts(term) for term in terms(pattern)), start=np.zeros((45, 45), dtype=np.int64))
    assert (total == counts(pattern)).all()


# Each law once, and beside it where it does not hold: a pair that counts twice must not become one.
@pytest.mark.parametrize(
    ("long", "short"),
    [
        (Causal() & Causal(), Causal()),
        (TWICE & Everything(), TWICE),
        (TWICE & Nothing(), Nothing()),
        (TWICE & TWICE, TWICE & TWICE),
        (TWICE & ~TWICE, Nothing()),
        (TWICE & (Sink(2) | TWICE), TWICE),
        (Causal() & Window(1), Window(1)),
        (Window(4) & Causal() & Window(3), Window(3) & Causal()),
        (Sink(4) & Sink(3), Sink(3)),
        (Sink(4).T & Sink(3).T, Sink(3).T),
        (Prefix(4) & Prefix(3), Prefix(3)),
        (Keys((1, 2)) & Keys((2, 3)), Keys((2,))),
        (Keys((1, 2)).T & Sink(3).T, Keys((1, 2)).T & Sink(3).T),
        (Causal() | Everything(), Everything()),
        (Causal() | Nothing(), Causal()),
        (TWICE | Nothing(), TWICE | Nothing()),
        (Causal() | Causal(), Causal()),
        (TWICE | TWICE, TWICE | TWICE),
        (Causal() | ~Causal(), Everything()),
        (Causal() | Causal() & Sink(3), Causal()),
        (TWICE | TWICE & Sink(3), TWICE | TWICE & Sink(3)),
        (Causal() | Window(1), Causal()),
        (Window(4) | Sink(3) | Window(3), Window(4) | Sink(3)),
        (Sink(4) | Sink(3), Sink(4)),
        (Keys((1, 2)).T | Keys((3,)).T, Keys((1, 2, 3)).T),
        (Prefix(4) | Prefix(3), Prefix(4)),
        (TWICE + Nothing(), TWICE),
        (Causal() + Causal(), Causal() + Causal()),
        (~~Causal(), Causal()),
        (~~TWICE, ~~TWICE),
        (~Everything(), Nothing()),
        (~Nothing(), Everything()),
        (TWICE.T.T, TWICE),
        (Window(4).T, Window(4)),
        (Causal().T, Causal().T),
        (Dilated(5, offset=2).T, Dilated(5, offset=3)),
        (Chunk(5, offset=2).T, Chunk(5, offset=2)),
        (Chunk(5, shift=5).T, Chunk(5, shift=5).T),
        (Every(4, run=4), Everything()),
        (Every(4, run=3), Every(4, run=3)),
        (Dilated(1), Everything()),
        (Chunk(1), Window(1)),
        (LongNet((4,), (1,)).at_head(0, 1), Causal() & Chunk(4)),
    ],
    ids=str,
)
def test_laws(long: Pattern, short: Pattern):
    assert simplify(long) == short
    assert (counts(long) == counts(short)).all()
