"""A part of attention on one rank: its queries against keys that lie anywhere, by the kernels of one process.

Queries and keys are pieces of the text, ranges of positions one after the other in a tensor. A pattern is read over
each pair of pieces, and the parts of a plan are moved to where the pieces lie in the tensors.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from longspan.kernel import reference, sdpa
from longspan.kernel.parts import Lattice
from longspan.kernel.plan import choose, head_groups, scores_refusal
from longspan.pattern import Pattern
from longspan.score import Scores

Pieces = tuple[range, ...]


def attend(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, queries: Pieces, keys: Pieces, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of queries and keys whose positions are the pieces in order."""
    if _kernel(query, key, pattern) == "sdpa":
        return sdpa.forward(query, key, value, None, _work(query, pattern, queries, keys, scale))
    placed = _Placed(pattern, queries, keys)
    return reference.attend(
        query, key, value, placed, queries=range(query.shape[2]), scale=scale, changes=Scores()
    )


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    queries: Pieces,
    keys: Pieces,
    scale: float,
    merged: tuple[Tensor, Tensor],
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one part adds to the gradients of query, key and value.

    Law: with the output and log-sum-exp of all parts merged, the gradients of the parts add up to those of the whole.
    """
    output, lse = merged
    if _kernel(query, key, pattern) == "sdpa":
        work = _work(query, pattern, queries, keys, scale)
        none = torch.zeros_like(lse)
        return sdpa.backward(grad_output, none, query, key, value, None, output, lse, work)[:3]
    leaves = [side.detach().requires_grad_() for side in (query, key, value)]
    with torch.enable_grad():
        part_output, part_lse = attend(*leaves, pattern, queries, keys, scale)
    # The whole is the sum of outputs, each weighed by its share exp(part_lse - lse), and so are their gradients.
    share = (part_lse.detach() - lse.masked_fill(lse.isneginf(), 0.0)).exp().unsqueeze(-1)
    into = share * grad_output.to(lse.dtype)
    into_lse = (into * (part_output.detach() - output).to(lse.dtype)).sum(dim=-1)
    return torch.autograd.grad([part_output, part_lse], leaves, [into.to(part_output.dtype), into_lse])


def _kernel(query: Tensor, key: Tensor, pattern: Pattern) -> str:
    refusals = {
        "sdpa": sdpa.refusal(query, Scores()),
        "reference": scores_refusal(reference.scores_bytes(query, key)),
    }
    if refusals["sdpa"] is None:
        return "sdpa"
    return choose(refusals, None, {"pattern": str(pattern), "query": f"{list(query.shape)} {query.dtype}"})[0]


def _work(query: Tensor, pattern: Pattern, queries: Pieces, keys: Pieces, scale: float) -> sdpa.Work:
    return sdpa.Work(_groups(pattern, query.shape[1], queries, keys), range(query.shape[2]), scale)


@lru_cache(maxsize=1024)
def _groups(pattern: Pattern, heads: int, queries: Pieces, keys: Pieces) -> tuple[sdpa.HeadGroup, ...]:
    """Return the groups of heads of every pair of pieces, moved to where the pieces lie in the tensors."""
    moved, row = [], 0
    for queried in queries:
        column = 0
        for number, read in enumerate(keys):
            for group in head_groups(pattern, heads, queried, read):
                parts = tuple(
                    replace(
                        part,
                        query=_moved(part.query, row),
                        key=_moved(part.key, column),
                        fresh=part.fresh and number == 0,
                    )
                    for part in group.parts
                )
                if parts:
                    moved.append(sdpa.HeadGroup(group.heads, parts))
            column += len(read)
        row += len(queried)
    return tuple(moved)


def _moved(lattice: Lattice, by: int) -> Lattice:
    return replace(lattice, start=lattice.start + by)


class _Placed(Pattern):
    """A pattern read at the places of tensors whose positions are pieces of a text."""

    def __init__(self, pattern: Pattern, queries: Pieces, keys: Pieces) -> None:
        self.pattern = pattern
        self.queries, self.keys = (
            torch.tensor([position for piece in side for position in piece], dtype=torch.int64)
            for side in (queries, keys)
        )

    def count(self, q: Tensor, k: Tensor) -> Tensor:
        return self.pattern.count(self.queries[q], self.keys[k])

    def at_head(self, head: int, heads: int) -> Pattern:
        placed = object.__new__(_Placed)
        placed.__dict__.update(self.__dict__, pattern=self.pattern.at_head(head, heads))
        return placed
