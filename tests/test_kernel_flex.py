"""The flex kernel: the numbers of the reference, from block lists read as a compiled kernel reads them.

FlexAttention's own definition looks at all pairs and at no list, and has no backward on cpu. So most tests put a
stand-in in its place that computes what the lists say and nothing else, with gradients; some run the real one.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from flex_stand_in import blockwise
from test_kernel_matrix import COMPOSED, PATTERNS, RANGES, check, tensors
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from longspan import attend, attend_with_lse
from longspan.derive.mask import counts
from longspan.kernel import reference
from longspan.kernel.flex import family, flex
from longspan.kernel.softmax import finite
from longspan.pattern import (
    S2,
    Causal,
    Chunk,
    Dilated,
    Documents,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Window,
)
from longspan.score import ALiBi, Scores, Sinks, SoftCap

HEADS = 4
PLAIN = Scores()
FEW = [
    SlidingWindow(9),
    LongMixed(9),
    LongNet((8, 32), (1, 4)),
    Documents((20, 11)) & Causal(),
    PerHead([SlidingWindow(9), Causal(), Nothing(), LongNet((4, 16), (1, 2))]),
]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex.flex, "flex_attention", blockwise)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of which a short text holds many."""
    monkeypatch.setattr(family, "BLOCK", 8)
    for cached in (family.groups, family._piece):
        cached.cache_clear()
    yield
    for cached in (family.groups, family._piece):
        cached.cache_clear()


def graded(kernel: Any, given: list, pattern: Pattern, queries: range, changes: Scores, into: list) -> list:
    """Return output, log-sum-exp and gradients, those for sinks too."""
    leaves = [side.detach().requires_grad_() for side in given]
    sinks = None if changes.sinks is None else changes.sinks.detach().requires_grad_()
    changes = Scores(changes.limit, changes.slopes, sinks)
    output, lse = kernel.attend(*leaves, pattern, queries=queries, scale=0.3, changes=changes)
    wanted = leaves if sinks is None else [*leaves, sinks]
    found = torch.autograd.grad([output, lse], wanted, [part.to(output.dtype) for part in into])
    return [output, lse, *found]


def compare(pattern: Pattern, queries: range, keys: int, changes: Scores = PLAIN) -> None:
    given = tensors(len(queries), keys, torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    into = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (given[0].shape, given[0].shape[:3])
    ]
    truth = graded(reference, given, pattern, queries, changes, into)
    got = graded(flex, given, pattern, queries, changes, into)
    for name, one, right in zip(
        ("output", "lse", "query", "key", "value", "sinks"), got, truth, strict=False
    ):
        torch.testing.assert_close(
            one,
            right,
            rtol=0,
            atol=1e-9,
            msg=lambda text, name=name: f"{name} of {pattern}, {queries}: {text}",
        )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_small_blocks_and_gradients(pattern: Pattern, small: None, stand_in: None):
    for length in (1, 97):
        compare(pattern, range(length), length)


@pytest.mark.parametrize("pattern", COMPOSED, ids=str)
def test_blocks_as_they_are(pattern: Pattern, stand_in: None):
    compare(pattern, range(300), 300)


@pytest.mark.parametrize("pattern", [*FEW, Causal() & Dilated(3, offset=1), Chunk(7).T], ids=str)
@pytest.mark.parametrize("named", RANGES)
def test_queries_stand_where_they_are_said_to(named: str, pattern: Pattern, small: None, stand_in: None):
    compare(pattern, *RANGES[named])


@pytest.mark.parametrize("pattern", [*FEW, ~Causal(), Streaming(9)], ids=str)
def test_changes_of_scores(pattern: Pattern, small: None, stand_in: None):
    logits = torch.tensor([0.5, -1.0, 4.0, -math.inf], dtype=torch.float64)
    for changes in (
        Scores(0.7, (3.0, -0.01, 0.0, 0.5), logits),
        Scores(None, ALiBi().of(HEADS), None),
        Scores(None, None, logits),
    ):
        compare(pattern, range(97), 97, changes)
        compare(pattern, range(2, 97, 3), 97, changes)


