"""Families of the flex kernel: what is compiled, what is handed in, and when the kernel is taken."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernel_matrix import HEADS, PATTERNS, tensors
from torch._dynamo.utils import counters
from torch.nn import functional as F

from longspan import attend, plan
from longspan.errors import PlanError, ShapeError
from longspan.kernel.flex import family, flex
from longspan.kernel.flex.formula import answer, formula
from longspan.kernel.flex.lists import Lists
from longspan.pattern import (
    S2,
    BigBird,
    Causal,
    Chosen,
    Chunk,
    Dilated,
    Documents,
    Keys,
    LongMixed,
    Nothing,
    Pattern,
    PerHead,
    Random,
    SlidingWindow,
    Streaming,
    Window,
)
from longspan.score import Scores, Sinks, SoftCap

PLAIN = Scores()


# What is compiled and what is handed in.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Causal() & Window(512), Causal() & Window(4096)),
        (Chunk(64), Chunk(100, offset=7)),
        (Documents((5, 6)), Documents((7, 9, 3))),
        (Random(2, size=4), Random(2, size=16, seed=3)),
    ],
    ids=str,
)
def test_sizes_are_not_in_the_operations(one: Pattern, other: Pattern):
    first, second = (formula(pattern, torch.device("cpu")) for pattern in (one, other))
    assert first.operations == second.operations


@pytest.mark.parametrize(
    "pattern",
    [*PATTERNS, BigBird(8, length=97, causal=False), Chosen(((0,), (2, 0)), size=16), Keys((3, 90))],
    ids=str,
)
def test_operations_do_what_the_formula_does(pattern: Pattern):
    q, k = torch.arange(97)[:, None], torch.arange(90)
    for head in range(HEADS):
        single = pattern.at_head(head, HEADS)
        read = formula(single, torch.device("cpu"))
        dtype = torch.int32 if read.small else torch.int64
        numbers = torch.tensor(read.numbers, dtype=dtype)
        got = answer(read.operations, q.to(dtype), k.to(dtype), numbers.__getitem__, read.tables)
        assert torch.equal(got.expand(97, 90), single.contains(q, k).expand(97, 90))


def test_heads_of_one_formula_are_one_call():
    def made(pattern: Pattern) -> list[tuple[tuple[int, ...], int]]:
        found = family.groups(pattern, 8, range(1000), range(1000), torch.device("cpu"))
        return [(group.heads, len(group.calls)) for group in found]

    assert made(S2(64)) == [(tuple(range(8)), 1)]
    assert made(Streaming(100)) == [(tuple(range(8)), 1)]
    assert made(Causal() + SlidingWindow(5)) == [(tuple(range(8)), 2)]
    assert made(PerHead([Causal(), Nothing()])) == [((0, 1, 2, 3), 1), ((4, 5, 6, 7), 0)]


def test_lists_follow_the_blocks_not_the_square():
    found = family.groups(SlidingWindow(512), 8, range(1 << 20), range(1 << 20), torch.device("cpu"))
    assert sum(part.nbytes for part in found[0].calls[0].lists.tensors) < 1_000_000


def test_calls_are_made_once():
    asked = partial(family.groups, LongMixed(64), 8, range(1000), range(1000), torch.device("cpu"))
    assert asked() is asked()


# Choice and refusal.


def test_cpu_has_no_backward():
    given = [side.requires_grad_() for side in tensors(9, 9, torch.float32, torch.device("cpu"))]
    with pytest.raises(PlanError) as raised:
        attend(*given, Causal(), kernel="flex")
    assert "flex  has no backward on cpu: FlexAttention gives gradients on cuda only" in str(raised.value)
    with torch.no_grad():
        attend(*given, Causal(), kernel="flex")
    sinks = torch.zeros(HEADS, requires_grad=True)
    with pytest.raises(PlanError):
        attend(*[side.detach() for side in given], Causal(), scores=Sinks(sinks), kernel="flex")


def test_cpu_makes_all_scores():
    side = torch.zeros(()).expand(1, 8, 65_536, 8)
    with pytest.raises(PlanError) as raised:
        attend(side, side, side, Causal(), kernel="flex")
    assert "flex  would need 137.4 GB for the scores, limit is 8 GB" in str(raised.value)


def test_a_formula_that_no_kernel_can_be_made_of():
    class Waves(Pattern):
        def contains(self, q: Any, k: Any) -> Any:
            return torch.sin(q - k) > 0

        def __str__(self) -> str:
            return "Waves()"

    assert (
        flex.refusal([torch.zeros(1, 1, 9, 8)], Waves(), PLAIN, asked=True)
        == "makes no kernel of `sin` in the formula of Waves()"
    )


def on_cuda(*sides: torch.Tensor) -> list[Any]:
    """Return what a kernel is asked about tensors on cuda, which need not be there."""
    return [
        SimpleNamespace(device=torch.device("cuda"), dtype=side.dtype, shape=side.shape, stride=side.stride)
        for side in sides
    ]


@pytest.mark.parametrize("side", [0, 1, 2])
def test_rows_that_lie_too_far_apart_for_32_bits(side: int):
    """A long text with many heads inside; laid out head by head it is taken."""

    def why(*given: torch.Tensor) -> str | None:
        return flex.refusal(on_cuda(*given), Causal(), PLAIN, asked=False)

    near = [torch.empty(1, 32, 524_288, 128, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    far = list(near)
    far[side] = torch.empty(1, 524_288, 32, 128, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    assert why(*near) is None
    assert why(*(part[:, :, :524_287] for part in far)) is None
    assert why(*far) == (
        f"takes heads whose {('queries', 'keys', 'values')[side]} lie within 2,147,483,647 numbers, got 2,147,483,648; "
        ".contiguous() lays those of a head side by side, and the kernels flash and triton have no such limit"
    )


def test_outputs_lie_as_queries_do():
    """Of wide values the output is wider than the query, and its rows lie farther apart."""
    query = torch.empty(1, 262_144, 32, 128, device="meta").transpose(1, 2)
    value = torch.empty(1, 32, 262_144, 256, device="meta")
    assert flex.refusal(on_cuda(query, query, query), Causal(), PLAIN, asked=False) is None
    assert "queries lie within" in flex.refusal(on_cuda(query, query, value), Causal(), PLAIN, asked=False)


def test_the_plan_of_cuda():
    made = plan(SlidingWindow(512), length=8192, heads=8, dtype="bfloat16", device="cuda", kernel="flex")
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
  workspace  4.1 kB of lists
  kernel     flex
  refused    native: runs on cpu, got cuda
  refused    sdpa: runs on cpu, got cuda
  heads 0 to 7
    1 call, 186 full and 124 partial blocks of 128 by 128"""
    )


