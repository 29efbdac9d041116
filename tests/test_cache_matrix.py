"""Decoding equals recomputing: every pattern, every frequency and every storage, in float32, 300 tokens after prompts.

Each group of heads of one cache is turned by another frequency, so that a text is decoded once for all of them, and all
its steps are compared with one softmax over the whole text: causally, row t of it is step t.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import longspan.frequency
import longspan.pattern
from longspan.cache import Cache, Pool
from longspan.frequency import NTK, DynamicNTK, Frequency, Linear, Llama3, LongRoPE, NTKByParts, Plain, YaRN
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    BigBird,
    Causal,
    Chosen,
    Dilated,
    Documents,
    Fixed,
    Longformer,
    LongMixed,
    LongNet,
    Neighborhood,
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Strided,
    Window,
)
from longspan.pattern.named import Named
from longspan.rope import rotation

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# Prompts whose lengths divide nothing, padded on the left, and the tokens after them.
PROMPTS, NEW = (13, 37, 7), 300
COLUMNS = max(PROMPTS)
LENGTH = COLUMNS + NEW
PATTERNS = [
    Causal(),
    SlidingWindow(9),
    Streaming(7, sinks=3),
    Causal() & Dilated(3),
    Neighborhood(6, dilation=2),
    Longformer(5, dilation=3, global_tokens=(0, 40, 41, 200)),
    LongNet((16, 64), (1, 4)),
    S2(22),
    SCCA(19),
    SCCA(12, flow=4),
    SDA(4),
    LongMixed(18),
    Strided(7),
    Fixed(8, summary=2, variants=2),
    BigBird(8, random=2),
    Chosen([range(row % 3, row + 1, 2) for row in range(40)], size=9),
    (Causal() & Documents((50, 80, 30, 400))) + Window(9),
    PerHead([Streaming(5, sinks=1), Causal(), SlidingWindow(6), Causal() & Dilated(2)]),
]
NAMES = [str(pattern) if len(str(pattern)) < 80 else type(pattern).__name__ for pattern in PATTERNS]
# Those whose angles change with the length come last, and change in the middle of the texts.
FREQUENCIES: tuple[Frequency, ...] = (
    Plain(),
    Linear(4.0),
    NTK(4.0),
    NTKByParts(4.0, original=100),
    YaRN(4.0, original=100),
    Llama3(4.0, original=100),
    DynamicNTK(150, factor=2.0),
    LongRoPE((1.0, 1.5, 2.0, 3.0), (2.0, 4.0, 6.0, 8.0), original=150, factor=4.0),
)
UNVARYING = sum(not frequency.varies for frequency in FREQUENCIES)
# What holds keys, and when room is made: "full" lets none go, "rolling" those that nobody reads any more.
STORAGES = {
    "full": lambda: {"undo": LENGTH},
    "rolling": lambda: {"block": 23},
    "pages": lambda: {"block": 29, "storage": Pool(12000, size=5, width=WIDTH)},
    "int8": lambda: {"block": 31, "storage": "int8"},
}


def test_everything_that_there_is_takes_part():
    named = {kind for kind in vars(longspan.pattern).values() if isinstance(kind, type)}
    assert {kind for kind in named if issubclass(kind, Named)} <= {type(pattern) for pattern in PATTERNS}
    scaled = {kind for kind in vars(longspan.frequency).values() if isinstance(kind, type)}
    assert scaled - {Frequency} == {type(frequency) for frequency in FREQUENCIES}


@cache
def text() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    return [
        torch.randn(len(PROMPTS), heads, LENGTH, WIDTH, generator=random)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


@cache
def angles() -> torch.Tensor:
    """Return the turns to places in texts of every length as complex numbers, `[length, frequency, place, pair]`."""
    found = torch.zeros(LENGTH + 1, len(FREQUENCIES), LENGTH, WIDTH // 2, dtype=torch.complex64)
    for number, frequency in enumerate(FREQUENCIES):
        for length in range(LENGTH + 1) if frequency.varies else [slice(None)]:
            known = max(length, 1) if frequency.varies else None
            made = rotation(torch.arange(LENGTH), frequency, width=WIDTH, length=known)
            found[length, number] = torch.complex(made.cos, made.sin)
    return found


def turned(side: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring numbers, which are the pairs of this text."""
    pairs = torch.view_as_complex(side.reshape(*side.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


def turning(frequencies: slice):
    """Return a function for a cache, of whose heads equal groups have a frequency each."""

    def rotate(side: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
        turns = angles()[length, frequencies, None][:, :, places]
        groups = side.reshape(len(side), len(turns), -1, *side.shape[2:])
        return turned(groups, turns).reshape(side.shape)

    return rotate


def rounded(side: torch.Tensor) -> torch.Tensor:
    scale = side.abs().amax(-1, keepdim=True) / 127
    return (side / scale).round() * scale


def row_of(row: int) -> list[torch.Tensor]:
    """Return the tokens of one row without its padding."""
    return [side[row, :, COLUMNS - PROMPTS[row] :] for side in text()]


def scored(query, key, lengths, places, own) -> torch.Tensor:
    """Return scores of queries, for which keys lie at `places` `[queries, keys]` in texts of some `lengths`, and they at `own`.

    Of all frequencies, `[frequency, heads, queries, keys]`. A key may lie otherwise for every query, `[key heads, 1 or
    queries, keys, width]`.
    """
    shared = len(query) // len(key)
    found = []
    for number in range(len(FREQUENCIES)):
        turns = angles()[:, number]
        asked = turned(query, turns[lengths, own]).unflatten(0, (-1, shared)).transpose(1, 2)
        held = turned(key, turns[lengths[:, None], places])
        found.append((asked @ held.mT).transpose(1, 2).flatten(0, 1))
    return torch.stack(found) * WIDTH**-0.5


@cache
def scores_of(row: int, rounding: str = "none") -> torch.Tensor:
    """Return the scores of one row; its keys are rounded to eight bits "before" they are turned, "after" it, or not."""
    query, key, _ = row_of(row)
    steps = torch.arange(query.shape[1])
    places = steps.expand(len(steps), -1)
    lengths = (steps + 1).clamp(min=PROMPTS[row])
    if rounding != "after":
        key = rounded(key) if rounding == "before" else key
        return scored(query, key[:, None], lengths, places, steps)
    found = []
    for number in range(UNVARYING):
        turns = angles()[-1, number, : len(steps)]
        held = rounded(turned(key, turns)).repeat_interleave(HEADS // KEY_HEADS, dim=0)
        found.append(turned(query, turns) @ held.mT * WIDTH**-0.5)
    return torch.stack(found)


@cache
def counts(pattern: Pattern, length: int) -> torch.Tensor:
    steps = torch.arange(length)
    singles = [(pattern & Causal()).at_head(head, HEADS) for head in range(HEADS)]
    return torch.stack([single.count(steps[:, None], steps).expand(length, length) for single in singles])


def weighed(scores: torch.Tensor, often: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(scores + often.log(), dim=-1).masked_fill((often == 0).all(-1, keepdim=True), 0.0)
    return weights @ value.repeat_interleave(HEADS // KEY_HEADS, dim=0)


@cache
def recomputed(pattern: Pattern, row: int, rounding: str = "none") -> torch.Tensor:
    """Return what one row reads when each of its steps reads the text so far anew, `[frequency, heads, steps, width]`."""
    scores, value = scores_of(row, rounding), row_of(row)[2]
    value = value if rounding == "none" else rounded(value)
    return weighed(scores, counts(pattern, scores.shape[-1]), value)


def streamed(pattern: Pattern, row: int) -> torch.Tensor:
    """Return the same where keys that a step reads lie at places 0, 1, 2 ..., and its query at the last of them."""
    query, key, value = row_of(row)
    often = counts(pattern, query.shape[1])
    found = torch.empty(len(FREQUENCIES), *often.shape)
    for read in (often > 0).unique(dim=0):
        heads = ((often > 0) == read).all(dim=(1, 2)).nonzero().flatten()
        places, lengths = (read.cumsum(1) - 1).clamp(min=0), read.sum(1).clamp(min=1)
        held = key[heads // (HEADS // KEY_HEADS), None]
        found[:, heads] = scored(query[heads], held, lengths, places, lengths - 1)
    return weighed(found, often, value)


def decoded(kept: Cache, sides: list[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """Return what is read in prompts, padding included, and then token by token."""
    outputs = [kept.attend(*(side[:, :, :COLUMNS] for side in sides), real=real)]
    for t in range(COLUMNS, sides[0].shape[2]):
        outputs.append(kept.attend(*(side[:, :, t : t + 1] for side in sides)))
    return torch.cat(outputs, dim=2)


def compare(found: torch.Tensor, wanted: torch.Tensor, row: int, name: str) -> None:
    """Compare `[heads of some frequencies, columns, width]` with what is wanted of each, `[frequency, heads, steps, width]`."""
    mine = found[:, COLUMNS - PROMPTS[row] :].unflatten(0, (-1, HEADS))
    for number, (part, of) in enumerate(zip(mine, wanted, strict=True)):
        torch.testing.assert_close(
            part, of, msg=lambda text, at=number: f"{name}, frequency {at}, row {row}: {text}"
        )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=NAMES)
def test_decoding_equals_recomputing(pattern, storage):
    """Keys that are held turned, as models hand them over, in ragged rows and in a row that is alone."""
    rounding = "after" if storage == "int8" else "none"
    for rows in ([0, 1, 2], [1]) if storage == "full" else ([0, 1, 2],):
        real = torch.arange(COLUMNS) >= COLUMNS - torch.tensor(PROMPTS)[rows, None]
        places = (torch.arange(LENGTH) - (~real).sum(1)[:, None]).clamp(min=0)
        turns = angles()[-1, :UNVARYING, places].transpose(0, 1)[:, :, None]
        query, key, value = (side[rows, None].expand(-1, UNVARYING, -1, -1, -1) for side in text())
        sides = [side.flatten(1, 2) for side in (turned(query, turns), turned(key, turns), value)]
        kept = Cache(
            PerHead([pattern] * UNVARYING),
            heads=HEADS * UNVARYING,
            key_heads=KEY_HEADS * UNVARYING,
            **STORAGES[storage](),
        )
        for row, output in zip(rows, decoded(kept, sides, real), strict=True):
            compare(output, recomputed(pattern, row, rounding)[:UNVARYING], row, f"{pattern}, {storage}")


@pytest.mark.parametrize("storage", [*STORAGES, "sink"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=NAMES)
def test_decoding_with_keys_turned_at_every_step_equals_recomputing(pattern, storage):
    """Keys that are held unturned: angles that vary with the length, and for all angles places counted in the cache."""
    frequencies = slice(0 if storage == "sink" else UNVARYING, None)
    groups = len(FREQUENCIES[frequencies])
    options = {"places": "cache", "block": 23} if storage == "sink" else STORAGES[storage]()
    sides, key_heads = text(), KEY_HEADS
    if storage == "sink":
        # Query heads that share a key head would have to count its places alike.
        sides, key_heads = [side.repeat_interleave(HEADS // side.shape[1], dim=1) for side in sides], HEADS
    kept = Cache(
        PerHead([pattern] * groups),
        heads=HEADS * groups,
        key_heads=key_heads * groups,
        rotate=turning(frequencies),
        **options,
    )
    real = torch.arange(COLUMNS) >= COLUMNS - torch.tensor(PROMPTS)[:, None]
    found = decoded(kept, [side.repeat(1, groups, 1, 1) for side in sides], real)
    for row, output in enumerate(found):
        wanted = streamed if storage == "sink" else recomputed
        wanted = wanted(pattern, row, *(["before"] if storage == "int8" else []))
        compare(output, wanted[frequencies], row, f"{pattern}, {storage}")
