"""The plan: what it says is what is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, patterns, relations, spans
from torch.profiler import ProfilerActivity, profile

from longspan import attend, attend_with_lse, plan
from longspan.derive.cost import cost
from longspan.derive.mask import counts
from longspan.kernel import plan as plan_module
from longspan.kernel import reference
from longspan.kernel.heads import head_groups
from longspan.kernel.lattice import summary
from longspan.kernel.lattice.parts import parts
from longspan.kernel.native import native
from longspan.kernel.sdpa import sdpa
from longspan.pattern import (
    S2,
    SDA,
    BigBird,
    Causal,
    Dilated,
    LongMixed,
    LongNet,
    Pattern,
    PerHead,
    SlidingWindow,
    Streaming,
    Window,
)


@given(patterns, lengths)
def test_a_plan_counts_the_pairs_of_the_mask(pattern: Pattern, length: int):
    made = plan(pattern, length=length, heads=4, width=16)
    truth = int(counts(pattern, length=length, heads=4).sum())
    assert made.pairs == truth == cost(pattern, length=length, heads=4).pairs
    assert made.pairs <= made.area
    assert made.flops == 4 * 16 * truth


@given(patterns, st.data())
def test_a_plan_of_a_range_counts_its_pairs(pattern: Pattern, data: st.DataObject):
    queries = data.draw(spans(97))
    made = plan(pattern, length=97, queries=queries, heads=4)
    assert made.pairs == counts(pattern, queries=queries, keys=range(97), heads=4).sum()


@given(patterns, lengths)
def test_a_plan_knows_the_most_keys_of_a_query(pattern: Pattern, length: int):
    read = counts(pattern, length=length, heads=4).sum(dim=-1)
    assert plan(pattern, length=length, heads=4).most_keys == read.max()


@given(relations, lengths)
def test_blocks_of_a_plan_hold_its_pairs(pattern: Pattern, length: int):
    """Taken apart block by block, every part is as full as is said."""
    made = plan(pattern, length=length)
    full = partial = 0
    for part in (part for group in made.groups for part in group.parts):
        held = (
            np.ones((part.query.places, part.key.places), dtype=bool)
            if part.allowed is None
            else part.allowed
        )
        held = np.tril(held) if part.causal else held
        for rows in np.split(held, range(128, held.shape[0], 128)):
            for block in np.split(rows, range(128, held.shape[1], 128), axis=1):
                full += part.rectangles * block.all()
                partial += part.rectangles * (block.any() and not block.all())
    assert (made.blocks.full, made.blocks.partial) == (full, partial)


RESIDUES = [Causal() & Dilated(4), LongNet((128, 512), (1, 4)), SDA(3), Causal() & Dilated(4) & Window(300)]


@pytest.mark.parametrize("pattern", RESIDUES, ids=str)
def test_the_contiguous_layout_costs_no_more_than_is_said(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    single = pattern.at_head(1, 4)
    truth, exact = summary.contiguous_area(single, range(2048), range(2048))
    monkeypatch.setattr(summary, "COMPARABLE", 0)
    bound, bounded = summary.contiguous_area(single, range(2048), range(2048))
    assert exact and not bounded
    assert sum(part.area for part in parts(single, range(2048), range(2048))) < truth <= bound <= 1.5 * truth


def allocated(work: Callable[[], Any]) -> tuple[int, Any]:
    """Return the most bytes that some work held at a time beyond what was there before, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    moves = [
        event.nbytes()
        for event in recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    return max(np.cumsum(moves), default=0), result


@pytest.mark.parametrize("limit", [sdpa.WORKSPACE, 1 << 17])
@pytest.mark.parametrize(
    "pattern",
    [
        Causal(),
        SlidingWindow(200),
        Streaming(200),
        LongNet((64, 256), (1, 4)),
        LongMixed(256),
        S2(256),
        BigBird(32),
    ],
    ids=str,
)
def test_the_workspace_of_a_plan_holds_what_the_kernel_takes(
    pattern: Pattern, limit: int, monkeypatch: pytest.MonkeyPatch
):
    plan_module._plan.cache_clear()
    monkeypatch.setattr(sdpa, "WORKSPACE", limit)
    sides = [torch.randn(1, 4, 2048, 32, requires_grad=True) for _ in range(3)]
    forward, backward = plan(pattern, length=2048, heads=4, width=32, kernel="sdpa").workspace
    plan_module._plan.cache_clear()
    taken, (output, lse) = allocated(lambda: attend_with_lse(*sides, pattern, kernel="sdpa"))
    ones = [torch.ones_like(output), torch.ones_like(lse)]
    taken_back, _ = allocated(lambda: torch.autograd.backward(output, ones[0], retain_graph=True))
    with_lse, _ = allocated(lambda: torch.autograd.grad([output, lse], sides, ones))
    side = sides[0].nbytes
    # What PyTorch's kernel keeps to itself: scores of 256 queries and 512 keys on every thread.
    own = 4 * 256 * (512 + 2 + 32) * torch.get_num_threads()
    assert 0.1 * forward < taken - side - lse.nbytes < forward + own
    assert 0.1 * backward < taken_back - 3 * side < backward + 2 * own
    assert with_lse - 3 * side < backward + 6 * limit + 2 * own


@given(patterns)
def test_every_head_stands_in_one_group(pattern: Pattern):
    made = plan(pattern, length=31, heads=8)
    assert sorted(head for group in made.groups for head in group.heads) == list(range(8))


@pytest.mark.parametrize("pattern", [SlidingWindow(64), LongMixed(64), LongNet((64, 128), (1, 2))], ids=str)
def test_plans_of_equal_arguments_are_the_same_object(pattern: Pattern):
    assert plan(pattern, length=1000, heads=8) is plan(pattern, length=1000, heads=8)
    assert plan(pattern, length=1000, heads=8) is not plan(pattern, length=1001, heads=8)


def test_heads_that_read_alike_are_one_group():
    assert len(plan(SlidingWindow(9), length=97, heads=8).groups) == 1
    assert [list(group.heads) for group in plan(S2(8), length=97, heads=8).groups] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert [list(group.heads) for group in plan(SDA(2), length=97, heads=6).groups] == [[0, 2, 4], [1, 3, 5]]


def test_a_plan_of_no_queries_is_printed():
    assert "  queries    none reading keys 0 to 8" in str(plan(Causal(), length=9, queries=range(0)))


def test_a_refused_kernel_stands_in_the_plan():
    made = plan(Causal() & Window(512), length=1_048_576, heads=8)
    assert made.kernel in ("native", "sdpa")
    assert made.refused[-1:] == (("reference", "would need 35184.4 GB for the scores, limit is 8 GB"),)
    assert "  refused    reference: would need 35184.4 GB for the scores, limit is 8 GB" in str(made)


@pytest.mark.parametrize("asked", ["native", "sdpa", "reference", None])
def test_the_kernel_of_the_plan_is_the_one_that_runs(asked: str | None, monkeypatch: pytest.MonkeyPatch):
    if asked == "native" and native.MISSING:
        pytest.skip(f"native {native.MISSING}")
    ran = []
    for kernel in (native, sdpa, reference):
        run = kernel.attend
        monkeypatch.setattr(
            kernel,
            "attend",
            lambda *given, _run=run, _of=kernel, **options: ran.append(_of) or _run(*given, **options),
        )
    side = torch.randn(1, 2, 31, 8)
    attend(side, side, side, Causal(), kernel=asked)
    made = plan(Causal(), length=31, heads=2, width=8, kernel=asked)
    assert [made.kernel] == [kernel.__name__.rpartition(".")[2] for kernel in ran]


def test_the_work_on_a_text_is_planned_once(monkeypatch: pytest.MonkeyPatch):
    head_groups.cache_clear()
    side = torch.randn(1, 2, 31, 8)
    for _ in range(3):
        attend(side, side, side, Causal() & Dilated(2))
    assert head_groups.cache_info().misses == 1


def test_a_dtype_of_torch_is_the_one_of_its_name():
    assert plan(Causal(), length=9, dtype=torch.bfloat16) is plan(Causal(), length=9, dtype="bfloat16")


def test_heads_that_are_written_otherwise_and_read_alike_are_one_group():
    one, other = Causal() & Window(8), Causal() & Window(9) & Window(8)
    groups = head_groups(PerHead([one, SlidingWindow(5), other, one]), 4, range(64), range(64))
    reads = [(list(group.heads), group.parts) for group in groups]
    assert sorted(heads for heads, _ in reads) == [[0, 2], [1], [3]]
    assert len({id(done) for _, done in reads}) == 2
