"""Every atom and every named pattern holds exactly the pairs that its paper's words give."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import oracle
import pairs
import pytest
from strategies import LENGTHS

import longspan.pattern
from longspan.derive.mask import counts
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    BigBird,
    Causal,
    Chosen,
    Chunk,
    Dilated,
    Documents,
    Every,
    Everything,
    Fixed,
    Keys,
    Longformer,
    LongMixed,
    LongNet,
    Neighborhood,
    Nothing,
    Pattern,
    PerHead,
    Prefix,
    Random,
    Sink,
    SlidingWindow,
    Streaming,
    Strided,
    Window,
    parse,
)
from longspan.pattern.named import Named

Truth = Callable[[int, int], np.ndarray]


def tally(reads: Callable[[int, int, int], range | set[int] | list[int]]) -> Truth:
    """Return the oracle of an atom's option that no paper names: keys by head, length and query."""
    return lambda heads, n: oracle.tally(heads, n, lambda head, q: reads(head, n, q))


ATOMS: list[tuple[Pattern, Truth]] = [
    (Everything(), tally(lambda head, n, q: range(n))),
    (Nothing(), tally(lambda head, n, q: [])),
    (Causal(), oracle.causal),
    (Window(1), lambda heads, n: oracle.window(heads, n, 1)),
    (Window(7), lambda heads, n: oracle.window(heads, n, 7)),
    (Dilated(1), lambda heads, n: oracle.dilated(heads, n, 1)),
    (Dilated(5), lambda heads, n: oracle.dilated(heads, n, 5)),
    (Dilated(5, offset=2), tally(lambda head, n, q: {*range(q - 2, -1, -5), *range(q - 2, n, 5)})),
    (Chunk(1), lambda heads, n: oracle.chunk(heads, n, 1)),
    (Chunk(9), lambda heads, n: oracle.chunk(heads, n, 9)),
    (Chunk(9, offset=4), tally(lambda head, n, q: range((q + 5) // 9 * 9 - 5, (q + 5) // 9 * 9 + 4))),
    (Chunk(9, shift=13), tally(lambda head, n, q: range(q - q % 9 - 13, q - q % 9 - 4))),
    (Every(4), lambda heads, n: oracle.every(heads, n, 4, 0)),
    (Every(4, offset=3), lambda heads, n: oracle.every(heads, n, 4, 3)),
    (
        Every(4, offset=3, within=10),
        tally(lambda head, n, q: [k for start in range(0, n, 10) for k in (start + 3, start + 7)]),
    ),
    (Every(5, offset=2, run=3), lambda heads, n: oracle.every(heads, n, 5, 2, run=3)),
    (Sink(6), lambda heads, n: oracle.sink(heads, n, 6)),
    (Keys([40, 3, 9, 41]), lambda heads, n: pairs.keys(heads, n, [3, 9, 40, 41])),
    (Documents((9, 30, 2)), lambda heads, n: pairs.documents(heads, n, [0] * 9 + [1] * 30 + [2] * 2)),
    (
        # Padded on the left, one document in two stretches, padded on the right.
        Documents((5, 20, 7, 11), ids=(-1, 4, 2, 4)),
        lambda heads, n: pairs.documents(heads, n, [-1] * 5 + [4] * 20 + [2] * 7 + [4] * 11),
    ),
    (
        Chosen([[0], [], [5, 0, 2], [3]], size=7),
        lambda heads, n: pairs.blocks(
            heads, n, 7, lambda head, row: [[0], [], [0, 2, 5], [3]][row] if row < 4 else []
        ),
    ),
    (
        Random(3, size=6, seed=7, stream=2),
        lambda heads, n: pairs.blocks(heads, n, 6, lambda head, row: pairs.drawn(row, 3, seed=7, stream=2)),
    ),
    (
        Random(2, size=6, of=11),
        lambda heads, n: pairs.blocks(heads, n, 6, lambda head, row: pairs.drawn(row, 2, of=11)),
    ),
    (Prefix(6), tally(lambda head, n, q: range(6) if q < 6 else [])),
]

NAMED: list[tuple[Pattern, Truth]] = [
    (SlidingWindow(1), lambda heads, n: oracle.sliding_window(heads, n, 1)),
    (SlidingWindow(7), lambda heads, n: oracle.sliding_window(heads, n, 7)),
    (SlidingWindow(7, causal=False), lambda heads, n: oracle.sliding_window(heads, n, 7, causal=False)),
    (
        Longformer(6),
        lambda heads, n: oracle.longformer(heads, n, reach=5, anchors=[0], causal=True),
    ),
    (
        Longformer(6, global_tokens=3, causal=False),
        lambda heads, n: oracle.longformer(heads, n, reach=5, anchors=range(3)),
    ),
    (
        Longformer(6, dilation=3, global_tokens=0, causal=False),
        lambda heads, n: oracle.longformer(heads, n, reach=5, dilation=3),
    ),
    (
        PerHead([Longformer(4, global_tokens=0), Longformer(4, dilation=2, global_tokens=0)]),
        lambda heads, n: oracle.longformer(
            heads, n, reach=3, dilation=[1] * (heads // 2) + [2] * (heads // 2), causal=True
        ),
    ),
    (
        Longformer(4, dilation=(1, 1, 1, 3), global_tokens=(17, 40), causal=False),
        lambda heads, n: oracle.longformer(
            heads, n, reach=3, dilation=[1] * (heads * 3 // 4) + [3] * (heads // 4), anchors=[17, 40]
        ),
    ),
    (
        Longformer(4, dilation=[2, 1], global_tokens=[17, 0]),
        lambda heads, n: oracle.longformer(
            heads, n, reach=3, dilation=[2] * (heads // 2) + [1] * (heads // 2), anchors=[0, 17], causal=True
        ),
    ),
    *(
        (
            LongNet((6, 30), (2, 5), offset="torchscale", causal=causal),
            lambda heads, n, causal=causal: oracle.longnet(
                heads, n, [6, 30], [2, 5], torchscale=True, causal=causal
            ),
        )
        for causal in (True, False)
    ),
    *(
        (
            kind(5, **options),
            lambda heads, n, truth=truth, options=options, sizes=sizes: truth(heads, n, *sizes, **options),
        )
        for kind, truth, sizes in ((Strided, pairs.strided, [5]), (Fixed, pairs.fixed, [5, 1]))
        for options in (
            {},
            {"causal": False},
            {"factor": "divided"},
            {"factor": "near"},
            {"factor": "far", "causal": False},
        )
    ),
    (Strided(7, window=7), lambda heads, n: pairs.strided(heads, n, 7, near=7)),
    (
        Fixed(9, summary=2, variants=4),
        lambda heads, n: pairs.fixed(heads, n, 9, 2, variants=4),
    ),
    (
        Fixed(9, summary=3, variants=2, factor="divided"),
        lambda heads, n: pairs.fixed(heads, n, 9, 3, variants=2, factor="divided"),
    ),
    (
        BigBird(6, seed=3),
        lambda heads, n: pairs.bigbird(
            heads, n, 6, lambda head, row: pairs.drawn(row, 3, seed=3, stream=head), causal=True
        ),
    ),
    (
        BigBird(6, random=0),
        lambda heads, n: pairs.bigbird(heads, n, 6, lambda head, row: [], causal=True),
    ),
    (Neighborhood(5), lambda heads, n: pairs.neighborhood(heads, n, 5, 1, causal=True)),
    (Neighborhood(4, dilation=3), lambda heads, n: pairs.neighborhood(heads, n, 4, 3, causal=True)),
    (LongNet((5, 15), (1, 3)), lambda heads, n: oracle.longnet(heads, n, [5, 15], [1, 3])),
    (LongNet([4, 9, 27], [1, 2, 5]), lambda heads, n: oracle.longnet(heads, n, [4, 9, 27], [1, 2, 5])),
    (LongNet([8], [4]), lambda heads, n: oracle.longnet(heads, n, [8], [4])),
    (
        LongNet((7, 14), (1, 2), causal=False),
        lambda heads, n: oracle.longnet(heads, n, [7, 14], [1, 2], causal=False),
    ),
    (
        LongNet(),
        lambda heads, n: oracle.longnet(heads, n, [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12]),
    ),
    (S2(8), lambda heads, n: oracle.s2(heads, n, 8)),
    (S2(7), lambda heads, n: oracle.s2(heads, n, 7)),
    (S2(8, causal=False), lambda heads, n: oracle.s2(heads, n, 8, causal=False)),
    (SCCA(8), lambda heads, n: oracle.scca_fixed(heads, n, 8, 8)),
    (SCCA(7), lambda heads, n: oracle.scca_fixed(heads, n, 7, 7)),
    (SCCA(7, causal=False), lambda heads, n: oracle.scca_fixed(heads, n, 7, 7, causal=False)),
    (SCCA(8, flow=4), lambda heads, n: oracle.scca_flow(heads, n, 8, 4)),
    (SCCA(5, flow=3), lambda heads, n: oracle.scca_flow(heads, n, 5, 3)),
    (SCCA(5, flow=3, causal=False), lambda heads, n: oracle.scca_flow(heads, n, 5, 3, causal=False)),
    (SCCA(8, shifts=(0, 4)), lambda heads, n: oracle.scca(heads, n, 8, [0, 4])),
    (
        SCCA(7, shifts=(0, 5, 20, 14), empty="nothing"),
        lambda heads, n: oracle.scca(heads, n, 7, [0, 5, 20, 14], empty="nothing"),
    ),
    (
        SCCA(6, flow=5, empty="nothing"),
        lambda heads, n: oracle.scca_flow(heads, n, 6, 5, empty="nothing"),
    ),
    (SDA(), lambda heads, n: oracle.sda(heads, n, heads)),
    (SDA(3), lambda heads, n: oracle.sda(heads, n, 3)),
    (SDA(3, causal=False), lambda heads, n: oracle.sda(heads, n, 3, causal=False)),
    (SDA(3, rows="selected"), lambda heads, n: oracle.sda(heads, n, 3, rows="selected")),
    (
        SDA(rows="selected", causal=False),
        lambda heads, n: oracle.sda(heads, n, heads, rows="selected", causal=False),
    ),
    (LongMixed(8), lambda heads, n: oracle.longmixed(heads, n, 8, heads // 2, 8)),
    (LongMixed(7, dilation=3), lambda heads, n: oracle.longmixed(heads, n, 7, 3, 7)),
    (
        LongMixed(7, dilation=3, causal=False),
        lambda heads, n: oracle.longmixed(heads, n, 7, 3, 7, causal=False),
    ),
    (
        LongMixed(8, flow=3, rows="selected", empty="nothing"),
        lambda heads, n: np.concatenate(
            [
                oracle.scca_flow(heads // 2, n, 8, 3, empty="nothing"),
                oracle.sda(heads // 2, n, heads // 2, rows="selected"),
            ]
        ),
    ),
    (
        LongMixed(8, dilation=2, shifts=(4, 0)),
        lambda heads, n: np.concatenate(
            [oracle.scca(heads // 2, n, 8, [4, 0]), oracle.sda(heads // 2, n, 2)]
        ),
    ),
    (Streaming(8, sinks=3), lambda heads, n: oracle.streaming(heads, n, 3, 8)),
    (Streaming(1, sinks=1), lambda heads, n: oracle.streaming(heads, n, 1, 1)),
]

# Patterns that know the length of their text, by that length; those that roll leak on purpose.
BOUNDED: list[tuple[Callable[[int], Pattern], Truth, list[int]]] = [
    (
        lambda n: BigBird(6, random=2, seed=5, length=n, causal=False),
        lambda heads, n: pairs.bigbird(
            heads,
            n,
            6,
            lambda head, row: pairs.drawn(row, 2, of=-(-n // 6), seed=5, stream=head),
            causal=False,
        ),
        [1, 2, 31, 36, 97],
    ),
    (
        lambda n: Neighborhood(5, length=n, causal=False),
        lambda heads, n: pairs.neighborhood(heads, n, 5, 1),
        [5, 6, 31, 97],
    ),
    (
        lambda n: Neighborhood(4, dilation=3, length=n, causal=False),
        lambda heads, n: pairs.neighborhood(heads, n, 4, 3),
        [12, 13, 31, 97],
    ),
    (
        lambda n: Neighborhood(1, dilation=2, length=n, causal=False),
        lambda heads, n: pairs.neighborhood(heads, n, 1, 2),
        [2, 31],
    ),
    *(
        (
            lambda n, causal=causal: S2(8, wrap="roll", length=n, causal=causal),
            lambda heads, n, causal=causal: pairs.rolled_s2(heads, n, 8, causal=causal),
            [8, 16, 96],
        )
        for causal in (True, False)
    ),
    *(
        (
            lambda n, causal=causal, shift=shift: SCCA(
                8, shifts=(0, shift), mask="rolled", length=n, causal=causal
            ),
            lambda heads, n, causal=causal, shift=shift: pairs.rolled_scca(
                heads, n, 8, [0, shift], causal=causal
            ),
            [8, 16, 32, 96],
        )
        for causal in (True, False)
        for shift in (4, 8, 11, 24)
    ),
    (
        lambda n: SCCA(8, flow=3, mask="rolled", length=n),
        lambda heads, n: pairs.rolled_scca(heads, n, 8, [head % 3 * 8 for head in range(heads)]),
        [8, 24, 96],
    ),
]


@pytest.mark.parametrize(("pattern", "truth"), [pytest.param(*row, id=str(row[0])) for row in ATOMS + NAMED])
@pytest.mark.parametrize("heads", [4, 12])
def test_counts_are_those_of_the_oracle(pattern: Pattern, truth: Truth, heads: int):
    for n in LENGTHS:
        oracle.same_pairs(counts(pattern, length=n, heads=heads).numpy(), truth(heads, n), str(pattern))


@pytest.mark.parametrize(("pattern", "truth", "lengths"), BOUNDED)
def test_patterns_that_know_their_length_are_those_of_the_oracle(
    pattern: Callable[[int], Pattern], truth: Truth, lengths: list[int]
):
    for n in lengths:
        claimed = counts(pattern(n), length=n, heads=4)
        oracle.same_pairs(claimed.numpy(), truth(4, n), str(pattern(n)))
        assert parse(str(pattern(n))) == pattern(n)


def test_every_exported_pattern_has_an_oracle():
    """A new pattern is not finished before the tables above hold it."""
    held = {type(pattern) for pattern, _ in ATOMS + NAMED}
    operators = {Pattern, *Pattern.__subclasses__()} - {PerHead}
    for name in longspan.pattern.__all__:
        exported = getattr(longspan.pattern, name)
        if inspect.isclass(exported) and issubclass(exported, Pattern) and exported not in operators:
            assert exported in held, f"{name} has no oracle in this file"


@pytest.mark.parametrize(
    "pattern",
    [pattern for pattern, _ in NAMED if getattr(pattern, "causal", True)],
    ids=str,
)
def test_nothing_leaks(pattern: Pattern):
    """Named patterns are causal unless told otherwise: no query reads a later key."""
    for heads in (4, 8):
        assert not counts(pattern, length=129, heads=heads).triu(1).any()


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in NAMED], ids=str)
def test_a_printed_pattern_is_parsed_to_the_same_pattern(pattern: Pattern):
    assert parse(str(pattern)) == pattern
    assert hash(parse(str(pattern))) == hash(pattern)


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in NAMED], ids=str)
def test_a_head_has_no_heads_and_no_names(pattern: Pattern):
    def plain(part: Pattern) -> bool:
        return not isinstance(part, Named) and all(map(plain, part.operands))

    for head in range(4):
        alone = pattern.at_head(head, 4)
        assert plain(alone) and not isinstance(alone, PerHead)
        assert alone.at_head(0, 1) == alone


def check_period(pattern: Pattern) -> None:
    if pattern.period is not None and pattern.period <= 200:
        moved = range(pattern.period, pattern.period + 60)
        same = counts(pattern, queries=moved, keys=moved, heads=4) == counts(pattern, length=60, heads=4)
        assert same.all(), f"{pattern} is not the same after {pattern.period}"


def test_the_period_changes_no_pair():
    for pattern, _ in ATOMS + [pair for pair in NAMED if not getattr(pair[0], "varies", False)]:
        check_period(pattern)


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in NAMED], ids=str)
def test_the_period_of_a_head_changes_no_pair(pattern: Pattern):
    for head in range(4):
        check_period(pattern.at_head(head, 4))


@pytest.mark.parametrize(
    "pattern", [pattern for pattern, _ in ATOMS + NAMED if not getattr(pattern, "varies", False)], ids=str
)
def test_ranges_far_from_the_beginning_are_read_at_absolute_positions(pattern: Pattern):
    """A part of the mask is the mask of a part."""
    whole = counts(pattern, length=200, heads=4)
    part = counts(pattern, queries=range(101, 140, 3), keys=range(7, 200, 2), heads=4)
    assert (part == whole[:, 101:140:3, 7:200:2]).all()


def test_sizes_count_the_own_position():
    """Transformers' `sliding_window=4` and Longformer's two-sided `w=6` in our words."""
    assert counts(SlidingWindow(4), length=50, heads=1)[0].sum(1).max() == 4
    encoder = Longformer(6 // 2 + 1, global_tokens=0, causal=False)
    assert counts(encoder, length=50, heads=1)[0].sum(1).max() == 6 + 1