@pytest.mark.parametrize("capturing", [False, True], ids=["waiting", "capturing"])
@pytest.mark.parametrize("spoiled", ["nothing", "query", "key", "value", "output", "lse", "infinite value"])
@pytest.mark.parametrize("changes", [PLAIN, Scores(0.5, (1000.0,) * HEADS)], ids=["plain", "changed"])
@pytest.mark.parametrize("pattern", [SlidingWindow(7), *FEW[2:]], ids=str)
def test_what_is_no_number_stays_with_what_reads_it(
    pattern: Pattern,
    changes: Scores,
    spoiled: str,
    capturing: bool,
    small: None,
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
):
    """Also where far pairs weigh nothing; while a graph is captured no number is waited for."""
    if capturing:
        monkeypatch.setattr(finite, "capturing", lambda side: True)
    given = tensors(31, 31, torch.float64, torch.device("cpu"))
    into = [torch.ones_like(given[0]), torch.ones_like(given[0][..., 0])]
    worst = math.inf if spoiled == "infinite value" else math.nan
    target = [*given, *into][
        ["query", "key", "value", "output", "lse", "nothing"].index(spoiled.split()[-1]) % 5
    ]
    for place in ((0, 1, 12), (1, 0, 30)) if spoiled != "nothing" else ():
        target[place] = worst
    truth = graded(reference, given, pattern, range(31), changes, into)
    for one, right in zip(graded(flex, given, pattern, range(31), changes, into), truth, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=1e-10, equal_nan=True)


def test_values_without_numbers_leave_what_is_no_number_where_it_is(small: None, stand_in: None):
    query, key, value = tensors(31, 31, torch.float64, torch.device("cpu"))
    key[1, 0, 12] = math.nan
    given = [query, key, value[..., :0]]
    got, truth = (
        kernel.attend(*given, SlidingWindow(7), queries=range(31), scale=0.3, changes=PLAIN)
        for kernel in (flex, reference)
    )
    for one, right in zip(got, truth, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=1e-10, equal_nan=True)


def laid_out(side: torch.Tensor, how: str) -> torch.Tensor:
    """Return a tensor of the same numbers that lies otherwise in memory."""
    if how == "heads outside":
        return side.contiguous()
    if how == "gaps":
        # As queries, keys and values lie that one layer makes together.
        return torch.cat([side, side], dim=-1)[..., : side.shape[-1]]
    if how == "one for both":
        # As the same text lies for every member of a batch.
        return side[:1].expand_as(side)
    return side


