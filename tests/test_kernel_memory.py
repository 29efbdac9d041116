"""Memory: no kernel but the reference makes anything of the size of the square of the text."""

from __future__ import annotations

import ctypes
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan import attend_with_lse
from longspan import plan as planned
from longspan.kernel import plan
from longspan.kernel.lattice.calls import HeadGroup, calls
from longspan.kernel.lattice.parts import parts
from longspan.kernel.native import native
from longspan.kernel.sdpa import sdpa
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    BigBird,
    Causal,
    Dilated,
    Fixed,
    Longformer,
    LongMixed,
    LongNet,
    Neighborhood,
    Pattern,
    Sink,
    SlidingWindow,
    Streaming,
    Strided,
)

LENGTH, HEADS, WIDTH = 4096, 4, 8


class Largest(TorchDispatchMode):
    """Remembers the memory of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        result = operation(*given, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    "pattern",
    [Causal(), SlidingWindow(200), Streaming(200), LongMixed(256), LongNet((256, 1024), (1, 4))],
    ids=str,
)
def test_no_tensor_is_of_the_size_of_the_square(pattern: Pattern):
    plan.head_groups.cache_clear()
    leaves = [torch.randn(1, HEADS, LENGTH, WIDTH).requires_grad_() for _ in range(3)]
    with Largest() as largest:
        output, lse = attend_with_lse(*leaves, pattern, kernel="sdpa")
        (output.sum() + lse.sum()).backward()
    sides = HEADS * LENGTH * WIDTH * 4
    square = LENGTH * LENGTH * 4
    assert largest.bytes <= max(sides, sdpa.WORKSPACE) + sides < square


def test_the_reference_makes_the_square():
    """The measure above sees a square where there is one."""
    side = torch.randn(1, 1, 512, WIDTH)
    with Largest() as largest:
        attend_with_lse(side, side, side, Causal(), kernel="reference")
    assert largest.bytes >= 512 * 512 * 4


@pytest.mark.parametrize("workspace", [4_000, 20_000, 1_000_000])
@pytest.mark.parametrize("pattern", [LongMixed(32), Causal() + Dilated(3).T, BigBird(16)], ids=str)
def test_results_do_not_follow_the_workspace(
    pattern: Pattern, workspace: int, monkeypatch: pytest.MonkeyPatch
):
    given = [torch.randn(1, heads, 200, WIDTH, dtype=torch.float64) for heads in (HEADS, 2, 2)]

    def results() -> list[torch.Tensor]:
        leaves = [side.detach().requires_grad_() for side in given]
        output, lse = attend_with_lse(*leaves, pattern, kernel="sdpa")
        (output.square().sum() + lse.square().sum()).backward()
        return [output, lse, *(leaf.grad for leaf in leaves)]

    truth = results()
    monkeypatch.setattr(sdpa, "WORKSPACE", workspace)
    for got, right in zip(results(), truth, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_what_is_large_is_cut_into_what_fits():
    """A triangle of all tokens and a few keys of all of them."""
    query = key = torch.zeros(()).expand(1, 1, 1 << 20, 64)
    whole = [part for pattern in (Causal(), Sink(4)) for part in parts(pattern, *[range(1 << 20)] * 2)]
    needed = partial(sdpa.backward_numbers, width=64)
    pairs = 0
    for call in calls(
        query,
        key,
        [HeadGroup(range(1), tuple(whole))],
        needed=needed,
        alone=lambda part: 0,
        limit=sdpa.WORKSPACE,
    ):
        some = call.slice
        assert needed(some.query, some.key) * len(call.inner) * 4 <= sdpa.WORKSPACE
        rows = some.query.places
        pairs += (rows * (rows + 1) // 2 if some.causal else rows * some.key.places) * len(call.inner)
    assert pairs == sum(part.pairs for part in whole)


LINEAR = [
    SlidingWindow(512),
    SlidingWindow(512, causal=False),
    S2(2_048),
    SCCA(1_024),
    SCCA(1_024, flow=8),
    SDA(2_048),
    LongMixed(1_024),
    LongMixed(1_024, dilation=2_048),
    LongNet(),
    LongNet(causal=False),
    Streaming(508),
    Longformer(256, global_tokens=16),
    Longformer(256, global_tokens=16, causal=False),
    BigBird(),
    BigBird(length=1 << 20, causal=False),
    Neighborhood(256),
    Strided(1_024),
    Fixed(1_024, summary=8),
    Causal(),
]


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("sdpa", torch.float32)],
    ids=["native", "native, bfloat16", "sdpa"],
)
@pytest.mark.parametrize("pattern", LINEAR, ids=str)
def test_a_million_tokens_take_little_memory_beside_their_own(
    pattern: Pattern, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    # Nothing is run, so nothing need be built.
    monkeypatch.setattr(native, "MISSING", "")
    plan._plan.cache_clear()
    found = planned(pattern, length=1 << 20, heads=8, kernel=kernel, dtype=dtype)
    plan._plan.cache_clear()
    assert 0 < max(found.workspace) < 256 * 10**6


def test_in_bfloat16_no_length_takes_more_beside_a_number_for_each_query():
    """What is summed up wider than it is given does not grow with the text."""
    shorter, longer = (native.workspace(8, n, n, 64, "bfloat16") for n in (1 << 20, 1 << 24))
    for one, other in zip(shorter, longer, strict=True):
        assert other - one == 4 * 8 * ((1 << 24) - (1 << 20))


def _memory(name: str) -> int:
    """Return a number of bytes that Linux tells of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == f"{name}:")


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a process is read as Linux tells it")
@pytest.mark.skipif(bool(native.MISSING), reason=f"native {native.MISSING}")
@pytest.mark.parametrize(
    "pattern",
    [SlidingWindow(64), LongMixed(64, dilation=512), LongNet((128, 512), (1, 4)), BigBird(16), Streaming(60)],
    ids=str,
)
def test_bfloat16_is_summed_up_in_the_room_there_is(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    """As float32, one gradient alone would take 34 MB more."""
    monkeypatch.setattr(native, "HOLDING", 1 << 22)
    length, heads = 32_768, 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    plan._plan.cache_clear()
    said = planned(pattern, length=length, heads=heads, dtype=torch.bfloat16, kernel="native").workspace
    plan._plan.cache_clear()
    sides = [torch.randn(1, heads, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    seed = torch.randn_like(sides[0])

    def taken(action: Any) -> tuple[int, Any]:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        results = action()
        return _memory("VmHWM") - before - sum(result.nbytes for result in results), results

    forward, (output, _) = taken(lambda: attend_with_lse(*sides, pattern, kernel="native"))
    backward, _ = taken(lambda: torch.autograd.grad(output, sides, seed))
    # Lists of blocks, and what the system rounds up to.
    more = 12 * 10**6
    assert forward < said[0] + more < 34 * 10**6
    assert backward < said[1] + more < 34 * 10**6
