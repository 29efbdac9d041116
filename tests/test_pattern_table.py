"""Tables: positions and blocks given as data, read by position, over ranges and by what rectangles hold."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import atoms, positions, relations
from test_kernel_matrix import check, tensors

from longspan.derive.blocks import blocks
from longspan.errors import ShapeError
from longspan.kernel.heads import head_groups
from longspan.pattern import (
    S2,
    BigBird,
    Causal,
    Chosen,
    Chunk,
    Documents,
    Every,
    Fixed,
    Keys,
    Longformer,
    Neighborhood,
    Pattern,
    Prefix,
    Progression,
    Random,
    Sink,
    Window,
    top_blocks,
)
from longspan.pattern.table import bits


def contained(pattern: Pattern, queries: range, keys: range) -> np.ndarray:
    q, k = np.array(queries), np.array(keys)
    return np.broadcast_to(pattern.contains(q[:, None], k[None]), (len(q), len(k)))


@given(atoms, positions(), positions())
def test_arrays_and_tensors_are_read_alike(pattern: Pattern, queries: range, keys: range):
    q, k = torch.tensor(queries), torch.tensor(keys)
    by_tensor = pattern.contains(q[:, None], k[None]).expand(len(q), len(k))
    assert (by_tensor.numpy() == contained(pattern, queries, keys)).all()


# What rectangles hold.


@st.composite
def _alike(draw: st.DrawFn) -> tuple[list[range], list[range]]:
    """Return rectangles of equal shape and steps, at several places."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    steps = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    places = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=2, max_size=8))
    return (
        [range(q, q + rows * steps[0], steps[0]) for q, _ in places],
        [range(k, k + columns * steps[1], steps[1]) for _, k in places],
    )


def sides(ranges: list[range]) -> Progression:
    alone = [Progression.of(one) for one in ranges]
    return Progression(*(np.array([getattr(one, name) for one in alone]) for name in ("low", "high", "step")))


@given(st.one_of(atoms, relations), _alike())
@example(Documents((9, 9, 9, 9, 9)), ([range(5, 14), range(14, 23), range(14, 23)], [range(5, 14)] * 3))
@example(Random(2, size=5), ([range(30, 40), range(40, 50)], [range(0, 9)] * 2))
def test_equal_signatures_hold_equal_pairs(pattern: Pattern, alike: tuple[list[range], list[range]]):
    queries, keys = alike
    signature = pattern.signature(sides(queries), sides(keys))
    facts = [tuple(int(np.broadcast_to(fact, len(keys))[n]) for fact in signature) for n in range(len(keys))]
    for first, others in ((n, range(n)) for n in range(len(keys))):
        for second in others:
            if facts[first] == facts[second]:
                masks = [contained(pattern, queries[n], keys[n]) for n in (first, second)]
                assert (masks[0] == masks[1]).all(), f"{pattern} at {queries}, {keys}: {first} and {second}"


@pytest.mark.parametrize(
    ("pattern", "looks"),
    [
        (Causal() & (Window(64) | Sink(4)), 6),
        (Causal() & Sink(20), 5),
        (Causal() & Keys(tuple(range(0, 1024, 128))), 4),
        (Causal() & Documents((128,) * 8), 3),
        (Causal() | Prefix(24), 5),
    ],
    ids=str,
)
def test_few_signatures_tell_the_rectangles_of_a_pattern_apart(pattern: Pattern, looks: int):
    """A signature that always differs is sound too, and useless: these must stay few however long the text."""
    first = 16 * np.arange(64)
    corners = (side.ravel() for side in np.meshgrid(first, first, indexing="ij"))
    q, k = (Progression(corner, corner + 15, np.ones_like(corner)) for corner in corners)
    signature = np.stack([np.broadcast_to(fact, q.low.shape) for fact in pattern.signature(q, k)])
    assert len(np.unique(signature, axis=1).T) <= looks


# Reading over ranges.


@pytest.mark.parametrize("pattern", [Keys((3, 4, 9)), Documents((5, 4, 8), ids=(0, 2, 0))], ids=str)
def test_neighbours_are_decided_wherever_they_can_be(pattern: Pattern):
    for start in range(20):
        for stop in range(start + 1, 21):
            bracket = pattern.contains(Progression.of(range(0, 5)), Progression.of(range(start, stop)))
            truth = contained(pattern, range(0, 5), range(start, stop))
            assert bracket.low == truth.min()
            assert bracket.high == truth.max() or isinstance(pattern, Documents)


