"""Attention on CUDA as one operation of torch.compile, with a stand-in for the device's flash attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flash_stand_in import flash_on_cpu
from torch import Tensor

from longspan.kernel import choice
from longspan.kernel.operation import compiled, opaque
from longspan.kernel.plan import flash_refusal
from longspan.pattern import Causal, LongMixed, Pattern, SlidingWindow
from longspan.score import Scores

PATTERN = SlidingWindow(9)


@pytest.fixture(params=["flash", "reference"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let one kernel be chosen on cpu, as if it were the device that the kernel is for."""
    monkeypatch.setattr(compiled, "chosen", lambda *given, **asked: request.param)
    with flash_on_cpu():
        yield request.param


def run(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    start = key.shape[2] - query.shape[2]
    changes = Scores(None, None, sinks)
    return compiled.attend(
        query, key, value, pattern, start=start, step=1, scale=0.3, changes=changes, kernel=None
    )


def leaves(length: int, *, sinks: bool = False) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(length)
    sides = [
        torch.randn(2, length, heads, 8, generator=generator, dtype=torch.float64).transpose(1, 2)
        for heads in (4, 2, 2)
    ]
    logits = torch.zeros(4, dtype=torch.float64) if sinks else None
    return [None if side is None else side.requires_grad_() for side in (*sides, logits)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_graph_holds_attention_whole(chosen: str):
    """Forward and backward, through output, log-sum-exp or both, at more than one length, without a break."""
    torch._dynamo.reset()
    graph = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, sinks in ((31, False), (50, False), (31, True)):
        for wanted in ((0,), (1,), (0, 1)):
            given = leaves(length, sinks=sinks)
            start = [side for side in given if side is not None]
            queries = range(length)
            truth = choice.run(
                "reference",
                *given[:3],
                PATTERN,
                queries=queries,
                scale=0.3,
                changes=Scores(None, None, given[3]),
            )
            got = graph(*given, PATTERN)
            for right, one in zip(truth, got, strict=True):
                torch.testing.assert_close(one, right, rtol=0, atol=1e-12)
            expected, found = (
                torch.autograd.grad(sum(result[part].square().sum() for part in wanted), start)
                for result in (truth, got)
            )
            for right, one in zip(expected, found, strict=True):
                torch.testing.assert_close(one, right, rtol=0, atol=1e-10)


def test_the_operation_keeps_the_rules_of_custom_operations(chosen: str):
    number = opaque.numbered(LongMixed(9))
    for sinks in (False, True):
        given = leaves(31, sinks=sinks)
        torch.library.opcheck(
            compiled._attend,
            (*given, None, None, number, 0, 1, 0.3, ""),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_the_choice_asks_what_the_plan_asks():
    """Bands are refused for a pattern that has none, and for one that another kernel does cheaper."""
    assert flash_refusal(Causal(), 4, range(9), range(9), asked=False) is None
    side = torch.zeros(1, 4, 9, 8)
    name = choice.chosen(side, side, side, Causal(), queries=range(9), changes=Scores(), asked="reference")
    assert name == "reference"
