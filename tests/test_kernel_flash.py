"""The flash kernel: the numbers of the reference, through PyTorch's own operators with a stand-in behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_stand_in import flash_on_cpu
from test_kernel_matrix import COMPOSED, PATTERNS, RANGES, check, tensors

from longspan import attend, plan
from longspan.errors import PlanError
from longspan.kernel import reference
from longspan.kernel.flash import flash, provider, views
from longspan.kernel.flash.bands import band_groups, bands
from longspan.kernel.heads import head_groups
from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.lattice.parts import parts
from longspan.pattern import (
    S2,
    SCCA,
    BigBird,
    Causal,
    Chunk,
    Dilated,
    Documents,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    SlidingWindow,
    Streaming,
    Window,
)
from longspan.score import Scores

HEADS = 4
PLAIN = Scores()
CPU = torch.device("cpu")


@pytest.fixture
def calls() -> Iterator[list[dict[str, Any]]]:
    with flash_on_cpu() as recorded:
        yield recorded


def work(
    pattern: Pattern, queries: range, keys: int, *, heads: int = HEADS, size: int = 128
) -> flash.Work | str:
    """Return what the kernel is asked, or why it is none of its business."""
    each = [pattern.at_head(head, heads) for head in range(heads)]
    alike = [range(heads)] if len(set(each)) == 1 else [range(head, head + 1) for head in range(heads)]
    groups = tuple(
        HeadGroup(some, parts(pattern.at_head(some[0], heads), queries, range(keys), size=size))
        for some in alike
    )
    found = band_groups(groups)
    return found if isinstance(found, str) else flash.Work(found, 0.3)


def compare(
    pattern: Pattern, queries: range, keys: int, *, sinks: torch.Tensor | None = None, size: int = 128
) -> bool:
    """Hold output, log-sum-exp and gradients against the reference; say whether the kernel takes the pattern."""
    asked = work(pattern, queries, keys, size=size)
    if isinstance(asked, str):
        return False
    given = tensors(len(queries), keys, torch.float64, CPU)
    generator = torch.Generator().manual_seed(3)
    into = [
        torch.randn(shape, generator=generator).double() for shape in (given[0].shape, given[0].shape[:3])
    ]
    results = []
    for kernel in ("reference", "flash"):
        leaves = [side.detach().requires_grad_() for side in given]
        own = None if sinks is None else sinks.detach().requires_grad_()
        if kernel == "reference":
            changes = Scores(None, None, own)
            found = reference.attend(*leaves, pattern, queries=queries, scale=0.3, changes=changes)
        else:
            found = flash.attend(*leaves, own, asked)
        results.append([*found, *torch.autograd.grad(found, leaves if own is None else [*leaves, own], into)])
    for name, right, got in zip(("output", "lse", "query", "key", "value", "sinks"), *results, strict=False):
        text = f"{name} of {pattern}, {queries}, {keys} keys, blocks of {size}"
        torch.testing.assert_close(
            got, right, rtol=0, atol=1e-9, msg=lambda more, text=text: f"{text}: {more}"
        )
    return True


@pytest.mark.parametrize("size", [8, 128])
def test_bands_hold_every_pair_as_often_as_the_pattern(size: int, calls: list):
    """Output and gradients say so; a pattern that is no bands is refused."""
    taken = {
        str(pattern)
        for pattern in PATTERNS
        if all(compare(pattern, range(length), length, size=size) for length in (97, 1, 130))
    }
    assert {
        str(pattern)
        for pattern in (SlidingWindow(9), LongMixed(9), S2(9), SCCA(9), Causal(), Streaming(9), *COMPOSED[:3])
    } <= taken


@pytest.mark.parametrize("named", RANGES)
def test_queries_stand_where_they_are_said_to(named: str, calls: list):
    queries, keys = RANGES[named]
    taken = [compare(pattern, queries, keys, size=8) for pattern in PATTERNS]
    assert sum(taken) > len(taken) / 2


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (12, 4)], ids=str)
def test_key_heads_are_shared_by_neighbours(heads: tuple[int, int], calls: list):
    """All heads are one call where they read alike; key heads are never repeated."""
    query, key, value = tensors(97, 97, torch.float64, CPU, heads=heads[0], key_heads=heads[1])
    for pattern in (SlidingWindow(9), S2(9), LongNet((8, 32), (1, 4)), LongMixed(9)):
        leaves = [side.detach().requires_grad_() for side in (query, key, value)]
        groups = head_groups(pattern, heads[0], range(97), range(97))
        asked = flash.Work(band_groups(groups), 0.3)
        results = []
        for found in (
            reference.attend(*leaves, pattern, queries=range(97), scale=0.3, changes=PLAIN),
            flash.attend(*leaves, None, asked),
        ):
            results.append([*found, *torch.autograd.grad([part.sum() for part in found], leaves)])
        for right, got in zip(*results, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-9)
    calls.clear()
    compute = flash.Work(band_groups(head_groups(SlidingWindow(9), heads[0], range(97), range(97))), 0.3)
    flash.forward(query, key, value, None, compute)
    assert [call["key"].shape[2] for call in calls] == [heads[1]]


def test_sinks_and_rows_that_read_nothing(calls: list):
    logits = torch.tensor([0.5, -1.0, 4.0, -math.inf], dtype=torch.float64)
    for pattern in (SlidingWindow(9), Causal() - Window(20), Nothing(), LongMixed(9)):
        assert compare(pattern, range(97), 97, sinks=logits)
        assert compare(pattern, range(2, 97, 3), 97, sinks=logits)


# Views and calls.


def window(pattern: Pattern, length: int, size: int = 128) -> list[tuple[str, tuple[int, int]]]:
    """Return the bands of one head in words, and their windows."""
    found = bands(parts(pattern, range(length), range(length), size=size))
    return [(str(band), band.window) for band in found]


def test_long_bands_are_one_call():
    assert window(SlidingWindow(512), 8192) == [("1 x window 8,192 queries by 8,192 keys", (511, 0))]
    assert window(Window(512), 8192) == [("1 x window 8,192 queries by 8,192 keys", (511, 511))]
    # Wider than the stretches of keys that the parts are cut into.
    assert window(SlidingWindow(8192), 20_000) == [("1 x window 20,000 queries by 20,000 keys", (8191, 0))]
    assert window(Causal() & Dilated(4) & Window(400), 4096) == [
        ("4 x window 1,024 queries by 1,024 keys, every 4", (99, 0))
    ]
    assert window(Chunk(1000) & Causal(), 2500) == [
        ("2 x causal 1,000 queries by 1,000 keys", (-1, 0)),
        ("1 x causal 500 queries by 500 keys", (-1, 0)),
    ]
    assert sorted(window(Documents((300, 1000, 41)) & Causal(), 1341)) == [
        ("1 x causal 1,000 queries by 1,000 keys", (-1, 0)),
        ("1 x causal 300 queries by 300 keys", (-1, 0)),
        ("1 x causal 41 queries by 41 keys", (-1, 0)),
    ]


def test_tensors_are_read_where_they_lie(calls: list):
    """Residue classes too: every call reads the storage of the tensors, at strides that kernels can load from."""
    sides = [torch.randn(1, 300, 4, 16).transpose(1, 2) for _ in range(3)]
    storages = {side.untyped_storage().data_ptr() for side in sides}
    for pattern in (
        SlidingWindow(20),
        LongNet((32, 128), (1, 4)),
        LongMixed(20),
        SCCA(20),
        Causal() & Dilated(4),
    ):
        flash.forward(*sides, None, work(pattern, range(300), 300))
    assert {
        call[name].untyped_storage().data_ptr() for call in calls for name in ("query", "key", "value")
    } == storages


def test_one_band_is_given_back_as_it_comes(calls: list):
    side = torch.randn(2, 300, 4, 16).transpose(1, 2).requires_grad_()
    groups = band_groups(head_groups(SlidingWindow(20), 4, range(300), range(300)))
    output, _ = flash.attend(side, side, side, None, flash.Work(groups, 0.25))
    assert output.transpose(1, 2).is_contiguous()
    torch.autograd.grad(output.sum(), side)
    assert [call["name"] for call in calls] == ["forward", "backward"]


@pytest.mark.parametrize("width", [5, 12, 16])
def test_kernels_load_rows_from_where_they_can(width: int, calls: list):
    """Widths are made multiples of 8, and what lies askew is copied."""
    whole = torch.randn(1, 2, 40, width + 3, dtype=torch.bfloat16)
    given = [whole[..., 1 : 1 + width], *(torch.randn(1, 2, 40, width).bfloat16() for _ in range(2))]
    groups = band_groups(head_groups(SlidingWindow(9), 2, range(40), range(40)))
    output, _ = flash.forward(*given, None, flash.Work(groups, 0.3))
    truth = attend(*[side.double() for side in given], SlidingWindow(9), scale=0.3)
    torch.testing.assert_close(output.double(), truth, rtol=0.01, atol=0.02)
    for call in calls:
        for name in ("query", "key", "value"):
            side = call[name]
            assert side.data_ptr() % 16 == 0
            assert all(stride % 8 == 0 for stride in side.stride()[:-1])


# Decoding.


@pytest.mark.parametrize("keys", [97, 200, 640])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_query_reads_its_keys_in_stretches(
    rows: int, keys: int, calls: list, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(views, "STRETCH", 32)
    at = range(keys - rows, keys)
    for pattern in (Causal(), SlidingWindow(150), Streaming(90), LongMixed(99), Causal() & Dilated(2)):
        assert compare(pattern, at, keys)
    calls.clear()
    given = tensors(1, keys, torch.float64, CPU)
    flash.forward(*given, None, work(Causal(), range(keys - 1, keys), keys))
    stretches = [
        (call["key"].shape[0], call["key"].shape[1]) for call in calls if call["query"].shape[1] == 1
    ]
    assert sum(number * places for number, places in stretches) == 2 * keys
    assert max(number for number, _ in stretches) == keys // 32


# What is refused, and what is chosen.


def test_what_is_not_taken():
    side = torch.zeros(1, 4, 9, 64)
    assert flash.refusal(side, side, PLAIN) == "runs on cuda, got cpu"
    assert flash.kind_refusal("cuda", "float32", 64) == "takes bfloat16 or float16, got float32"
    assert flash.kind_refusal("cuda", "float16", 320) == "takes heads of 256 numbers at most, got 320"
    assert flash.kind_refusal("cuda", "float16", 256) is None


def test_the_plan_of_flash(monkeypatch: pytest.MonkeyPatch):
    """Where there is no device to be asked."""
    monkeypatch.setattr(provider, "capability", lambda device=None: None)
    made = plan(SlidingWindow(512), length=8192, heads=8, dtype="bfloat16", device="cuda")
    assert (
        str(made)
        == """\
