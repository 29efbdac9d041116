"""Decoding equals recomputing: every frequency, kinds of patterns and every storage, in float32, rows of any length."""

from __future__ import annotations

import math

import pytest
import torch

from longspan import attend
from longspan.cache import Cache, Pool
from longspan.frequency import NTK, DynamicNTK, Linear, Llama3, LongRoPE, NTKByParts, Plain, YaRN
from longspan.frequency.base import Frequency
from longspan.pattern import Causal, Dilated, LongNet, PerHead, SlidingWindow, Streaming, Strided
from longspan.rope import rotation

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
# Prompts whose lengths divide nothing, padded on the left, and the tokens after them.
PROMPTS, NEW = (13, 37, 7), 11
PATTERNS = [
    Causal(),
    SlidingWindow(9),
    Streaming(7, sinks=3),
    Causal() & Dilated(3),
    LongNet((8, 24), (1, 2)),
    Strided(5),
    PerHead([Streaming(5, sinks=1), Causal(), SlidingWindow(6), Causal() & Dilated(2)]),
]
FREQUENCIES = {
    type(frequency).__name__: frequency
    for frequency in (
        Plain(),
        Linear(4.0),
        NTK(4.0),
        NTKByParts(4.0, original=16),
        YaRN(4.0, original=16),
        Llama3(4.0, original=16),
        # These two change their angles with the length, in the middle of the texts below.
        DynamicNTK(24, factor=2.0),
        LongRoPE((1.0, 1.5, 2.0, 3.0), (2.0, 4.0, 6.0, 8.0), original=24, factor=4.0),
    )
}
STORAGES = {
    "plain": lambda: None,
    "pages": lambda: Pool(400, size=5, width=WIDTH),
    "int8": lambda: "int8",
}


def text(length: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(length)
    return [
        torch.randn(len(PROMPTS), heads, length, WIDTH, generator=random)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def turned(side: torch.Tensor, positions: torch.Tensor, frequency: Frequency, length: int) -> torch.Tensor:
    return rotation(positions, frequency, width=WIDTH, length=length).turn(side)


def decoded(sides, pattern, frequency, storage, new, **options) -> torch.Tensor:
    """Return outputs of the prompts, padding included, and of new tokens, which come one by one."""
    first = max(PROMPTS)
    starts = first - torch.tensor(PROMPTS)
    real = torch.arange(first) >= starts[:, None]
    query, key, value = sides
    if frequency.varies:
        options["rotate"] = lambda side, positions, length: turned(side, positions, frequency, length)
    else:
        places = (torch.arange(first + new) - starts[:, None]).clamp(min=0)
        query, key = (turned(side, places, frequency, first + new) for side in (query, key))
    cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, storage=storage, **options)
    outputs = [cache.attend(*(side[:, :, :first] for side in (query, key, value)), real=real)]
    for t in range(first, first + new):
        outputs.append(cache.attend(*(side[:, :, t : t + 1] for side in (query, key, value))))
    return torch.cat(outputs, dim=2)


def recomputed(sides, pattern, frequency, row: int, length: int, queries: range):
    """Return what queries of one row read where the text ends after `length` tokens, and how far eight bits may be off."""
    begin = max(PROMPTS) - PROMPTS[row]
    query, key, value = (side[row : row + 1, :, begin : begin + length] for side in sides)
    positions = torch.arange(length)
    query, rotated = (turned(side, positions, frequency, length) for side in (query, key))
    asked = query[:, :, queries.start : queries.stop]
    output = attend(asked, rotated, value, pattern & Causal(), queries=queries, kernel="reference")
    # A key is off by a 254th of its largest number before it is turned, or after.
    largest = max(float(key.abs().max()), float(rotated.abs().max())) * math.sqrt(2) * frequency.scale()
    score = asked.abs().sum(-1, keepdim=True) * largest / 254 * WIDTH**-0.5
    return output, float(value.abs().max()) * (1 / 254 + torch.expm1(2 * score))


def check(found, wanted, allowed, storage, name):
    if storage == "int8":
        assert ((found - wanted).abs() <= allowed).all() and not found.equal(wanted), name
    else:
        torch.testing.assert_close(found, wanted, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("frequency", FREQUENCIES.values(), ids=FREQUENCIES)
@pytest.mark.parametrize("storage", STORAGES)
def test_decoding_equals_recomputing(storage, frequency):
    sides = text(max(PROMPTS) + NEW)
    for pattern in PATTERNS:
        found = decoded(sides, pattern, frequency, STORAGES[storage](), NEW, block=6)
        for row, prompt in enumerate(PROMPTS):
            mine = found[row : row + 1, :, max(PROMPTS) - prompt :]
            # Angles that do not change can be those of the whole text; else every step is recomputed.
            steps = [range(prompt), *(range(t, t + 1) for t in range(prompt, prompt + NEW))]
            for queries in steps if frequency.varies else [range(prompt + NEW)]:
                wanted, allowed = recomputed(sides, pattern, frequency, row, queries.stop, queries)
                here = mine[:, :, queries.start : queries.stop]
                check(here, wanted, allowed, storage, f"{pattern}, row {row}, {queries}")


@pytest.mark.parametrize("storage", STORAGES)
def test_three_hundred_tokens(storage):
    pattern, frequency, new = PATTERNS[-1], YaRN(4.0, original=100), 300
    sides = text(max(PROMPTS) + new)
    found = decoded(sides, pattern, frequency, STORAGES[storage](), new)
    for row, prompt in enumerate(PROMPTS):
        wanted, allowed = recomputed(sides, pattern, frequency, row, prompt + new, range(prompt + new))
        check(found[row : row + 1, :, max(PROMPTS) - prompt :], wanted, allowed, storage, f"row {row}")
