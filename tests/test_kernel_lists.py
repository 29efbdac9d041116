"""Lists: those of a text drawn out from a short one are those of all its blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import relations, spans

from longspan.derive.blocks import Blocks, blocks
from longspan.derive.stretch import Stretch, shortest
from longspan.derive.terms import terms
from longspan.derive.tiling import layouts
from longspan.kernel.flex import family
from longspan.kernel.flex.lists import Lists, lists, squares
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Dilated,
    LongMixed,
    LongNet,
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Window,
)

SIZE = 4


def classes(found: Blocks) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.unique(np.stack([found.query_class, found.key_class]), axis=1)
    return pairs[0], pairs[1]


def listed(found: Blocks, stretch: Stretch) -> Lists:
    return lists([(found, stretch)], classes(found), torch.device("cpu"))


def check_drawn_out(term: Pattern, queries: range, keys: range) -> int:
    """Compare the lists in all layouts; return how often a strip comes again."""
    tried = layouts(term, queries, keys, size=SIZE)
    stretch = shortest(term, queries, keys, grid=SIZE * int(np.lcm.reduce(np.array(tried).ravel())))
    for steps in tried:
        short = blocks(term, queries=stretch.queries, keys=stretch.keys, size=SIZE, steps=steps)
        whole = blocks(term, queries=queries, keys=keys, size=SIZE, steps=steps)
        if not len(whole):
            assert not len(short)
            continue
        alone = listed(whole, Stretch(queries, keys))
        for got, wanted in zip(listed(short, stretch).tensors, alone.tensors, strict=True):
            assert torch.equal(got, wanted), f"{term} over {queries} x {keys}, every {steps}"
    return stretch.times


@given(relations, st.data())
def test_a_long_text_has_the_lists_of_a_short_one_drawn_out(pattern: Pattern, data: st.DataObject):
    queries, keys = data.draw(spans(300)), data.draw(spans(300))
    for term in terms(pattern):
        check_drawn_out(term, queries, keys)


@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(20),
        SlidingWindow(9, causal=False),
        SCCA(16, flow=4),
        LongNet((8, 32), (1, 4)),
        LongNet((8, 30), (1, 3)),
        Causal() & Dilated(3, offset=1) & Window(40),
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", [range(701), range(700, 701), range(333, 701)], ids=str)
def test_named_patterns_are_drawn_out(pattern: Pattern, queries: range):
    times = [
        check_drawn_out(term, queries, range(701)) for h in range(4) for term in terms(pattern.at_head(h, 4))
    ]
    assert len(queries) == 1 or max(times) > 1


@pytest.mark.parametrize("pattern", [Causal(), SDA(3), LongMixed(16), SlidingWindow(20)], ids=str)
def test_lists_hold_every_block_once_in_order(pattern: Pattern):
    for term in terms(pattern.at_head(1, 4)):
        for steps in layouts(term, range(101), range(101), size=SIZE):
            found = blocks(term, length=101, size=SIZE, steps=steps)
            made = listed(found, Stretch(range(101), range(101)))
            for full, sides in (
                (False, (made.keys, made.queries)),
                (True, (made.full_keys, made.full_queries)),
            ):
                layout, row, column = squares(found, classes(found), full)
                for (number, where), line, across in zip(sides, (row, column), (column, row), strict=True):
                    for place in np.ndindex(number.shape[0], number.shape[2]):
                        meant = np.sort(across[(layout == place[0]) & (line == place[1])])
                        got = where[place[0], 0, place[1]]
                        assert got[: number[place[0], 0, place[1]]].tolist() == meant.tolist()
                        assert not got[len(meant) :].any()


def read_by(strides: torch.Tensor, number: torch.Tensor, which: torch.Tensor) -> list[list[int]]:
    """Return the lists as the kernels of PyTorch 2.11 find them: in memory, by the strides of other lists."""
    layouts, heads, lines = number.shape
    flat, found = which.reshape(-1), []
    for layout, head, line in np.ndindex(layouts, heads, lines):
        begin = (layout * heads + head) * strides.stride(1) + line * strides.stride(2)
        found.append(flat[begin : begin + int(number[layout, head, line])].tolist())
    return found


@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(512),
        Causal(),
        Streaming(300),
        S2(256),
        LongNet((256, 1024), (1, 4)),
        PerHead([SlidingWindow(300), SlidingWindow(700)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1024, 1, 500])
def test_both_lists_along_an_axis_are_found_by_the_strides_of_one(pattern: Pattern, rows: int):
    """Kernels of PyTorch 2.11 go through the full blocks by the strides of the partial ones."""
    calls = 0
    for group in family.groups(pattern, 4, range(1024 - rows, 1024), range(1024), torch.device("cpu")):
        for call in group.calls:
            made = call.lists
            for partial, full in ((made.keys, made.full_keys), (made.queries, made.full_queries)):
                assert all(part.is_contiguous() for part in (*partial, *full))
                assert [part.stride() for part in partial] == [part.stride() for part in full]
                meant = [
                    which[:number].tolist()
                    for number, which in zip(full[0].flatten(), full[1].flatten(0, 2), strict=True)
                ]
                assert read_by(partial[1], *full) == meant
                calls += 1
    assert calls
