"""What ranks are asked in tests, and what they do with it: run in their own processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_kernel_matrix import PATTERNS
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan import Causal, PerHead, SlidingWindow, Streaming, Window, attend, ring
from longspan.layout import Layout, contiguous, striped, zigzag
from longspan.pattern import SDA, LongNet, Pattern
from longspan.ring import grid
from longspan.ring.plan import settled
from longspan.score import ALiBi, Score, Sinks, SoftCap

LAYOUTS = (contiguous, zigzag, striped)
# Blocks so small that a short text has many.
SIZE = 8


@dataclass(frozen=True)
class Case:
    """One attention, but for the layout and the strategy.

    Attributes:
        heads: query heads and key heads.
        widths: of keys and values.
        changed: names of what changes scores.
    """

    pattern: Pattern
    length: int
    dtype: torch.dtype
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (8, 8)
    batch: int = 2
    changed: tuple[str, ...] = ()

    def scores(self) -> list[Score]:
        """Return what changes the scores; logits of sinks want a gradient."""
        logits = torch.linspace(-1, 2, self.heads[0], dtype=torch.float64).requires_grad_()
        known = {"alibi": ALiBi(), "cap": SoftCap(1.5), "sinks": Sinks(logits)}
        return [known[name] for name in self.changed]

    def tensors(self) -> list[torch.Tensor]:
        """Return query, key, value and the gradient of the output, of the whole text."""
        generator = torch.Generator().manual_seed(self.length)
        shapes = [
            (self.batch, self.length, heads, width)
            for heads, width in (
                (self.heads[0], self.widths[0]),
                (self.heads[1], self.widths[0]),
                (self.heads[1], self.widths[1]),
                (self.heads[0], self.widths[1]),
            )
        ]
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype).transpose(1, 2)
            for shape in shapes
        ]

    def alone(self) -> list[torch.Tensor]:
        """Return output and gradients of one process, by the definition in float64."""
        *given, into = (side.double() for side in self.tensors())
        leaves = [side.requires_grad_() for side in given]
        scores = self.scores()
        output = attend(*leaves, self.pattern, scores=scores, kernel="reference")
        leaves += [score.logits for score in scores if isinstance(score, Sinks)]
        return [output.detach(), *torch.autograd.grad(output, leaves, into)]


EVERY = [Case(pattern, 97, torch.float64) for pattern in PATTERNS]
OTHERS = [
    Case(pattern, length, dtype, heads, widths, batch)
    for pattern in (SlidingWindow(9), Causal(), PerHead([Causal(), SlidingWindow(20)]))
    for length, dtype, heads, widths, batch in (
        (1, torch.float64, (4, 4), (8, 8), 1),
        (2, torch.float32, (4, 1), (8, 8), 2),
        (31, torch.float32, (2, 1), (5, 9), 3),
        (129, torch.float32, (6, 3), (8, 8), 1),
    )
]
SCORED = [
    Case(pattern, 61, torch.float64, changed=changed)
    for pattern, changed in (
        (Streaming(9, sinks=2), ("alibi", "sinks")),
        (~Window(5), ("alibi",)),
        (Causal() & Window(12), ("cap", "sinks")),
        (PerHead([Causal(), SlidingWindow(20)]), ("alibi", "cap")),
    )
]
# Branches that reach over several ranks, so that only their kept tokens move.
THIN = [
    Case(LongNet((8, 32, 96), (1, 2, 4)), 97, torch.float64),
    Case(LongNet((16, 64), (1, 4)), 61, torch.float64, (6, 3), changed=("alibi", "sinks")),
    Case(SDA(3, rows="selected"), 129, torch.float32, (4, 1)),
]
CASES = EVERY + OTHERS + SCORED + THIN


def compare(rank: int, truths: Path) -> list[str]:
    """Hold every case, under every strategy, to one process, and its bytes to the plan; return what is wrong."""
    # The module, which the function of the same name hides in its package.
    sys.modules["longspan.ring.plan"].SIZE = SIZE
    wrong = []
    ranks = dist.get_world_size()
    for number, (case, truth) in enumerate(zip(CASES, torch.load(truths), strict=True)):
        # Half of the patterns meet an even number of ranks and half an odd one; alone there is nothing to exchange.
        if case in EVERY and (number % 2 != ranks % 2 or ranks == 1):
            continue
        layout = LAYOUTS[(number + ranks) % 3](case.length, ranks)
        for strategy in ring.STRATEGIES:
            wrong += [
                f"{case} on {layout} by {strategy}: {fault}"
                for fault in faults(rank, case, truth, layout, strategy)
            ]
    return wrong


def compare_drawn(rank: int, drawn: Path) -> list[str]:
    """Hold patterns that were drawn at random, with what one process gives, to it; return what is wrong."""
    sys.modules["longspan.ring.plan"].SIZE = SIZE
    wrong = []
    ranks = dist.get_world_size()
    for number, (case, truth) in enumerate(torch.load(drawn, weights_only=False)):
        layout = LAYOUTS[(number + ranks) % 3](case.length, ranks)
        strategy = (None, *ring.STRATEGIES)[number % (1 + len(ring.STRATEGIES))]
        wrong += [
            f"{case} on {layout} by {strategy}: {fault}"
            for fault in faults(rank, case, truth, layout, strategy)
        ]
    return wrong


def compare_on_a_grid(rank: int, truths: Path) -> list[str]:
    """Do as `compare` does on two rows and two columns of ranks; return what is wrong."""
    sys.modules["longspan.ring.plan"].SIZE = SIZE
    wrong = []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    for number, (case, truth) in enumerate(zip(CASES, torch.load(truths), strict=True)):
        if case in SCORED + THIN or (case in OTHERS and case.length > 2) or number % 5 == 0:
            layout = LAYOUTS[number % 3](case.length, 4)
            strategy = (None, *grid.COLUMN)[number % 4]
            wrong += [
                f"{case} on {layout} by {strategy}: {fault}"
                for fault in faults(rank, case, truth, layout, strategy, mesh)
            ]
    return wrong


def faults(
    rank: int,
    case: Case,
    truth: list[torch.Tensor],
    layout: Layout,
    strategy: str | None,
    mesh: DeviceMesh | None = None,
) -> Iterator[str]:
    at = torch.from_numpy(layout.positions(rank))
    *given, into = (side[:, :, at] for side in case.tensors())
    leaves = [side.requires_grad_() for side in given]
    scores = case.scores()
    leaves += [score.logits for score in scores if isinstance(score, Sinks)]
    with sending() as forward:
        output = ring.attend(
            *leaves[:3], case.pattern, layout=layout, group=mesh, strategy=strategy, scores=scores
        )
    with sending() as backward:
        gradients = torch.autograd.grad(output, leaves, into)
    for gradient in gradients[3:]:
        dist.all_reduce(gradient)
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-6
    for name, got, whole in zip(
        ("output", "query", "key", "value", "sinks")[: len(truth)], (output, *gradients), truth, strict=True
    ):
        right = whole[:, :, at] if whole.dim() == 4 else whole
        # Relative to the largest number of the whole, as sums over many keys are rounded to.
        allowed = tolerance * max(1.0, whole.abs().max().item())
        off = (got - right).abs().max().item() if right.numel() else 0.0
        if got.shape != right.shape or not off <= allowed:
            yield f"{name} is off by {off:.1e}"
    shape = case.heads, case.widths, case.batch * given[0].element_size(), strategy
    planned = (
        settled(case.pattern, layout, *shape)
        if mesh is None
        else grid.settled_grid(case.pattern, layout, 2, *shape)
    )
    for way, sent, column in (("forward", forward, planned.moved), ("backward", backward, planned.gradients)):
        if sum(sent) != column[:, rank].sum():
            yield f"{way} sent {sum(sent)} bytes, planned {column[:, rank].sum()}"


@contextmanager
def sending() -> Iterator[list[int]]:
    """Collect the bytes that this rank sends to others, as torch.distributed is told to send them."""
    sent: list[int] = []
    kept = dist.batch_isend_irecv, dist.broadcast

    def batch(operations: list[dist.P2POp]) -> Any:
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return kept[0](operations)

    def broadcast(tensor: torch.Tensor, *, group: Any, group_src: int, **options: Any) -> Any:
        others = dist.get_world_size(group) - 1
        sent.append(others * tensor.nbytes if group_src == dist.get_rank(group) else 0)
        return kept[1](tensor, group=group, group_src=group_src, **options)

    dist.batch_isend_irecv, dist.broadcast = batch, broadcast
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, dist.broadcast = kept