def test_what_cuda_cannot_take_falls_to_the_reference():
    made = plan(Causal(), length=97, dtype="float64", device="cuda")
    assert made.kernel == "reference"
    assert made.refused == (
        ("native", "runs on cpu, got cuda"),
        ("sdpa", "runs on cpu, got cuda"),
        ("flash", "takes bfloat16 or float16, got float64"),
        ("flex", "takes float32 or bfloat16 or float16 on cuda, got float64"),
    )


def test_a_plan_of_no_device():
    with pytest.raises(ShapeError) as raised:
        plan(Causal(), length=9, device="tpu")
    assert str(raised.value) == "A plan is for one of two devices.\n  asked  tpu\n  try    cpu or cuda"


def test_cpu_takes_flex_only_when_it_is_asked_for():
    given = tensors(9, 9, torch.float32, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "attend", None)
        attend(*given, Causal(), scores=SoftCap(5.0))
    assert plan(Causal(), length=9).kernel in ("native", "sdpa")
    assert plan(Causal(), length=9, kernel="flex").kernel == "flex"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of cuda, on cpu: compiled, which gives no log-sum-exp here and wants lists of full width."""
    run, tensors_of = flex.flex.flex_attention, Lists.tensors.fget

    def without_lse(*given: Any, return_aux: Any, **options: Any) -> Any:
        output = run(*given, **options)
        return output, flex.flex.AuxOutput(lse=output[..., 0].float(), max_scores=None)

    def wide(lists: Lists) -> tuple[torch.Tensor, ...]:
        made = tensors_of(lists)
        widths = [made[4].shape[2]] * 4 + [made[0].shape[2]] * 4
        return tuple(
            F.pad(part, (0, max(0, width - part.shape[3]))) if part.dim() == 4 else part
            for part, width in zip(made, widths, strict=True)
        )

    monkeypatch.setattr(flex, "DEFINED", ())
    monkeypatch.setattr(flex.flex, "flex_attention", without_lse)
    monkeypatch.setattr(Lists, "tensors", property(wide))
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()


# PyTorch's compiler calls what PyTorch calls old.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_the_compiled_kernel_reads_the_lists(compiled: None):
    """Forward on cpu is a kernel of blocks as on cuda; one serves all sizes and lengths."""
    for size, length in ((20, 300), (200, 300), (77, 515)):
        given = tensors(length, length, torch.float32, torch.device("cpu"), width=16)
        pattern = Causal() & Window(size)
        output, _ = flex.attend(*given, pattern, queries=range(length), scale=0.25, changes=PLAIN)
        truth = attend(*given, pattern, scale=0.25, kernel="reference")
        torch.testing.assert_close(output, truth, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("cases", "graphs"),
    [
        ([(S2(64), 300), (S2(100), 515)], 1),
        ([(Causal() & Dilated(4), 1100), (Causal() & Dilated(6), 1613)], 1),
        ([(Documents((100, 200)), 300), (Documents((5, 7, 502)), 514)], 1),
        ([(Causal() & Window(9), 300), (Window(9), 300)], 2),
    ],
    ids=["chunks", "dilated", "documents", "two families"],
)
def test_sizes_and_lengths_are_not_compiled_anew(
    cases: list[tuple[Pattern, int]], graphs: int, compiled: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for pattern, length in cases:
        given = tensors(length, length, torch.float32, torch.device("cpu"), width=16)
        output, _ = flex.attend(*given, pattern, queries=range(length), scale=0.25, changes=PLAIN)
        torch.testing.assert_close(output, attend(*given, pattern, scale=0.25), rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
