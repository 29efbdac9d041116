"""Steps: the parts of one token hold its pairs as often as the pattern counts them, and are found for many at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import relations

from longspan.attention import attend
from longspan.kernel.flash.bands import band_groups
from longspan.kernel.heads import banded, head_groups
from longspan.kernel.lattice import step
from longspan.kernel.lattice.parts import Part
from longspan.kernel.lattice.step import AHEAD, step_parts
from longspan.kernel.plan import flash_refusal, plan
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    BigBird,
    Causal,
    Chunk,
    Dilated,
    Every,
    Fixed,
    Keys,
    Longformer,
    LongMixed,
    LongNet,
    Pattern,
    SlidingWindow,
    Streaming,
    Strided,
    Window,
)

METHODS = [
    Causal(),
    SlidingWindow(20),
    SlidingWindow(20, causal=False),
    Streaming(16, sinks=3),
    Longformer(9, dilation=3),
    LongNet((8, 32), (1, 4)),
    LongMixed(8),
    S2(16),
    SCCA(8),
    SDA(),
    Strided(12),
    Fixed(16),
    BigBird(8, random=1),
    Causal() & Every(9, run=3),
    Causal() & Dilated(70),
    (Causal() & Window(3)) + Chunk(7),
]


def counted(parts: tuple[Part, ...], keys: int) -> np.ndarray:
    """How often the parts of one query hold each key."""
    often = np.zeros(keys, dtype=np.int64)
    for part in parts:
        assert (part.query.start, part.query.places, part.shape, part.allowed) == (0, 1, (1, 1), None)
        last = part.key.start + (part.key.places - 1) * part.key.step
        assert 0 <= part.key.start <= last < keys
        often[part.key.start : last + 1 : part.key.step] += 1
    assert [part.fresh for part in parts] == [number == 0 for number in range(len(parts))]
    return often


def wanted(pattern: Pattern, position: int) -> np.ndarray:
    often = pattern.count(np.array([position]), np.arange(position + 1))
    return np.broadcast_to(often, position + 1)


@pytest.fixture(params=["wide", "narrow"])
def cells(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cells as they are, and such that short texts have many that are split."""
    step._found.cache_clear()
    if request.param == "narrow":
        monkeypatch.setattr(step, "_CELLS", 3)
        monkeypatch.setattr(step, "_LEAST", 2)
        monkeypatch.setattr(step, "_SPLIT", 2)
    yield
    step._found.cache_clear()


@pytest.mark.parametrize("pattern", METHODS, ids=str)
def test_methods_are_a_few_runs(pattern: Pattern, cells):
    for head in range(4):
        single = pattern.at_head(head, 4)
        for position in (0, 1, 2, 31, 63, 64, 127, 128, 200, 511):
            np.testing.assert_array_equal(
                counted(step_parts(single, position), position + 1), wanted(single, position)
            )


@pytest.mark.parametrize("least", [1, step._LEAST])
@given(pattern=relations, position=st.integers(0, 3 * AHEAD))
@example(pattern=Every(10, run=2) & Dilated(4).T, position=100)
@example(pattern=Dilated(12, offset=11) - Window(30), position=150)
def test_the_parts_of_a_step_hold_every_pair(pattern: Pattern, position: int, least: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_LEAST", least)
        step._found.cache_clear()
        found = step_parts(pattern, position)
    step._found.cache_clear()
    if found is not None:
        np.testing.assert_array_equal(counted(found, position + 1), wanted(pattern, position))


def test_what_is_read_in_many_runs_is_planned_as_ever():
    scattered = Causal() & Keys([key * key for key in range(40)])
    assert step_parts(scattered, 900) is None
    [group] = head_groups(scattered, 2, range(900, 901), range(901))
    assert sum(part.pairs for part in group.parts) == wanted(scattered, 900).sum()


def test_a_formula_is_read_once_for_many_tokens(monkeypatch):
    """Whatever the heads and layers: they ask for the same."""
    asked, runs = [], step._runs
    monkeypatch.setattr(
        step, "_runs", lambda term, *given: asked.append((term, given[0])) or runs(term, *given)
    )
    step._found.cache_clear()
    head_groups.cache_clear()
    for position in range(2 * AHEAD, 4 * AHEAD):
        for _ in range(3):
            head_groups(SlidingWindow(20), 4, range(position, position + 1), range(position + 1))
    assert [given for _, given in asked] == [range(128, 192), range(192, 256)]
    assert head_groups.cache_info().misses == 2 * AHEAD


@pytest.mark.parametrize("pattern", METHODS, ids=str)
def test_bands_of_a_step_are_its_parts(pattern: Pattern):
    """Nothing is joined, and what flash attention is asked holds the pairs that joined bands hold."""
    here = range(300, 301), range(301)
    grouped = head_groups(pattern, 4, *here)
    found, joined = banded(grouped, 1), band_groups(grouped)
    for group, other, parts in zip(found, joined, grouped, strict=True):
        assert group.heads == other.heads
        assert sum(band.pairs for band in group.bands) == sum(band.pairs for band in other.bands)
        assert [(band.key, band.window) for band in group.bands] == [
            (part.key, (-1, -1)) for part in parts.parts
        ]


def test_flash_attention_takes_a_step_in_any_number_of_calls():
    """FlexAttention would list blocks anew for every length."""
    many = (Causal() & Every(300, run=12)) + SlidingWindow(20)
    here = range(8000, 8001), range(8001)
    assert len(banded(head_groups(many, 1, *here), 1)[0].bands) > 8
    assert flash_refusal(many, 1, *here, asked=False) is None
    assert plan(many, length=8001, queries=here[0], dtype="bfloat16", device="cuda").kernel == "flash"


@pytest.mark.parametrize("pattern", METHODS, ids=str)
def test_a_step_attends_as_the_definition_says(pattern: Pattern):
    torch.manual_seed(0)
    for length in (1, 64, 65, 131):
        query = torch.randn(2, 4, 1, 8, requires_grad=True)
        key, value = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(2))
        results = []
        for kernel in (None, "reference"):
            output = attend(query, key, value, pattern, kernel=kernel)
            results.append([output, *torch.autograd.grad(output.square().sum(), (query, key, value))])
        torch.testing.assert_close(*results)
