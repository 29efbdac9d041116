"""One matrix: every kernel, on every pattern, in every dtype, forward, log-sum-exp and backward.

The truth is the dense formula in float64 on the same numbers; the budget is twice the error that the plain
dense computation makes in the dtype of the tensors.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from functools import partial

import oracle
import pytest
import torch
from strategies import LENGTHS

import longspan.pattern
from longspan import attend, attend_with_lse
from longspan.derive.mask import counts
from longspan.kernel import heads as heads_module
from longspan.kernel import plan as plan_module
from longspan.kernel.flash import flash
from longspan.kernel.flex import flex
from longspan.kernel.lattice.parts import parts
from longspan.kernel.native import native
from longspan.kernel.plan import KERNELS
from longspan.kernel.sdpa import sdpa
from longspan.kernel.softmax.merge import merge
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Chunk,
    Dilated,
    Every,
    Intersection,
    Longformer,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    PerHead,
    Sink,
    SlidingWindow,
    Streaming,
    Sum,
    Union,
    Window,
)
from longspan.score import Scores

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BATCH, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 12


def exported() -> Iterator[Pattern]:
    """Yield one of every pattern that is exported, so that a new one is tested by existing.

    Sizes without a default are set to 9, and a list of patterns to two.
    """
    operators = {kind for kind in Pattern.__subclasses__() if kind is not PerHead}
    for name in sorted(set(longspan.pattern.__all__)):
        kind = getattr(longspan.pattern, name)
        if inspect.isclass(kind) and issubclass(kind, Pattern) and kind not in {Pattern, *operators}:
            required = [field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
            two = [Causal() & Window(5), Chunk(7)]
            yield kind(*(two if field.name == "parts" else 9 for field in required))


COMPOSED = [
    Causal() & (Window(20) | Sink(3)),
    (Causal() & Window(20)) + (Causal() & Dilated(4)),
    (Causal() & Window(9)) + (Causal() & Window(9)) + Sink(1),
    Window(30) - Chunk(8),
    ~Causal(),
    (Causal() & Chunk(11)).T,
    Every(3).T & Causal(),
    Causal() | Longformer(3, causal=False, global_tokens=4),
    LongNet((8, 32), (1, 4)),
    LongNet((7, 21), (1, 3), causal=False),
    SCCA(8, flow=4),
    SDA(rows="selected"),
    PerHead([SlidingWindow(9), Causal(), Nothing(), LongNet((4, 16), (1, 2))]),
    PerHead([Streaming(5) + Chunk(30), S2(16)]),
]
PATTERNS = [*exported(), *COMPOSED]


@pytest.fixture(params=["large", "small"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run with blocks as they are and with small ones, of which a short text holds many."""
    if request.param == "small":
        monkeypatch.setattr(heads_module, "parts", partial(parts, size=8))
        monkeypatch.setattr(sdpa, "WORKSPACE", 4096)
    heads_module.head_groups.cache_clear()
    yield request.param
    heads_module.head_groups.cache_clear()


def tensors(
    rows: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    heads: int = HEADS,
    key_heads: int = KEY_HEADS,
    batch: int = BATCH,
    width: int = WIDTH,
) -> list[torch.Tensor]:
    """Return query, key and value as a model gives them: transposed, with the heads inside the length."""
    generator = torch.Generator().manual_seed(rows * 1000 + keys)
    shapes = [(batch, rows, heads, width), (batch, keys, key_heads, width), (batch, keys, key_heads, width)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(device, dtype).transpose(1, 2) for tensor in made]


def check(pattern: Pattern, given: list[torch.Tensor], kernel: str, *, queries: range | None = None) -> None:
    """Hold output, log-sum-exp and the three gradients, through both, to their budgets."""
    query, keys = given[0], given[1].shape[2]
    rows = query.shape[2]
    where = range(keys - rows, keys) if queries is None else queries
    if kernel == "flash" and plan_module.flash_refusal(
        pattern, query.shape[1], where, range(keys), asked=True
    ):
        # Not in bands; what is, is told apart in test_kernel_flash.py.
        return
    often = counts(pattern, queries=where, keys=range(keys), heads=query.shape[1])
    scale = query.shape[-1] ** -0.5
    exact = [tensor.detach().double().cpu() for tensor in given]
    asked = f"attend {list(query.shape)} {query.dtype} by {kernel}, keys {keys}, queries {queries}, {pattern}"

    leaves = [tensor.detach().requires_grad_() for tensor in given]
    output, lse = attend_with_lse(*leaves, pattern, queries=queries, kernel=kernel)
    assert output.dtype == query.dtype
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    truth, plain = oracle.dense(*exact, often, scale=scale), oracle.dense(*given, often, scale=scale)
    oracle.within_budget(output, plain[0], truth[0], f"output of {asked}", lse=truth[1])
    oracle.within_budget(lse, plain[1], truth[1], f"lse of {asked}")

    generator = torch.Generator().manual_seed(7)
    into = [
        torch.randn(part.shape, generator=generator, dtype=torch.float64).to(query.dtype).double()
        for part in truth
    ]
    expected = oracle.gradients(*exact, often, *into, scale=scale)
    low = [part.to(query.device, query.dtype) for part in into]
    ordinary = oracle.gradients(*given, often, *low, scale=scale)
    loss = (output * low[0]).sum() + (lse * low[1].to(lse.dtype))[lse.isfinite()].sum()
    gradients = torch.autograd.grad(loss, leaves)
    for name, *results in zip(("query", "key", "value"), gradients, ordinary, expected, strict=True):
        assert results[0].dtype == query.dtype
        oracle.within_budget(*results, f"gradient for {name} of {asked}", lse=truth[1])