Plan
  pattern    SlidingWindow(512)
  heads      8, width 64, bfloat16
  queries    0 to 8,191 reading keys 0 to 8,191
  pairs      32,507,904, 6.06% of all
  most keys  512 for one query
  blocks     1,488 full, 992 partial, 30,288 empty
  layout     contiguous
  computed   40,632,320, 1.25 times the pairs
  flops      8,322,023,424 forward
  workspace  0 bytes forward, 17.0 MB backward at most
  kernel     flash
  by         PyTorch, where there is no device to ask for a faster one
  refused    native: runs on cpu, got cuda
  refused    sdpa: runs on cpu, got cuda
  heads 0 to 7
    1 x window 8,192 queries by 8,192 keys"""
    )


def test_what_waits_to_be_merged_is_counted():
    """Bytes beside inputs, outputs and gradients, forward: results of the calls, with sums of them where there are any."""

    def forward(pattern: Pattern) -> int:
        made = plan(pattern, length=1_024, heads=4, width=64, dtype="bfloat16", device="cuda", kernel="flash")
        return made.workspace[0]

    row = 2 * 64 + 4
    # Two segments of each of four heads in one call; or of all of them one row, and a quarter of a row beside it.
    assert forward(Chunk(512) & Causal()) == 4 * 1_024 * row
    assert forward(LongNet((256, 1_024), (1, 4))) == 4 * 1_024 * (4 * 64 + row + row // 4)


def test_the_cheaper_kernel_is_chosen():
    """Terms in different layouts are merged by either; sinks beside a window by flash attention alone."""

    def chosen(pattern: Pattern, **options: Any) -> Any:
        return plan(pattern, length=8192, heads=8, dtype="bfloat16", device="cuda", **options)

    for pattern in (LongNet((2048, 8192), (1, 4)), LongMixed(512), S2(2048), SCCA(1024)):
        assert chosen(pattern).kernel == "flash"
    streaming = chosen(Streaming(508))
    assert streaming.kernel == "flex"
    assert dict(streaming.refused)["flash"] == (
        "takes 2 calls for 48,627,712 pairs and 61,472 merges of a row, and flex computes about 48,627,712 pairs"
    )
    assert chosen(Streaming(508), kernel="flash").kernel == "flash"
    assert dict(chosen(BigBird(16)).refused)["flash"] == "takes bands, and this is more than 256 of them"


def test_cpu_is_refused_in_the_plan_too():
    with pytest.raises(PlanError) as raised:
        plan(Causal(), length=9, kernel="flash")
    assert "flash  runs on cuda, got cpu" in str(raised.value)


# Where there is a CUDA device.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_keeps_to_the_formula(pattern: Pattern, dtype: torch.dtype):
    for length in (97, 300):
        check(pattern, tensors(length, length, dtype, torch.device("cuda"), width=16), "flash")


@pytest.mark.parametrize("named", RANGES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_queries_stand_where_they_are_said_to(named: str):
    queries, keys = RANGES[named]
    for pattern in (SlidingWindow(9), LongMixed(9), LongNet((8, 32), (1, 4)), Streaming(9)):
        given = tensors(len(queries), keys, torch.bfloat16, torch.device("cuda"), width=16)
        check(pattern, given, "flash", queries=queries)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_captures_a_graph():
    """Replayed on other numbers, NaN among them, a graph gives what is given without one."""
    for kernel in ("flash", "flex"):
        given = [side.clone() for side in tensors(300, 300, torch.bfloat16, torch.device("cuda"), width=16)]
        for _ in range(3):
            attend(*given, LongMixed(64), kernel=kernel)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = attend(*given, LongMixed(64), kernel=kernel)
        given[2].normal_()
        given[2][0, 1, 7] = torch.nan
        graph.replay()
        truth = attend(*given, LongMixed(64), kernel=kernel)
        torch.testing.assert_close(output, truth, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_takes_no_memory_beside_its_results():
    length = 65_536
    leaves = [
        torch.randn(1, length, 8, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    sides = leaves[0].numel() * 2
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(*leaves, SlidingWindow(512), kernel="flash").sum().backward()
    # The output, its gradient, three gradients, and sums for the gradient of the query in float32.
    assert torch.cuda.max_memory_allocated() - before < 8 * sides
