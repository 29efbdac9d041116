"""A part of attention on one rank: its queries against keys that lie anywhere, by the kernels of one process.

Queries and keys are pieces of the text, ranges of positions one after the other in a tensor. A pattern is read over
each pair of pieces, and the parts of a plan are moved to where the pieces lie in the tensors. Where that does not
do, since scores count distances or no kernel takes strided views, each pair of pieces is attended to by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from longspan.kernel import reference
from longspan.kernel.heads import head_groups
from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.lattice.parts import Lattice
from longspan.kernel.native import native
from longspan.kernel.plan import KERNELS, choose, scores_refusal
from longspan.kernel.sdpa import sdpa
from longspan.kernel.sides import one_sided_groups
from longspan.kernel.softmax.frame import Work
from longspan.kernel.softmax.merge import merge, merge_into
from longspan.pattern import Pattern
from longspan.score import Scores

Pieces = tuple[range, ...]
_KERNELS = {"native": native, "sdpa": sdpa}


@dataclass(frozen=True)
class Reading:
    """What a part is asked beside tensors.

    Attributes:
        pattern: which keys each query reads.
        queries, keys: their positions.
        scale: what scores are multiplied by, above 0.
        changes: what else is done to scores, pair by pair; sinks belong to the whole, not to a part of it.
    """

    pattern: Pattern
    queries: Pieces
    keys: Pieces
    scale: float
    changes: Scores


def attend(query: Tensor, key: Tensor, value: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of a part."""
    if _kernel(query, key, reading) == "reference":
        return _defined(query, key, value, reading)
    if reading.changes.slopes is None:
        kernel = _KERNELS[_kernel(query, key, reading)]
        return kernel.forward(query, key, value, None, _work(query, reading))
    exact = torch.promote_types(query.dtype, torch.float32)
    output = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=exact)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=exact)
    for rows, columns, work in _works(query, reading):
        made = sdpa.forward(query[:, :, rows], key[:, :, columns], value[:, :, columns], None, work)
        merge_into(output[:, :, rows], lse[:, :, rows], *made)
    return output.to(query.dtype), lse


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reading: Reading,
    merged: tuple[Tensor, Tensor],
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one part adds to the gradients of query, key and value.

    Law: with the output and log-sum-exp of all parts merged, the gradients of the parts add up to those of the whole.
    """
    output, lse = merged
    if _kernel(query, key, reading) == "reference":
        return _defined_gradients(query, key, value, reading, merged, grad_output)
    none = torch.zeros_like(lse)
    if reading.changes.slopes is None:
        work = _work(query, reading)
        kernel = _KERNELS[_kernel(query, key, reading)]
        return kernel.backward(grad_output, none, query, key, value, None, output, lse, work)[:3]
    grads = tuple(torch.zeros(side.shape, dtype=lse.dtype) for side in (query, key, value))
    for rows, columns, work in _works(query, reading):
        made = sdpa.backward(
            *(side[:, :, rows] for side in (grad_output, none, query)),
            *(side[:, :, columns] for side in (key, value)),
            None,
            *(side[:, :, rows] for side in (output, lse)),
            work,
        )[:3]
        for grad, part, taken in zip(grads, made, (rows, columns, columns), strict=True):
            grad[:, :, taken] += part
    return grads


def _kernel(query: Tensor, key: Tensor, reading: Reading) -> str:
    refusals = {
        "native": native.refusal(query, reading.changes, asked=False),
        "sdpa": sdpa.refusal(query, reading.changes),
        "reference": scores_refusal(reference.scores_bytes(query, key)),
    }
    facts = {"pattern": str(reading.pattern), "query": f"{list(query.shape)} {query.dtype}"}
    # The others take whole texts only.
    others = dict.fromkeys(KERNELS, "does not take a part of a text")
    return choose(others | refusals, None, facts)[0]


def _defined(query: Tensor, key: Tensor, value: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Attend by the definition, in a way that gradients flow through."""
    keys = tuple(_slices(reading.keys))
    outputs, lses = [], []
    for queried, rows in _slices(reading.queries):
        made = [
            reference.attend(
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                reading.pattern,
                queries=queried,
                scale=reading.scale,
                changes=reading.changes,
                keys=read,
            )
            for read, columns in keys
        ]
        output, lse = merge(made) if made else _nothing(query[:, :, rows], value)
        outputs.append(output)
        lses.append(lse)
    if not outputs:
        return _nothing(query, value)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_zeros((*query.shape[:3], value.shape[3])),
        torch.full(query.shape[:3], -torch.inf, dtype=exact, device=query.device),
    )


def _defined_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reading: Reading,
    merged: tuple[Tensor, Tensor],
    grad_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    output, lse = merged
    leaves = [side.detach().requires_grad_() for side in (query, key, value)]
    with torch.enable_grad():
        part_output, part_lse = _defined(*leaves, reading)
    # The whole is the sum of outputs, each weighed by its share exp(part_lse - lse), and so are their gradients.
    share = (part_lse.detach() - lse.masked_fill(lse.isneginf(), 0.0)).exp().unsqueeze(-1)
    into = share * grad_output.to(lse.dtype)
    into_lse = (into * (part_output.detach() - output).to(lse.dtype)).sum(dim=-1)
    found = torch.autograd.grad(
        [part_output, part_lse], leaves, [into.to(part_output.dtype), into_lse], allow_unused=True
    )
    return tuple(
        torch.zeros_like(side) if grad is None else grad for side, grad in zip(leaves, found, strict=True)
    )


def _work(query: Tensor, reading: Reading) -> Work:
    groups = _groups(reading.pattern, query.shape[1], reading.queries, reading.keys)
    return Work(groups, range(query.shape[2]), reading.scale)


def _works(query: Tensor, reading: Reading) -> Iterator[tuple[slice, slice, Work]]:
    """Yield the rows, the columns and the work of each pair of pieces that has any."""
    slopes = reading.changes.slopes
    for (queried, rows), (read, columns) in product(_slices(reading.queries), _slices(reading.keys)):
        groups = one_sided_groups(reading.pattern, query.shape[1], queried, read)
        if any(group.parts for group in groups):
            yield rows, columns, Work(groups, queried, reading.scale, slopes, (read.start, read.step))


def _slices(pieces: Pieces) -> Iterator[tuple[range, slice]]:
    """Yield the pieces, and where they lie in a tensor."""
    first = 0
    for piece in pieces:
        yield piece, slice(first, first + len(piece))
        first += len(piece)


@lru_cache(maxsize=1024)
def _groups(pattern: Pattern, heads: int, queries: Pieces, keys: Pieces) -> tuple[HeadGroup, ...]:
    """Return the groups of heads of every pair of pieces, moved to where the pieces lie in the tensors."""
    moved = []
    for queried, rows in _slices(queries):
        for number, (read, columns) in enumerate(_slices(keys)):
            for group in head_groups(pattern, heads, queried, read):
                parts = tuple(
                    replace(
                        part,
                        query=_moved(part.query, rows.start),
                        key=_moved(part.key, columns.start),
                        fresh=part.fresh and number == 0,
                    )
                    for part in group.parts
                )
                if parts:
                    moved.append(HeadGroup(group.heads, parts))
    return tuple(moved)


def _moved(lattice: Lattice, by: int) -> Lattice:
    return replace(lattice, start=lattice.start + by)
