"""Hypothesis strategies: random patterns of all atoms and operators, awkward lengths, rectangles of pairs."""

from __future__ import annotations

from hypothesis import strategies as st

from longspan.pattern import (
    Causal,
    Chosen,
    Chunk,
    Dilated,
    Documents,
    Every,
    Everything,
    Keys,
    Nothing,
    Pattern,
    PerHead,
    Prefix,
    Random,
    Sink,
    Window,
)

# Lengths that divide nothing, and the two at which loops are entered once or not at all.
LENGTHS = (1, 2, 31, 97, 129)

lengths = st.sampled_from(LENGTHS)
sizes = st.integers(1, 40)


@st.composite
def _dilated(draw: st.DrawFn) -> Pattern:
    step = draw(st.integers(1, 12))
    return Dilated(step, offset=draw(st.integers(0, step - 1)))


@st.composite
def _chunk(draw: st.DrawFn) -> Pattern:
    size = draw(sizes)
    return Chunk(size, offset=draw(st.integers(0, size - 1)), shift=draw(st.integers(0, 2 * size)))


@st.composite
def _every(draw: st.DrawFn) -> Pattern:
    step = draw(st.integers(1, 12))
    offset = draw(st.integers(0, step - 1))
    within = draw(st.sampled_from([0, step, 3 * step, 25]))
    return Every(step, offset=offset, within=within, run=draw(st.integers(1, step - offset)))


@st.composite
def _documents(draw: st.DrawFn) -> Pattern:
    lengths = draw(st.lists(sizes, max_size=6))
    return Documents(lengths, ids=draw(st.none() | st.tuples(*(st.integers(-1, 3) for _ in lengths))))


@st.composite
def _random(draw: st.DrawFn) -> Pattern:
    return Random(
        draw(st.integers(1, 4)),
        size=draw(st.integers(1, 9)),
        of=draw(st.integers(0, 20)),
        seed=draw(st.integers(0, 3)),
        stream=draw(st.integers(0, 3)),
    )


_tables = st.lists(st.lists(st.integers(0, 16), max_size=5), max_size=20)

atoms = st.one_of(
    st.just(Causal()),
    st.sampled_from([Everything(), Nothing()]),
    st.builds(Keys, st.lists(st.integers(0, 150), max_size=30)),
    st.builds(Chosen, _tables, size=st.integers(1, 9)),
    _documents(),
    _random(),
    st.builds(Window, sizes),
    st.builds(Sink, sizes),
    st.builds(Prefix, sizes),
    _dilated(),
    _chunk(),
    _every(),
)


def _joined(parts: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    pairs = st.tuples(parts, parts)
    return st.one_of(
        pairs.map(lambda pair: pair[0] & pair[1]),
        pairs.map(lambda pair: pair[0] | pair[1]),
        pairs.map(lambda pair: pair[0] + pair[1]),
        pairs.map(lambda pair: pair[0] - pair[1]),
        parts.map(lambda part: ~part),
        parts.map(lambda part: part.T),
    )


# The same relation for every head.
relations = st.recursive(atoms, _joined, max_leaves=5)

# A relation for each of one, two or four groups of heads: fit for any multiple of four heads.
per_head = st.sampled_from([1, 2, 4]).flatmap(
    lambda groups: st.lists(relations, min_size=groups, max_size=groups).map(PerHead)
)

patterns = st.one_of(relations, per_head)


@st.composite
def positions(draw: st.DrawFn, *, most: int = 24) -> range:
    """Return an arithmetic progression of positions: one side of a rectangle of pairs."""
    start, step, number = draw(st.integers(0, 140)), draw(st.integers(1, 14)), draw(st.integers(1, most))
    return range(start, start + step * number, step)


@st.composite
def spans(draw: st.DrawFn, length: int) -> range:
    """Return a range of neighbouring positions inside a text of `length` tokens."""
    start = draw(st.integers(0, length - 1))
    return range(start, draw(st.integers(start + 1, length)))
