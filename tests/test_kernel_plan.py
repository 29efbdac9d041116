"""The plan: what it says is what is done."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import lengths, patterns, spans

from longspan import attend, plan
from longspan.derive.cost import cost
from longspan.derive.mask import counts
from longspan.kernel import plan as plan_module
from longspan.kernel import reference, sdpa
from longspan.pattern import (
    S2,
    SDA,
    Causal,
    Dilated,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    PerHead,
    SlidingWindow,
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


def test_a_plan_is_printed_whole():
    made = plan(PerHead([Causal(), Nothing()]), length=100, queries=range(90, 100), heads=2, kernel="sdpa")
    assert (
        str(made)
        == """\
Plan
  pattern   PerHead([Causal(), Nothing()])
  heads     2, width 64
  queries   90 to 99 reading keys 0 to 99
  pairs     955, 47.75% of all
  computed  1,000, 1.05 times the pairs
  flops     244,480 forward
  kernel    sdpa
  heads 0
    1 x masked 10 queries by 100 keys, contiguous, 96% of it read
  heads 1"""
    )


def test_a_plan_of_no_queries_is_printed():
    assert "  queries   none reading keys 0 to 8" in str(plan(Causal(), length=9, queries=range(0)))


def test_a_refused_kernel_stands_in_the_plan():
    made = plan(Causal() & Window(512), length=1_048_576, heads=8)
    assert made.kernel == "sdpa"
    assert made.refused == (("reference", "would need 35184.4 GB for the scores, limit is 8 GB"),)
    assert "  refused   reference: would need 35184.4 GB for the scores, limit is 8 GB" in str(made)


@pytest.mark.parametrize("asked", ["sdpa", "reference", None])
def test_the_kernel_of_the_plan_is_the_one_that_runs(asked: str | None, monkeypatch: pytest.MonkeyPatch):
    ran = []
    for kernel in (sdpa, reference):
        run = kernel.attend
        monkeypatch.setattr(
            kernel,
            "attend",
            lambda *given, _run=run, _of=kernel, **options: ran.append(_of) or _run(*given, **options),
        )
    side = torch.randn(1, 2, 31, 8)
    attend(side, side, side, Causal(), kernel=asked)
    made = plan(Causal(), length=31, heads=2, width=8, kernel=asked)
    assert [f"longspan.kernel.{made.kernel}"] == [kernel.__name__ for kernel in ran]


def test_the_work_on_a_text_is_planned_once(monkeypatch: pytest.MonkeyPatch):
    plan_module.head_groups.cache_clear()
    side = torch.randn(1, 2, 31, 8)
    for _ in range(3):
        attend(side, side, side, Causal() & Dilated(2))
    assert plan_module.head_groups.cache_info().misses == 1
