"""Changes of scores beside the pattern: ALiBi, learned sinks and soft-capping, in both kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product

import oracle
import pytest
import torch

from longspan import attend, attend_with_lse
from longspan.derive.mask import counts
from longspan.errors import PlanError, ShapeError
from longspan.kernel import heads as heads_module
from longspan.kernel import sides
from longspan.kernel.lattice.parts import parts
from longspan.kernel.sdpa import bias, sdpa
from longspan.pattern import (
    Causal,
    Chunk,
    Dilated,
    Every,
    Longformer,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Window,
)
from longspan.score import ALiBi, Sinks, SoftCap, collect

HEADS, KEY_HEADS, WIDTH = 4, 2, 12
PATTERNS = [
    Causal(),
    SlidingWindow(9),
    Streaming(9),
    LongMixed(9),
    LongNet((8, 32), (1, 4)),
    Longformer(9, causal=False, global_tokens=3),
    ~Nothing(),
    ~Causal(),
    Causal().T & Dilated(3),
    (Causal() & Window(20)) + Chunk(30),
    Every(5),
    Nothing(),
    PerHead([SlidingWindow(9), ~Causal(), Nothing(), Causal()]),
]
ALIBI, STEEP = ALiBi(), ALiBi((3.0, -0.01, 0.0, 0.5))
LOGITS = torch.tensor([0.5, -1.0, 4.0, -math.inf], dtype=torch.float64)


@pytest.fixture(params=["large", "small"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run with blocks as they are and with small ones, of which a short text holds many."""
    if request.param == "small":
        monkeypatch.setattr(heads_module, "parts", partial(parts, size=8))
        monkeypatch.setattr(sides, "TRIANGLE", 16)
        monkeypatch.setattr(sdpa, "WORKSPACE", 4096)
    for cached in (heads_module.head_groups, sides.one_sided_groups):
        cached.cache_clear()
    yield request.param
    for cached in (heads_module.head_groups, sides.one_sided_groups):
        cached.cache_clear()


