"""NaN and infinity stay with the pairs that are read: one row of garbage is no one else's garbage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from longspan import attend, attend_with_lse
from longspan.derive.mask import mask
from longspan.kernel import heads as heads_module
from longspan.kernel.lattice.parts import parts
from longspan.kernel.native import native
from longspan.kernel.sdpa import sdpa
from longspan.kernel.softmax import frame
from longspan.pattern import Causal, LongNet, Nothing, Pattern, PerHead, Sink, SlidingWindow, Streaming
from longspan.score import ALiBi, Sinks

# Those that have gradients on cpu.
KERNELS = "native", "sdpa", "reference"
BRIEF = "native, bfloat16"
LENGTH, HEADS, KEY_HEADS, WIDTH = 31, 4, 2, 8
PATTERNS = [
    SlidingWindow(7),
    Streaming(5),
    LongNet((8, 32), (1, 4)),
    PerHead([Nothing(), ~Causal(), SlidingWindow(3), Causal()]),
]


@pytest.fixture(params=["large", "small"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "small":
        monkeypatch.setattr(heads_module, "parts", partial(parts, size=8))
        monkeypatch.setattr(sdpa, "WORKSPACE", 4096)
    heads_module.head_groups.cache_clear()
    yield
    heads_module.head_groups.cache_clear()


def precision(kernel: str) -> tuple[torch.dtype, float]:
    """Return the finest dtype of a kernel and how near its results come to others, or skip it."""
    if not kernel.startswith("native"):
        return torch.float64, 1e-10
    if native.MISSING:
        pytest.skip(f"native {native.MISSING}")
    return (torch.bfloat16, 0.05) if kernel == BRIEF else (torch.float32, 1e-5)


def sides(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return query, key, value, and what flows back into output and log-sum-exp."""
    generator = torch.Generator().manual_seed(5)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    made = [torch.randn(2, h, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for h in heads]
    made.append(torch.randn(2, HEADS, LENGTH, generator=generator, dtype=torch.float64))
    return [side.to(dtype) for side in made]


def graded(given: list[torch.Tensor], pattern: Pattern, kernel: str, scores=()) -> list[torch.Tensor]:
    leaves = [side.detach().requires_grad_() for side in given[:3]]
    output, lse = attend_with_lse(*leaves, pattern, kernel=kernel.split(",")[0], scores=scores)
    return [output, lse, *torch.autograd.grad([output, lse], leaves, [given[3], given[4].to(lse.dtype)])]


# What is spoiled, and by what; places are (batch, head, position).
SPOILED = {
    "query": (0, math.nan),
    "query infinite": (0, math.inf),
    "query infinite below": (0, -math.inf),
    "key": (1, math.nan),
    "value": (2, math.nan),
    "value infinite": (2, math.inf),
    "gradient": (3, math.nan),
    "gradient infinite": (3, -math.inf),
    "gradient of the log-sum-exp": (4, math.nan),
    "gradient of the log-sum-exp infinite": (4, math.inf),
}


@pytest.mark.parametrize("kernel", [*KERNELS, BRIEF])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("scores", [(), (ALiBi(), Sinks(torch.ones(HEADS)))], ids=["plain", "changed"])
def test_nothing_reaches_what_does_not_read_it(pattern: Pattern, scores: tuple, kernel: str):
    if kernel.startswith("native") and scores:
        scores = scores[1:]
    dtype, near = precision(kernel)
    read = mask(pattern, length=LENGTH, heads=HEADS).expand(2, -1, -1, -1)
    for side, worst in SPOILED.values():
        given = sides(dtype)
        spoiled = [torch.zeros(tensor.shape[:3], dtype=torch.bool) for tensor in given]
        for place in ((0, 1, 12), (1, 0, LENGTH - 1), (1, 1, 3)):
            spoiled[side][place] = True
        clean = [
            tensor.masked_fill(where.view(*where.shape, *[1] * (tensor.dim() - 3)), 0.0)
            for tensor, where in zip(given, spoiled, strict=True)
        ]
        for place in spoiled[side].nonzero().tolist():
            given[side][tuple(place)].view(-1)[0] = worst
        keys = (spoiled[1] | spoiled[2]).repeat_interleave(HEADS // KEY_HEADS, dim=1)
        reads = read.any(-1)
        struck = (spoiled[0] | (read & keys.unsqueeze(-2)).any(-1)) & reads
        back = (struck | spoiled[3] | spoiled[4]) & reads
        touched = (read & back.unsqueeze(-1)).any(-2).unflatten(1, (KEY_HEADS, -1)).any(2)
        # What is not struck is as if the rows that are struck sent nothing back.
        clean[3] = clean[3].masked_fill(back.unsqueeze(-1), 0.0)
        clean[4] = clean[4].masked_fill(back, 0.0)
        truth, got = graded(clean, pattern, kernel, scores), graded(given, pattern, kernel, scores)
        expected = (struck, struck, back, touched, touched)
        for name, one, right, where in zip(
            ("output", "lse", "query", "key", "value"), got, truth, expected, strict=True
        ):
            assert one[where].isnan().all(), f"{name}: a number where NaN was read"
            torch.testing.assert_close(one[~where], right[~where], rtol=0, atol=near, msg=name)


INFINITE = 12


def _key(at: int) -> Pattern:
    """Return the pattern that reads one key."""
    return Sink(at + 1) & ~Sink(at)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "pattern",
    [
        Causal() & ~SlidingWindow(3),
        Causal() & _key(INFINITE),
        _key(INFINITE) | SlidingWindow(3),
        Causal() & (_key(INFINITE) + Sink(INFINITE)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_key_weighs_nothing_or_is_no_number(sign: int, pattern: Pattern, kernel: str):
    """Scores of infinity are NaN; those of minus infinity weigh 0, also where a query has no others."""
    dtype, near = precision(kernel)
    given = sides(dtype)
    # All queries of a head are on one side of the key.
    given[0] = given[0].abs() + 0.1
    given[1][:, :, INFINITE, 3] = sign * math.inf
    reads = mask(pattern, length=LENGTH)[:, INFINITE]
    got = graded(given, pattern, kernel)
    output, right = attend_with_lse(*given[:3], pattern & ~_key(INFINITE), kernel="sdpa")
    struck, lse = got[0].isnan().any(-1), got[1]
    assert not struck[..., ~reads].any() and torch.equal(struck, lse.isnan())
    assert struck[..., reads].all() if sign > 0 else not struck.any()
    torch.testing.assert_close(lse[~struck], right[~struck], rtol=0, atol=near)
    torch.testing.assert_close(got[0][~struck], output[~struck], rtol=0, atol=near)
    # 0 times infinity is no number, whichever way the output went.
    touched = mask(pattern, length=LENGTH)[reads].any(0)
    for grad, where in zip(got[2:], (reads, touched, touched), strict=True):
        assert torch.equal(grad.isnan().any(-1), where.expand(grad.shape[:-1]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cache_filled_with_garbage_behind_the_text(kernel: str):
    """A cache of fixed size holds memory that nobody wrote; no query reads it."""
    dtype, near = precision(kernel)
    query, key, value = sides(dtype)[:3]
    full = [torch.cat([side, torch.full_like(side, math.nan)], dim=2) for side in (key, value)]
    output = attend(query, *full, Causal(), queries=range(LENGTH), kernel=kernel)
    torch.testing.assert_close(output, attend(query, key, value, Causal()), rtol=0, atol=max(near, 1e-12))


def test_large_numbers_are_left_as_they_are():
    """A sum that overflows does not mean that anything in it is not finite."""
    query, key, value = (side.float() for side in sides()[:3])
    large = torch.full_like(value, 1e37)
    output = attend(query, key, large, SlidingWindow(7))
    torch.testing.assert_close(output, torch.full_like(output, 1e37))


def test_finite_tensors_are_looked_at_once(monkeypatch: pytest.MonkeyPatch):
    def refuse(*given: object) -> None:
        raise AssertionError("finite tensors were searched for NaN")

    monkeypatch.setattr(frame, "spoiled", refuse)
    graded(sides(), SlidingWindow(7), "sdpa")
