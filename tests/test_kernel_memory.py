"""Memory: no kernel but the reference makes anything of the size of the square of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan import attend_with_lse
from longspan import plan as planned
from longspan.kernel import native, plan, sdpa
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Longformer,
    LongMixed,
    LongNet,
    Pattern,
    SlidingWindow,
    Streaming,
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


@pytest.mark.parametrize("workspace", [1, 10_000, 1_000_000])
def test_results_do_not_follow_the_workspace(workspace: int, monkeypatch: pytest.MonkeyPatch):
    side = [torch.randn(2, HEADS, 300, WIDTH, dtype=torch.float64) for _ in range(3)]
    truth = attend_with_lse(*side, LongMixed(32), kernel="sdpa")
    monkeypatch.setattr(sdpa, "WORKSPACE", workspace)
    for got, right in zip(attend_with_lse(*side, LongMixed(32), kernel="sdpa"), truth, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


LINEAR = [
    SlidingWindow(512),
    S2(2_048),
    SCCA(1_024),
    SDA(2_048),
    LongMixed(1_024),
    LongNet(),
    Streaming(508),
    Longformer(256, global_tokens=16),
]


@pytest.mark.parametrize("pattern", LINEAR, ids=str)
def test_a_million_tokens_take_little_memory_beside_their_own(pattern: Pattern):
    if native.MISSING:
        pytest.skip(f"native {native.MISSING}")
    found = planned(pattern, length=1_048_576, heads=8, kernel="native")
    assert 0 < max(found.workspace) < 256 * 10**6