@pytest.fixture
def compiled_for(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> set:
    """The way of cuda, on cpu: record what a kernel is compiled for."""
    asked: set = set()

    def recorded(kind: family.Family, scale: float, facts: Any) -> Any:
        run = flex._kernel(kind, scale)

        def kernel(*given: Any) -> Any:
            flat = [side for part in given for side in (part if isinstance(part, tuple) else (part,))]
            lie = (
                None if side is None else (side.dtype, side.shape, side.stride(), side.requires_grad)
                for side in flat
            )
            asked.add((kind, scale, facts, *lie))
            return run(*given)

        return kernel

    monkeypatch.setattr(flex, "DEFINED", ())
    monkeypatch.setattr(flex, "_compiled", recorded)
    return asked


@pytest.mark.parametrize("how", ["heads inside", "heads outside", "gaps", "one for both"])
@pytest.mark.parametrize("pattern", FEW, ids=str)
def test_a_captured_graph_does_what_was_done_before_it(
    pattern: Pattern, how: str, small: None, compiled_for: set, monkeypatch: pytest.MonkeyPatch
):
    """After one step outside a graph, nothing is compiled in it, sent to the device, or asked for."""
    changes = Scores(2.0, ALiBi().of(HEADS), None)
    given = [laid_out(side, how) for side in tensors(31, 31, torch.float64, torch.device("cpu"), width=16)]
    into = [torch.ones_like(given[0]), torch.ones_like(given[0][..., 0])]

    def step() -> None:
        graded(flex, given, pattern, range(31), changes, into)
        with torch.no_grad():
            flex.attend(*given, pattern, queries=range(31), scale=0.3, changes=changes)

    with Waiting() as waiting:
        step()
    assert "_local_scalar_dense" in waiting.asked
    before = set(compiled_for)
    held = [cached.cache_info().misses for cached in (family.groups, flex._held)]
    monkeypatch.setattr(finite, "capturing", lambda side: True)
    with Waiting() as waiting:
        step()
    assert before and compiled_for == before
    assert held == [cached.cache_info().misses for cached in (family.groups, flex._held)]
    assert waiting.asked == []


class Waiting(TorchDispatchMode):
    """Records what would make a CUDA device be waited for: numbers read, and tensors made of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        # The stand-in looks at its own lists.
        own = any(frame.name in ("listed", "blockwise") for frame in traceback.extract_stack(limit=12))
        if name in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal") and not own:
            self.asked.append(name)
        return operation(*given, **(options or {}))


def test_a_query_that_reads_nothing_gets_nothing(small: None, stand_in: None):
    """Whatever flows into the log-sum-exp of an empty row, nothing comes out of it."""
    given = tensors(31, 31, torch.float64, torch.device("cpu"))
    into = [torch.full_like(given[0], 5.0), torch.full_like(given[0][..., 0], math.nan)]
    pattern = Causal() - Window(20)
    found = graded(flex, given, pattern, range(31), PLAIN, into)
    empty = ~counts(pattern, length=31).any(-1)
    assert not found[0][:, :, empty].any()
    assert (found[1][:, :, empty] == -math.inf).all()
    assert not found[2][:, :, empty].any()


# The real one.


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("pattern", [SlidingWindow(9), LongNet((8, 32), (1, 4)), S2(8)], ids=str)
def test_flex_attention_itself_gives_the_same(pattern: Pattern, heads: tuple[int, int]):
    for length, dtype in ((31, torch.float64), (129, torch.float32), (1, torch.float32)):
        given = tensors(length, length, dtype, torch.device("cpu"), heads=heads[0], key_heads=heads[1])
        truth = attend_with_lse(*[side.double() for side in given], pattern, kernel="reference")
        plain = attend_with_lse(*given, pattern, kernel="reference")
        got = attend_with_lse(*given, pattern, kernel="flex")
        for one, ordinary, right in zip(got, plain, truth, strict=True):
            oracle.within_budget(one, ordinary, right, lse=truth[1])


def test_flex_attention_itself_changes_scores():
    given = tensors(31, 31, torch.float64, torch.device("cpu"))
    changes = [ALiBi(), SoftCap(2.0), Sinks(torch.zeros(HEADS))]
    got, truth = (
        attend(*given, LongMixed(9), queries=range(31), scores=changes, kernel=kernel)
        for kernel in ("flex", "reference")
    )
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


def test_cuda_takes_narrow_heads_wider(monkeypatch: pytest.MonkeyPatch):
    """Columns of 0 change nothing, and none of them comes out."""
    seen = []

    def plainly(kind: Any, scale: float, facts: Any) -> Any:
        run = flex._kernel(kind, scale)
        return lambda query, *rest: seen.append(query.shape[3]) or run(query, *rest)

    monkeypatch.setattr(flex, "DEFINED", ())
    monkeypatch.setattr(flex, "_compiled", plainly)
    monkeypatch.setattr(flex.flex, "flex_attention", blockwise)
    compare(SlidingWindow(9), range(31), 31)
    assert set(seen) == {flex.NARROWEST}


# Where there is a CUDA device: float64, which most of the matrix is in, is not for tensor cores.


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("named", RANGES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_queries_stand_where_they_are_said_to(named: str, pattern: Pattern):
    queries, keys = RANGES[named]
    given = tensors(len(queries), keys, torch.float32, torch.device("cuda"))
    check(pattern, given, "flex", queries=queries)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (12, 4)], ids=str)
@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_shares_key_heads(pattern: Pattern, heads: tuple[int, int]):
    given = tensors(300, 300, torch.float32, torch.device("cuda"), heads=heads[0], key_heads=heads[1])
    check(pattern, given, "flex")


@pytest.mark.parametrize("pattern", [SlidingWindow(512), Causal(), Streaming(512)], ids=str)
@pytest.mark.parametrize("length", [1024, 1500, 3072])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_finds_the_full_blocks_beside_the_partial_ones(length: int, pattern: Pattern):
    """Shorter texts have lists of one width, whose strides are the same whatever is done."""
    check(pattern, tensors(length, length, torch.float32, torch.device("cuda")), "flex")


@pytest.mark.parametrize("pattern", FEW, ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_graphs_compile_nothing_and_keep_numbers_apart(pattern: Pattern):
    given = [side.requires_grad_() for side in tensors(300, 300, torch.bfloat16, torch.device("cuda"))]

    def step() -> list[torch.Tensor]:
        output = attend(*given, pattern, kernel="flex")
        return [output, *torch.autograd.grad(output.sum(), given)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    before, graph = counters["stats"]["unique_graphs"], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    assert counters["stats"]["unique_graphs"] == before
    for worst in (0.0, math.nan):
        with torch.no_grad():
            given[1][0, 0, 12] = worst
        graph.replay()
        for one, right in zip(made, step(), strict=True):
            torch.testing.assert_close(one, right, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_makes_nothing_of_the_size_of_the_square():
    length = 16_384
    leaves = [torch.randn(1, 4, length, 64, device="cuda", requires_grad=True) for _ in range(3)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(*leaves, LongMixed(512), kernel="flex").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < length * length * 4 / 2
