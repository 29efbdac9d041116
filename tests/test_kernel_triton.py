"""The triton kernel: the numbers of the reference, from Triton's interpreter on cpu and from programs on cuda."""

from __future__ import annotations

import pytest
import torch
from test_kernel_matrix import RANGES, check, tensors

from longspan import attend
from longspan.errors import PlanError
from longspan.pattern import (
    BigBird,
    Causal,
    Dilated,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Window,
)
from longspan.score import Sinks, SoftCap

pytest.importorskip("triton", reason="Triton is not installed: it comes with CUDA builds of torch")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATTERNS = [
    SlidingWindow(50),
    Streaming(20),
    PerHead([SlidingWindow(9), Causal(), Nothing(), LongNet((4, 16), (1, 2))]),
    (Causal() & Window(9)) + (Causal() & Window(9)) + Causal(),
    Causal() & (Window(9) | Dilated(7)),
    BigBird(16),
    ~Causal(),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_triton_keeps_to_the_formula(pattern: Pattern):
    for length in (1, 70):
        check(pattern, tensors(length, length, torch.float32, DEVICE), "triton")


@pytest.mark.parametrize("named", RANGES)
def test_triton_queries_stand_where_they_are_said_to(named: str):
    queries, keys = RANGES[named]
    for pattern in (PATTERNS[2], LongMixed(9)):
        given = tensors(len(queries), keys, torch.float32, DEVICE)
        check(pattern, given, "triton", queries=queries)


@pytest.mark.parametrize("heads", [(4, 1), (12, 4)], ids=str)
def test_triton_shares_key_heads(heads: tuple[int, int]):
    given = tensors(97, 97, torch.float32, DEVICE, heads=heads[0], key_heads=heads[1], width=20)
    check(LongMixed(9), given, "triton")


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_what_is_no_number_stays_with_what_reads_it(spoiled: int):
    results = []
    for kernel in ("triton", "reference"):
        given = tensors(70, 70, torch.float32, DEVICE)
        given[spoiled][0, 1, 12] = torch.nan
        leaves = [side.requires_grad_() for side in given]
        output = attend(*leaves, Streaming(9), kernel=kernel, scores=Sinks(torch.zeros(4, device=DEVICE)))
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_triton_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    side = torch.zeros(1, 4, 9, 8, device=DEVICE)
    with pytest.raises(PlanError) as raised:
        attend(side, side, side, Causal(), kernel="triton", scores=SoftCap(5.0))
    assert "triton  changes no scores beside learned sinks" in str(raised.value)
    with pytest.raises(PlanError) as raised:
        attend(side.double(), side.double(), side.double(), Causal(), kernel="triton")
    assert "triton  takes float32, bfloat16 or float16, got float64" in str(raised.value)
    if DEVICE.type == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(PlanError) as raised:
            attend(side, side, side, Causal(), kernel="triton")
        assert "triton  runs on cuda, and on cpu in Triton's interpreter (TRITON_INTERPRET=1)" in str(
            raised.value
        )
