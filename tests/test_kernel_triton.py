"""The triton kernel: the numbers of the reference, from Triton's interpreter on cpu and from programs on cuda."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_kernel_matrix import RANGES, check, tensors

from longspan import attend
from longspan.errors import PlanError
from longspan.kernel.triton import triton
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


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_takes_heads_of_all_widths(dtype: torch.dtype, width: int):
    """Blocks are smaller where numbers or heads are wider."""
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    given = tensors(97, 97, dtype, DEVICE, heads=2, key_heads=1, batch=1, width=width)
    if width <= triton.WIDEST[dtype]:
        check(Streaming(20), given, "triton")
        return
    with pytest.raises(PlanError) as raised:
        attend(*given, Streaming(20), kernel="triton")
    assert f"triton  takes float32 heads of 64 numbers at most, got {width}" in str(raised.value)


def test_triton_reaches_the_end_of_a_long_text():
    """Rows lie so far apart that the last ones are no number of 32 bits away from the first."""
    rows, apart, given = 130, 1 << 24, []
    for side in tensors(rows, rows, torch.float16, DEVICE, heads=1, key_heads=1, batch=1, width=16):
        # On cpu, memory that is not touched is not there.
        memory = (
            torch.from_numpy(np.zeros(rows * apart, dtype=np.float16))
            if DEVICE.type == "cpu"
            else torch.zeros(rows * apart, dtype=torch.float16, device=DEVICE)
        )
        given.append(memory.as_strided(side.shape, (rows * apart, rows * apart, apart, 1)).copy_(side))
    check(Streaming(20), given, "triton")


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device on this machine")
def test_triton_runs_where_its_tensors_lie():
    check(Streaming(20), tensors(97, 97, torch.float16, torch.device("cuda", 1)), "triton")


def test_triton_is_not_captured(monkeypatch: pytest.MonkeyPatch):
    """What it waits for is refused before it is waited for."""
    monkeypatch.setattr(triton, "capturing", lambda side: True)
    side = torch.zeros(1, 4, 9, 8, device=DEVICE)
    with pytest.raises(PlanError) as raised:
        attend(side, side, side, Causal(), kernel="triton")
    assert (
        "triton  cannot be captured in a CUDA graph: it waits to see whether its results are finite"
        in str(raised.value)
    )


def test_triton_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    side = torch.zeros(1, 4, 9, 8, device=DEVICE)
    with pytest.raises(PlanError) as raised:
        attend(side, side, side, Causal(), kernel="triton", scores=SoftCap(5.0))
    assert "triton  changes no scores beside learned sinks" in str(raised.value)
    with pytest.raises(PlanError) as raised:
        attend(side.double(), side.double(), side.double(), Causal(), kernel="triton")
    assert "triton  takes float32, bfloat16 or float16, got float64" in str(raised.value)
    if DEVICE.type == "cpu":
        with pytest.raises(PlanError) as raised:
            attend(side.bfloat16(), side.bfloat16(), side.bfloat16(), Causal(), kernel="triton")
        assert "triton  takes float32 or float16 in Triton's interpreter, got bfloat16" in str(raised.value)
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(PlanError) as raised:
            attend(side, side, side, Causal(), kernel="triton")
        assert "triton  runs on cuda, and on cpu in Triton's interpreter (TRITON_INTERPRET=1)" in str(
            raised.value
        )
