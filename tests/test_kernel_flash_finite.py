"""The flash kernel and what is no number: it stays with what reads it, and the device is waited for where it must be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_stand_in import flash_on_cpu
from test_kernel_flash import CPU, PLAIN, work
from test_kernel_matrix import tensors

from longspan.kernel import reference
from longspan.kernel.flash import flash
from longspan.pattern import (
    Causal,
    Chunk,
    LongMixed,
    LongNet,
    Nothing,
    SlidingWindow,
    Streaming,
    Window,
)


@pytest.fixture
def calls() -> Iterator[list[dict[str, Any]]]:
    with flash_on_cpu() as recorded:
        yield recorded


@pytest.mark.parametrize("capturing", [False, True], ids=["waiting", "capturing"])
@pytest.mark.parametrize("spoiled", ["query", "key", "value", "output", "lse", "infinite value"])
def test_what_is_no_number_stays_with_what_reads_it(
    spoiled: str, capturing: bool, calls: list, monkeypatch: pytest.MonkeyPatch
):
    """With and without a look at the numbers; nothing waits for them while a graph is captured."""
    if capturing:
        monkeypatch.setattr(flash, "capturing", lambda side: True)
    worst = math.inf if spoiled == "infinite value" else math.nan
    for pattern in (
        SlidingWindow(7),
        LongNet((8, 32), (1, 4)),
        Streaming(9),
        Window(9),
        Causal() - Window(20),
    ):
        given = tensors(31, 31, torch.float64, CPU)
        into = [torch.ones_like(given[0]), torch.ones_like(given[0][..., 0])]
        target = [*given, *into][["query", "key", "value", "output", "lse"].index(spoiled.split()[-1])]
        for place in ((0, 1, 12), (1, 0, 30)):
            target[place] = worst
        asked, results = work(pattern, range(31), 31), []
        for kernel in ("reference", "flash"):
            leaves = [side.detach().requires_grad_() for side in given]
            if kernel == "reference":
                found = reference.attend(*leaves, pattern, queries=range(31), scale=0.3, changes=PLAIN)
            else:
                found = flash.attend(*leaves, None, asked)
            results.append([*found, *torch.autograd.grad(found, leaves, into)])
        for right, got in zip(*results, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-10, equal_nan=True)


def test_a_captured_graph_is_never_waited_for(calls: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flash, "capturing", lambda side: True)
    waited = []
    for name in ("isfinite", "__bool__", "item"):
        waits = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda side, waits=waits, name=name: waited.append(side.dim()) or waits(side)
        )
    leaves = [side.requires_grad_() for side in tensors(31, 31, torch.float64, CPU)]
    for part in flash.attend(*leaves, None, work(LongMixed(9), range(31), 31)):
        torch.autograd.grad(part.sum(), leaves, retain_graph=True)
    # Rows are looked through, but no number is asked for.
    assert waited and 0 not in waited


@pytest.mark.parametrize("rows", [1, 40])
def test_nothing_is_waited_for_where_all_pairs_are_read(
    rows: int, calls: list, monkeypatch: pytest.MonkeyPatch
):
    """A token that is decoded reads all that its calls see, so what is no number goes nowhere else."""
    queries = range(40 - rows, 40)
    for pattern in (Causal(), Streaming(20), LongMixed(9)) if rows == 1 else (Chunk(40), Chunk(8)):
        leaves = [side.requires_grad_() for side in tensors(rows, 40, torch.float64, CPU)]
        with monkeypatch.context() as patch:
            for name in ("__bool__", "item"):
                patch.setattr(torch.Tensor, name, lambda side: pytest.fail("waited for a number"))
            for part in flash.attend(*leaves, None, work(pattern, queries, 40)):
                torch.autograd.grad(part.sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("spoiled", ["query", "key", "value", "output", "lse", "infinite value"])
def test_what_is_no_number_spreads_to_its_readers_without_a_look(spoiled: str, calls: list):
    worst = math.inf if spoiled == "infinite value" else math.nan
    for pattern, queries in ((Chunk(8), range(31)), (Causal(), range(30, 31)), (Nothing(), range(31))):
        rows = len(queries)
        given = tensors(rows, 31, torch.float64, CPU)
        into = [torch.ones_like(given[0]), torch.ones_like(given[0][..., 0])]
        target = [*given, *into][["query", "key", "value", "output", "lse"].index(spoiled.split()[-1])]
        target[0, 1, target.shape[2] // 2] = worst
        asked, results = work(pattern, queries, 31), []
        for kernel in ("reference", "flash"):
            leaves = [side.detach().requires_grad_() for side in given]
            if kernel == "reference":
                found = reference.attend(*leaves, pattern, queries=queries, scale=0.3, changes=PLAIN)
            else:
                found = flash.attend(*leaves, None, asked)
            results.append([*found, *torch.autograd.grad(found, leaves, into)])
        for right, got in zip(*results, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-10, equal_nan=True)