def tensors(rows: int, keys: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + keys)
    shapes = (rows, HEADS), (keys, KEY_HEADS), (keys, KEY_HEADS)
    return [
        torch.randn(batch, length, heads, WIDTH, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        for length, heads in shapes
    ]


def formula(
    given: list[torch.Tensor],
    pattern: Pattern,
    queries: range,
    *,
    slopes: tuple[float, ...] | None = None,
    logits: torch.Tensor | None = None,
    limit: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of the definition over whole matrices, in the precision given: weights, then their total."""
    query, key, value = given
    key, value = (side.repeat_interleave(HEADS // KEY_HEADS, dim=1) for side in (key, value))
    often = counts(pattern, queries=queries, keys=range(key.shape[2]), heads=HEADS)
    scores = query @ key.mT / WIDTH**0.5
    if limit is not None:
        scores = limit * (scores / limit).tanh()
    if slopes is not None:
        q, k = torch.tensor(queries).view(-1, 1), torch.arange(key.shape[2])
        scores = scores - torch.stack([slope * (q - k).abs().to(scores.dtype) for slope in slopes])
    scores = scores.masked_fill(often == 0, -math.inf)
    sink = torch.full((HEADS,), -math.inf).to(scores) if logits is None else logits.to(scores)
    peak = torch.maximum(scores.detach().amax(-1), sink.detach()[:, None])
    empty = peak.isneginf()
    peak = peak.masked_fill(empty, 0.0)
    weights = often.to(scores.dtype) * (scores - peak.unsqueeze(-1)).exp()
    total = weights.sum(-1) + (sink[:, None] - peak).exp()
    lse = (peak + total.masked_fill(empty, 1.0).log()).masked_fill(empty, -math.inf)
    return (weights / total.masked_fill(empty, 1.0).unsqueeze(-1)) @ value, lse


def check(
    kernel: str,
    pattern: Pattern,
    given: list[torch.Tensor],
    queries: range | None = None,
    *,
    alibi: ALiBi | None = None,
    logits: torch.Tensor | None = None,
    limit: float | None = None,
) -> None:
    """Hold output, log-sum-exp and the gradients, those for the sinks too, to the formula."""
    dtype, keys = given[0].dtype, given[1].shape[2]
    where = range(keys - given[0].shape[2], keys) if queries is None else queries
    slopes = None if alibi is None else alibi.of(HEADS)
    generator = torch.Generator().manual_seed(7)
    into = torch.randn(given[0].shape, generator=generator, dtype=torch.float64).to(dtype).double()
    into_lse = torch.randn(into.shape[:-1], generator=generator, dtype=torch.float64).to(dtype).double()
    asked = f"{kernel} {pattern} {list(given[0].shape)} {dtype}, {keys} keys, {alibi}, {logits}, {limit}"

    def graded(sides, sink, act):
        leaves = [side.detach().requires_grad_() for side in sides]
        sink = None if sink is None else sink.detach().requires_grad_()
        output, lse = act(leaves, sink)
        loss = (output * into.to(output.dtype)).sum()
        loss = loss + (lse * into_lse.to(lse.dtype))[lse.isfinite()].sum()
        wanted = leaves if sink is None else [*leaves, sink]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        return output, lse, *(torch.zeros(1) if grad is None else grad for grad in gradients)

    def dense(leaves, sink):
        return formula(leaves, pattern, where, slopes=slopes, logits=sink, limit=limit)

    def ours(leaves, sink):
        scores = [part for part in (alibi, limit and SoftCap(limit)) if part]
        scores += [] if sink is None else [Sinks(sink)]
        return attend_with_lse(*leaves, pattern, queries=queries, scores=scores, kernel=kernel)

    low = None if logits is None else logits.to(dtype)
    truth = graded([side.double() for side in given], None if low is None else low.double(), dense)
    plain, got = graded(given, low, dense), graded(given, low, ours)
    names = ("output", "lse", "query", "key", "value", "sinks")
    for name, one, ordinary, right in zip(names, got, plain, truth, strict=False):
        oracle.within_budget(one, ordinary, right, f"{name} of {asked}", lse=truth[1])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sdpa_is_the_formula(pattern: Pattern, blocks: str):
    for length, changes in product((1, 2, 97), ({"alibi": ALIBI}, {"alibi": STEEP, "logits": LOGITS})):
        check("sdpa", pattern, tensors(length, length), **changes)
    check("sdpa", pattern, tensors(31, 31), logits=LOGITS)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_reference_is_the_formula(pattern: Pattern):
    for limit in (None, 0.7):
        check("reference", pattern, tensors(31, 31), alibi=STEEP, logits=LOGITS, limit=limit)
    check("reference", pattern, tensors(31, 31), limit=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("pattern", [Causal(), Longformer(9, causal=False), LongMixed(9)], ids=str)
def test_low_precision_keeps_its_budget(pattern: Pattern, kernel: str, dtype: torch.dtype):
    check(kernel, pattern, tensors(129, 129, dtype), alibi=ALIBI, logits=LOGITS)
    if kernel == "reference":
        check(kernel, pattern, tensors(129, 129, dtype), logits=LOGITS, limit=1.0)


@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(300), Streaming(100)], ids=str)
def test_steep_slopes_lose_nothing_on_long_texts(pattern: Pattern):
    """Distances of 1000 at a slope of 3 are far beyond what a float32 beside a score can hold."""
    check("sdpa", pattern, tensors(1000, 1000, torch.float32, batch=1), alibi=STEEP)


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (range(96, 97), 97),
        (range(20, 50), 97),
        (range(100, 131), 50),
        (range(2, 97, 3), 97),
        (range(5, 5), 31),
    ],
    ids=str,
)
@pytest.mark.parametrize("pattern", [Causal(), LongMixed(9), Window(20), Dilated(3)], ids=str)
def test_distance_is_between_positions(pattern: Pattern, queries: range, keys: int, kernel: str, blocks: str):
    check(kernel, pattern, tensors(len(queries), keys), queries, alibi=STEEP, logits=LOGITS)


def test_sdpa_refuses_soft_capping():
    given = tensors(9, 9, torch.float32)
    with pytest.raises(PlanError) as raised:
        attend(*given, Causal(), scores=SoftCap(50.0), kernel="sdpa")
    assert "sdpa  cannot cap scores softly: the flash attention that it calls has no tanh" in str(
        raised.value
    )
    assert torch.equal(
        attend(*given, Causal(), scores=SoftCap(50.0)),
        attend(*given, Causal(), scores=SoftCap(50.0), kernel="reference"),
    )


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_a_query_without_keys_reads_its_sink_alone(kernel: str):
    given = tensors(9, 9)
    output, lse = attend_with_lse(*given, Nothing(), scores=Sinks(LOGITS), kernel=kernel)
    assert not output.any()
    assert torch.equal(lse, LOGITS[:, None].expand(2, HEADS, 9))


def test_slopes_are_those_of_the_checkpoints():
    assert ALiBi().of(8) == tuple(2.0**-number for number in range(1, 9))
    twelve = ALiBi().of(12)
    assert twelve[:8] == ALiBi().of(8)
    assert twelve[8:] == pytest.approx((0.7071, 0.3536, 0.1768, 0.0884), abs=1e-4)
    assert ALiBi().of(1) == (2.0**-8,)


def test_slopes_are_those_of_bloom():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 2, 3, 7, 12, 16, 20, 71):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1]
        assert ALiBi().of(heads) == pytest.approx(theirs.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ("alibi", "`scores` takes ALiBi, Sinks or SoftCap, got str."),
        (["alibi"], "`scores` takes ALiBi, Sinks or SoftCap, got str."),
        ([ALiBi(), ALiBi()], "`scores` holds ALiBi twice."),
        (ALiBi((1.0, 2.0)), "ALiBi has 2 slopes for 4 heads."),
        (Sinks(torch.zeros(3)), "Sinks have logits [3] for 4 heads."),
        (
            Sinks(torch.zeros(4, dtype=torch.int64)),
            "The logits of sinks are a tensor of floating-point numbers.",
        ),
    ],
    ids=str,
)
def test_what_is_not_a_change_of_scores(scores: object, problem: str):
    with pytest.raises(ShapeError) as raised:
        attend(*tensors(9, 9), Causal(), scores=scores)
    assert (
        str(raised.value)
        == f"""{problem}
  heads  4
  try    scores=ALiBi(), or scores=[SoftCap(50.0), Sinks(torch.zeros(4))]"""
    )


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (
            lambda: SoftCap(0.0),
            "A limit of scores is above 0.\n  asked  SoftCap(limit=0.0)\n  try    SoftCap(50.0)",
        ),
        (
            lambda: ALiBi((1.0, math.nan)),
            "The slopes of ALiBi are finite numbers.\n  asked  (1.0, nan)\n  try    ALiBi()",
        ),
    ],
)
def test_numbers_that_are_none(act, text: str):
    with pytest.raises(ShapeError) as raised:
        act()
    assert str(raised.value) == text


def test_changes_are_collected_in_any_order():
    one = collect([SoftCap(5), ALiBi(), Sinks(LOGITS)], 4)
    other = collect((Sinks(LOGITS), ALiBi(), SoftCap(5)), 4)
    assert (one.limit, one.slopes) == (other.limit, other.slopes) == (5.0, ALiBi().of(4))
    assert one.sinks is other.sinks is LOGITS


def test_biases_are_kept_in_bounded_memory(monkeypatch: pytest.MonkeyPatch):
    shelf = bias._Shelf()
    monkeypatch.setattr(bias, "_shelf", shelf)
    monkeypatch.setattr(bias, "KEPT", 400_000)
    given = tensors(97, 97, torch.float32)
    for width in (5, 9, 13, 17):
        first = attend(*given, SlidingWindow(width), scores=ALIBI)
        assert 0 < shelf.bytes <= 400_000
        assert shelf.bytes == sum(held.bytes for held in shelf.held.values())
        before = [id(held) for held in shelf.held.values()]
        assert torch.equal(first, attend(*given, SlidingWindow(width), scores=ALIBI))
        assert before == [id(held) for held in shelf.held.values()]