def finest(kernel: str) -> torch.dtype:
    """Return the dtype in which a kernel makes the smallest errors."""
    return torch.float32 if kernel == "native" else torch.float64


def able(kernel: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Skip what a kernel cannot do; test_kernel_flex.py and test_kernel_flash.py have theirs on cpu and on cuda."""
    dtype = dtype or finest(kernel)
    probe = torch.zeros(1, 1, 1, 8, device=device, dtype=dtype, requires_grad=True)
    if kernel == "sdpa" and (why := sdpa.refusal(probe, Scores())):
        pytest.skip(f"sdpa {why}")
    if kernel == "native" and (why := native.refusal(probe, Scores(), asked=True)):
        pytest.skip(f"native {why}")
    if kernel == "flash" and (why := flash.refusal(probe, probe, Scores())):
        pytest.skip(f"flash {why}")
    if kernel == "flex" and (why := flex.refusal([probe], Causal(), Scores(), asked=True)):
        pytest.skip(f"flex {why}")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_keep_to_the_formula(
    kernel: str, dtype: torch.dtype, pattern: Pattern, blocks: str, device: torch.device
):
    able(kernel, device, dtype)
    # Small blocks are about pairs, which float64 settles; in low precision the longest text has most merges.
    # With a single key a gradient is the difference of equal numbers, in low precision nothing but rounding.
    lengths = LENGTHS if dtype == torch.float64 else LENGTHS[1:] if blocks == "large" else LENGTHS[-1:]
    for length in lengths:
        check(pattern, tensors(length, length, dtype, device), kernel)


@pytest.mark.parametrize(
    "pattern",
    [LongMixed(128), Streaming(100), LongNet((64, 256), (1, 4)), Causal(), Longformer(50, causal=False)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kernel", ["native", "sdpa"])
def test_long_texts_keep_to_the_formula(
    kernel: str, pattern: Pattern, dtype: torch.dtype, device: torch.device
):
    able(kernel, device, dtype)
    check(pattern, tensors(1000, 1000, dtype, device, batch=1, key_heads=1), kernel)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (12, 4), (12, 12)], ids=str)
@pytest.mark.parametrize(
    "pattern", [SlidingWindow(9), LongMixed(9), LongNet((8, 32), (1, 4)), SDA()], ids=str
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_key_heads_are_shared_by_neighbours(
    kernel: str, pattern: Pattern, heads: tuple[int, int], blocks: str, device: torch.device
):
    able(kernel, device)
    given = tensors(97, 97, finest(kernel), device, heads=heads[0], key_heads=heads[1])
    check(pattern, given, kernel)


RANGES = {
    "decoding step": (range(96, 97), 97),
    "first token": (range(0, 1), 1),
    "prefill chunk": (range(40, 71), 71),
    "chunk with keys after it": (range(20, 50), 97),
    "queries after all keys": (range(100, 131), 50),
    "every third query": (range(2, 97, 3), 97),
    "nothing to read": (range(0, 9), 1),
    "no queries": (range(5, 5), 31),
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_stand_where_they_are_said_to(
    kernel: str, pattern: Pattern, blocks: str, device: torch.device
):
    able(kernel, device)
    for queries, keys in RANGES.values():
        if keys == 1 and finest(kernel) != torch.float64:
            # A gradient would be the difference of equal numbers, nothing but rounding.
            continue
        check(pattern, tensors(len(queries), keys, finest(kernel), device), kernel, queries=queries)


@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_are_the_last_positions_unless_said_otherwise(kernel: str, device: torch.device):
    able(kernel, device)
    given = tensors(5, 31, finest(kernel), device)
    check(Causal() & Window(7), given, kernel)
    said = attend(*given, Causal() & Window(7), queries=range(26, 31), kernel=kernel)
    assert torch.equal(said, attend(*given, Causal() & Window(7), kernel=kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "pattern", [Causal() & Window(20), LongNet((8, 32), (1, 4)), Sink(3) + Causal()], ids=str
)
def test_law_of_the_merge(pattern: Pattern, kernel: str, blocks: str, device: torch.device):
    """Attention over a sum is the merge of attentions over its terms, gradients included."""
    able(kernel, device)
    other = Causal() & Dilated(3)
    given = tensors(97, 97, finest(kernel), device)
    whole, apart = ([tensor.detach().requires_grad_() for tensor in given] for _ in range(2))
    truth = attend_with_lse(*whole, pattern + other, kernel=kernel)
    merged = merge([attend_with_lse(*apart, part, kernel=kernel) for part in (pattern, other)])
    into = [torch.randn_like(part) for part in truth]
    results = [
        (
            *pair,
            *torch.autograd.grad(
                sum((part * flow).sum() for part, flow in zip(pair, into, strict=True)), leaves
            ),
        )
        for pair, leaves in ((merged, apart), (truth, whole))
    ]
    for got, right in zip(*results, strict=True):
        oracle.within_budget(got, got, right.detach().cpu())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", [Causal(), Causal() & Window(9)], ids=str)
@pytest.mark.parametrize("scale", [0.05, 2.0, 0.0, -0.3])
def test_scale_is_the_one_given(scale: float, pattern: Pattern, kernel: str, device: torch.device):
    able(kernel, device)
    given = tensors(31, 31, finest(kernel), device)
    often = counts(pattern, length=31, heads=HEADS)
    plain, truth = (
        oracle.dense(*sides, often, scale=scale)[0]
        for sides in ([side.cpu() for side in given], [side.cpu().double() for side in given])
    )
    oracle.within_budget(attend(*given, pattern, scale=scale, kernel=kernel), plain, truth)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", [Nothing(), Sink(2).T, Causal() - Window(20)], ids=str)
def test_queries_that_read_nothing_give_zero_and_no_gradient(
    pattern: Pattern, kernel: str, device: torch.device
):
    """Whatever flows into the log-sum-exp of an empty row, nothing comes out of it."""
    able(kernel, device, torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors(31, 31, torch.float32, device)]
    output, lse = attend_with_lse(*leaves, pattern, kernel=kernel)
    empty = ~counts(pattern, length=31, heads=HEADS).any(-1)
    assert empty.any()
    assert not output[:, empty].any()
    assert (lse[:, empty] == -torch.inf).all()
    gradients = torch.autograd.grad([output, lse], leaves, [torch.ones_like(output), torch.ones_like(lse)])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, empty].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["transposed", "contiguous", "reversed width", "expanded batch", "sliced"])
def test_any_layout_in_memory_gives_the_same(layout: str, kernel: str, device: torch.device):
    able(kernel, device)
    given = tensors(31, 31, finest(kernel), device)
    if layout == "contiguous":
        given = [side.contiguous() for side in given]
    elif layout == "reversed width":
        given = [side.transpose(-1, -2).contiguous().transpose(-1, -2) for side in given]
    elif layout == "expanded batch":
        given = [side[:1].expand(3, -1, -1, -1) for side in given]
    elif layout == "sliced":
        given = [torch.cat([side, side], dim=-1)[..., 3 : 3 + WIDTH] for side in given]
    check(LongMixed(9), given, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str
)
def test_gradients_are_given_for_what_wants_them(wanted: tuple[bool, ...], kernel: str, device: torch.device):
    able(kernel, device)
    given = tensors(31, 31, finest(kernel), device)
    all_leaves = [side.detach().requires_grad_() for side in given]
    some_leaves = [side.detach().requires_grad_(want) for side, want in zip(given, wanted, strict=True)]
    whole = torch.autograd.grad(attend(*all_leaves, LongMixed(9), kernel=kernel).sum(), all_leaves)
    attend(*some_leaves, LongMixed(9), kernel=kernel).sum().backward()
    for leaf, right, want in zip(some_leaves, whole, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, right, rtol=0, atol=1e-12)


def test_values_may_be_wider_than_keys(device: torch.device):
    query, key, value = tensors(31, 31, torch.float64, device)
    wide = torch.cat([value, -value], dim=-1)
    output = attend(query, key, wide, Causal() & Window(9))
    narrow = attend(query, key, value, Causal() & Window(9))
    torch.testing.assert_close(output, torch.cat([narrow, -narrow], dim=-1), rtol=0, atol=1e-12)


def test_operators_are_in_the_matrix():
    """The composed patterns hold every way of joining two, in some head."""
    joined = {
        type(part)
        for pattern in COMPOSED
        for head in range(HEADS)
        for part in (pattern.at_head(head, HEADS), *pattern.at_head(head, HEADS).operands)
    }
    assert {Intersection, Union, Sum} <= joined


@pytest.mark.parametrize("kernel", ["native", "sdpa", "reference"])
def test_autocast_takes_tensors_of_two_dtypes(kernel: str):
    """Rotated queries and keys come in float32 beside values in bfloat16."""
    able(kernel, torch.device("cpu"))
    query, key, value = tensors(31, 31, torch.float32, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key, value.to(torch.bfloat16), LongMixed(9), kernel=kernel)
    low = [side.to(torch.bfloat16) for side in (query, key, value)]
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, attend(*low, LongMixed(9), kernel=kernel))


@pytest.mark.parametrize("kernel", ["native", "sdpa"])
def test_second_derivatives_are_refused(kernel: str):
    """Silence would be a wrong number: these kernels have first derivatives only."""
    able(kernel, torch.device("cpu"))
    leaves = [side.requires_grad_() for side in tensors(9, 9, finest(kernel), torch.device("cpu"))]
    output = attend(*leaves, Causal(), kernel=kernel)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