def test_chosen_blocks_are_found_among_a_million_tokens_by_few_looks():
    table = [(row, row // 2, 7 * row % (row + 1)) for row in range(8192)]
    for pattern in (Chosen(table, size=128), Random(3, size=128), Random(3, size=128, of=8192)):
        found = blocks(pattern, length=1 << 20)
        assert found.visited < 80 * len(found)
        assert (found.kind == 2).all()


def test_a_table_of_a_million_positions_is_hashed_once():
    pattern = Keys(np.arange(0, 1 << 20, 2))
    hash(pattern)
    begun = time.perf_counter()
    for _ in range(1000):
        hash(Causal() & pattern)
    assert time.perf_counter() - begun < 0.5


def test_what_is_worked_out_from_a_table_is_not_saved():
    pattern = Documents((40_000, 50_000))
    blocks(Causal() & pattern, length=1000)
    pattern.contains(torch.arange(9), torch.arange(9))
    assert len(pickle.dumps(pattern)) < 300


@given(st.lists(st.integers(-2, 3), max_size=30))
def test_documents_are_made_from_the_id_of_each_position(ids: list[int]):
    pattern = Documents.of(ids)
    assert pattern == Documents.of(np.array(ids, dtype=np.int64)) == Documents.of(torch.tensor(ids).long())
    truth = [[a == b and a >= 0 for b in [*ids, -1]] for a in [*ids, -1]]
    assert contained(pattern, range(len(ids) + 1), range(len(ids) + 1)).tolist() == truth


def test_numbers_have_as_many_bits_as_python_says():
    numbers = [0, 1, 2, 3, 4, 255, 256, 2**31 - 1, 2**31, 2**52 - 1]
    assert bits(np.array(numbers)).tolist() == [number.bit_length() for number in numbers]


# Randomness.


def test_random_blocks_are_the_same_for_ever():
    """Whoever changes these changes what trained models read."""
    drawn = np.stack(Random(3, seed=1, stream=2).columns(np.arange(20, 24)))
    assert drawn.T.tolist() == [[3, 7, 1], [15, 11, 13], [10, 7, 19], [18, 17, 20]]


@pytest.mark.parametrize("of", [0, 40])
def test_random_blocks_are_equally_likely(of: int):
    tally = np.zeros(40)
    for stream in range(800):
        np.add.at(tally, np.concatenate(Random(3, of=of, stream=stream).columns(np.array([30]))), 1)
    candidates = [b for b in range(1, 39 if of else 29) if abs(b - 30) > 1]
    assert tally.sum() == tally[candidates].sum() == 2400
    expected = 2400 / len(candidates)
    # Three standard deviations of the sum of squares of that many counts.
    chi = ((tally[candidates] - expected) ** 2 / expected).sum()
    assert chi < len(candidates) + 3 * np.sqrt(2 * len(candidates))


def test_heads_and_seeds_draw_independently():
    reads = [
        BigBird(8, seed=seed).at_head(head, 4).contains(torch.tensor(400), torch.arange(400)).tolist()
        for seed in range(2)
        for head in range(4)
    ]
    assert len({tuple(read) for read in reads}) == 8


# Selection.


def test_the_choice_of_blocks_lets_no_future_in():
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(4, 61, 8, generator=generator), torch.randn(2, 61, 8, generator=generator)
    places = torch.arange(61)
    whole = [top_blocks(query, key, size=6, count=3).at_head(head, 4) for head in range(4)]
    # A cut inside a block leaves its first query and changes its mean key; which way makes it good is tried out.
    for cut, sign in ((cut, sign) for cut in (1, 6, 13, 31, 44, 58, 60) for sign in (-1, 1)):
        later_query, later_key = query.clone(), key.clone()
        later_query[:, cut:], later_key[:, cut:] = -5.0, 70.0 * sign
        other = top_blocks(later_query, later_key, size=6, count=3)
        for head in range(4):
            masks = [
                pattern.contains(places[:cut, None], places[None])
                for pattern in (whole[head], other.at_head(head, 4))
            ]
            assert torch.equal(*masks)


def test_the_best_blocks_are_chosen():
    query, key = torch.zeros(2, 20, 2), torch.zeros(1, 20, 2)
    query[0, :, 0] = query[1, :, 1] = 1.0
    key[0, 4:8, 0] = 3.0
    key[0, 8:12, 1] = 3.0
    pattern = top_blocks(query, key, size=4, count=1)
    assert pattern.at_head(0, 2).operands[1].blocks[3:] == ((1, 3), (1, 4))
    assert pattern.at_head(1, 2).operands[1].blocks[3:] == ((2, 3), (2, 4))


def test_blocks_are_chosen_for_one_text():
    with pytest.raises(ShapeError, match="of one text"):
        top_blocks(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), size=4, count=1)


# Through the kernels.


@pytest.mark.parametrize(
    "pattern",
    [
        Causal() & Documents((3, 40, 60, 20)),
        Causal() & Window(20) & Documents((5, 30, 50), ids=(-1, 1, 0)),
        Causal() & (Window(9) | Keys((0, 31, 64, 65, 66))),
        Causal() & Chosen([[0], [1, 0], [0, 2], [], [4, 1]], size=20),
        BigBird(8, length=97, causal=False),
        Neighborhood(7, dilation=3, length=97, causal=False),
        Longformer(5, dilation=(1, 3), global_tokens=(0, 50), causal=False),
        Fixed(16, summary=3, variants=2),
        Causal() & Every(16, offset=5, run=4),
        S2(16, wrap="roll", length=96),
        Causal() | Prefix(40),
    ],
    ids=str,
)
def test_kernels_are_exact_on_tables(pattern: Pattern):
    head_groups.cache_clear()
    check(pattern, tensors(97, 97, torch.float32, torch.device("cpu")), "sdpa")
    check(pattern, tensors(13, 97, torch.float32, torch.device("cpu")), "sdpa", queries=range(84, 97))


def test_chunks_of_one_document_do_not_read_another():
    packed = Causal() & Chunk(8) & Documents((5, 9))
    assert contained(packed, range(5, 6), range(14)).tolist() == [[False] * 5 + [True] + [False] * 8]
