"""Parts: their rectangles hold every pair as often as the pattern counts it, and there are few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import LENGTHS, lengths, relations, spans

from longspan.derive.mask import counts
from longspan.kernel.lattice import runs as runs_module
from longspan.kernel.lattice.parts import Lattice, Part, parts
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    BigBird,
    Causal,
    Chosen,
    Chunk,
    Dilated,
    Longformer,
    LongMixed,
    LongNet,
    Pattern,
    Random,
    Sink,
    SlidingWindow,
    Streaming,
    Window,
)

METHODS = [
    SlidingWindow(20),
    SlidingWindow(20, causal=False),
    Longformer(9, dilation=3),
    LongNet((8, 32), (1, 4)),
    S2(16),
    S2(10, causal=False),
    SCCA(8),
    SCCA(8, flow=4),
    SDA(),
    SDA(rows="selected"),
    LongMixed(8),
    Streaming(16),
]


@pytest.fixture
def narrow_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of few blocks, so that short texts have cut ones too."""
    monkeypatch.setattr(runs_module, "WIDEST", 4)


def indices(lattice: Lattice, shape: tuple[int, int], i: int, j: int) -> np.ndarray:
    return lattice.begins(shape)[i, j] + np.arange(lattice.places) * lattice.step


def held(part: Part) -> np.ndarray:
    """Return which pairs of one rectangle a part computes."""
    shape = (part.query.places, part.key.places)
    if part.causal:
        return np.tri(*shape, dtype=np.int64)
    return np.ones(shape, dtype=np.int64) if part.allowed is None else part.allowed.astype(np.int64)


def check_parts(pattern: Pattern, queries: range, keys: range, *, size: int = 8) -> None:
    truth = counts(pattern, queries=queries, keys=keys).numpy()
    found = np.zeros_like(truth)
    touched = np.zeros(len(queries), dtype=bool)
    for part in parts(pattern, queries, keys, size=size):
        read = np.zeros(len(queries), dtype=np.int64)
        for i in range(part.shape[0]):
            together = np.zeros(len(queries), dtype=np.int64)
            for j in range(part.shape[1]):
                rows, columns = (indices(side, part.shape, i, j) for side in (part.query, part.key))
                assert rows.min() >= 0 and rows.max() < len(queries)
                assert columns.min() >= 0 and columns.max() < len(keys)
                found[np.ix_(rows, columns)] += held(part)
                together[rows] += 1
            # One call writes its rectangles at once, and a fresh part does not look at what was there.
            assert together.max() == 1, f"{pattern}: rectangles of one call share queries"
            read += together
        assert part.pairs == part.rectangles * int(held(part).sum()) <= part.area
        assert not part.fresh or (read.max() == 1 and not touched[read > 0].any())
        touched |= read > 0
    wrong = np.argwhere(found != truth)
    assert not len(wrong), f"{pattern} over {queries} x {keys}: first wrong pair {wrong[0]}, of {len(wrong)}"


@pytest.mark.usefixtures("narrow_runs")
@given(relations, lengths)
@example(Causal() & Window(20), 97)
@example(Causal() & (Window(20) | Sink(3)), 129)
@example(Window(3) + Causal() + Window(3), 31)
@example((Causal() & Dilated(3)) | Window(12), 97)
@example(Causal() & Chunk(24), 129)
def test_parts_of_a_text_hold_every_pair_as_often_as_counted(pattern: Pattern, length: int):
    check_parts(pattern, range(length), range(length))


@pytest.mark.usefixtures("narrow_runs")
@given(relations, st.data())
def test_parts_of_ranges_hold_every_pair_as_often_as_counted(pattern: Pattern, data: st.DataObject):
    check_parts(pattern, data.draw(spans(97)), data.draw(spans(97)))


@pytest.mark.usefixtures("narrow_runs")
@pytest.mark.parametrize("pattern", METHODS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_parts_of_named_patterns_hold_every_pair_as_often_as_counted(pattern: Pattern, length: int):
    for head in range(4):
        check_parts(pattern.at_head(head, 4), range(length), range(length))


TABLES = [
    BigBird(8),
    BigBird(8, length=129, causal=False),
    Causal() & Chosen([[0], [0, 1], [], [1, 3], [0, 4, 2], [1, 5]], size=16),
    Chosen([[0, 1], [2], [5, 3], [8], [0, 1, 2, 3]], size=16) - Window(9),
    (Sink(8) | Random(2, size=8)) + Causal() & Random(3, size=4, of=20),
]


@pytest.mark.parametrize("pattern", TABLES, ids=str)
@pytest.mark.parametrize("queries", [range(129), range(64, 97), range(5, 120)], ids=str)
def test_parts_of_tables_hold_every_pair_as_often_as_counted(pattern: Pattern, queries: range):
    for head in range(2):
        check_parts(pattern.at_head(head, 2), queries, range(129))


def test_a_table_of_a_long_text_is_few_parts():
    done = parts(BigBird().at_head(0, 8), range(65_536), range(65_536))
    assert len(done) <= 10
    assert sum(part.pairs for part in done if part.key.at is not None) == (1019 * 3 + 2 + 1) * 64 * 64


@pytest.mark.parametrize("pattern", METHODS, ids=str)
def test_parts_at_their_true_size_hold_every_pair_as_often_as_counted(pattern: Pattern):
    check_parts(pattern.at_head(3, 4), range(600), range(600), size=128)


LOCAL = [
    Causal(),
    SlidingWindow(512),
    Streaming(508),
    SCCA(512),
    SCCA(512, flow=8),
    S2(1024),
    Longformer(256),
    LongNet((256, 512, 1024), (1, 2, 4)),
]
# Patterns whose pairs grow with the square of the length.
WIDE = [SDA(8), LongMixed(512)]


@pytest.mark.parametrize("pattern", LOCAL + WIDE, ids=str)
def test_the_number_of_parts_hardly_follows_the_length(pattern: Pattern):
    for head in (0, 3):
        alone = pattern.at_head(head, 4)
        number = [len(parts(alone, range(length), range(length))) for length in (8192, 16_384)]
        most = number[0] + 3 if pattern in LOCAL else 2 * number[0]
        assert number[1] <= min(most, 60), f"{alone}: {number}"


@pytest.mark.parametrize("pattern", LOCAL + WIDE, ids=str)
def test_masks_do_not_follow_the_length(pattern: Pattern):
    """What a part keeps in memory and hands to a kernel is no square of the text."""
    for head in (0, 3):
        for part in parts(pattern.at_head(head, 4), range(16_384), range(16_384)):
            assert part.allowed is None or part.allowed.size <= 128 * 128 * runs_module.WIDEST


@pytest.mark.parametrize("window", [128, 512, 1000])
def test_parts_of_a_window_compute_little_more_than_its_pairs(window: int):
    done = parts(Causal() & Window(window), range(16_384), range(16_384))
    assert sum(part.area for part in done) <= 16_384 * (window + 2 * 128)
