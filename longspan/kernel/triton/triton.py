"""The triton kernel: a program of our own over lists of blocks, all heads in one call, each with lists of its own.

It is for what is no band and falls into many families of FlexAttention: different patterns on different heads, masks that
no formula of few operations gives. It has never been measured on a GPU, so it runs only where it is asked for. On CPU it
runs in Triton's interpreter, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from longspan.derive.blocks import blocks
from longspan.derive.terms import terms as disjoint
from longspan.kernel.flex.family import plain
from longspan.kernel.flex.lists import squares
from longspan.kernel.softmax.frame import Frame
from longspan.kernel.softmax.merge import merge_into
from longspan.kernel.softmax.rows import alike, widened, without_silent
from longspan.pattern import Pattern, Sum, simplify
from longspan.score import Scores

# Places on a side of a block, and the narrowest head that tensor cores multiply.
SIZE, NARROWEST, WIDEST = 64, 16, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Masks that are made at a time.
TOGETHER = 4_096


@dataclass(frozen=True, eq=False)
class Lines:
    """Blocks line by line, all heads one after the other.

    Attributes:
        full, fulls: where the full blocks of each line begin, int32 `[lines + 1]`, and which they are.
        part, parts, numbers: the same of the partial ones, and the mask of each.
    """

    full: Tensor
    fulls: Tensor
    part: Tensor
    parts: Tensor
    numbers: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.full, self.fulls, self.part, self.parts, self.numbers


@dataclass(frozen=True, eq=False)
class Term:
    """A relation on all heads: its blocks by rows and by columns, and its masks, int32 `[masks, size, size / 32]`."""

    rows: Lines
    columns: Lines
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Work:
    """What is asked of the kernel beside tensors: terms that add up, and what scores are multiplied by."""

    terms: tuple[Term, ...]
    scale: float
    slopes: None = None


def refusal(query: Tensor, value: Tensor, changes: Scores) -> str | None:
    """Say why this kernel cannot take these tensors and changes of scores, or None where it can."""
    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on cuda, and on cpu in Triton's interpreter (TRITON_INTERPRET=1), got {query.device}"
    if query.dtype not in DTYPES:
        return f"takes float32, bfloat16 or float16, got {str(query.dtype).removeprefix('torch.')}"
    if max(query.shape[-1], value.shape[-1]) > WIDEST:
        return f"takes heads of {WIDEST} numbers at most, got {max(query.shape[-1], value.shape[-1])}"
    if changes.limit is not None or changes.slopes is not None:
        return "changes no scores beside learned sinks"
    return None


@lru_cache(maxsize=16)
def terms(
    pattern: Pattern, heads: int, queries: range, keys: range, device: torch.device
) -> tuple[Term, ...]:
    """Return the blocks of a pattern; a pair that counts several times is in as many terms."""
    apart = [tuple(_relations(pattern.at_head(head, heads))) for head in range(heads)]
    most = max(map(len, apart))
    return tuple(
        _term([parts[at] if at < len(parts) else None for parts in apart], queries, keys, device)
        for at in range(most)
    )


def _relations(single: Pattern) -> Iterator[Pattern]:
    """Yield relations that add up to what one head reads."""
    whole = simplify(single)
    for part in whole.parts if isinstance(whole, Sum) else (whole,):
        yield from (part,) if plain(part) else disjoint(part)


def _term(heads: list[Pattern | None], queries: range, keys: range, device: torch.device) -> Term:
    """Return one relation for each head, None for nothing, as lists."""
    down, across = -(-len(queries) // SIZE), -(-len(keys) // SIZE)
    known: dict[bytes, int] = {}
    full, part, numbers = [], [], []
    for head, relation in enumerate(heads):
        if relation is None:
            continue
        found = blocks(relation, queries=queries, keys=keys, size=SIZE)
        one = (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        for kept, wanted in ((full, True), (part, False)):
            _, row, column = squares(found, one, wanted)
            kept.append(np.stack([np.full_like(row, head), row, column]))
        numbers += [
            known.setdefault(mask, len(known)) for mask in _masks(relation, part[-1][1:], queries, keys)
        ]
    whole, broken = (
        np.concatenate(kept, axis=1) if kept else np.zeros((3, 0), np.int64) for kept in (full, part)
    )
    table = np.frombuffer(b"".join(known) or bytes(SIZE * SIZE // 8), dtype=np.int32)
    which = np.array(numbers, dtype=np.int64)

    def lines(axis: int, length: int) -> Lines:
        made: list[np.ndarray] = []
        for listed, number in ((whole, None), (broken, which)):
            line = listed[0] * length + listed[axis]
            order = np.argsort(line, kind="stable")
            count = np.bincount(line, minlength=len(heads) * length)
            made += [np.concatenate([[0], np.cumsum(count)]), listed[3 - axis][order]]
            if number is not None:
                made.append(number[order])
        # An empty list has no address.
        return Lines(
            *(
                torch.as_tensor(side if len(side) else np.zeros(1), dtype=torch.int32, device=device)
                for side in made
            )
        )

    return Term(lines(1, down), lines(2, across), torch.from_numpy(table.copy()).to(device))


def _masks(relation: Pattern, partial: np.ndarray, queries: range, keys: range) -> Iterator[bytes]:
    """Yield the pairs of each partial block as bits, row by row."""
    place = torch.arange(SIZE)
    for begin in range(0, partial.shape[1], TOGETHER):
        row, column = (
            torch.from_numpy(side[begin : begin + TOGETHER])[:, None] * SIZE + place for side in partial
        )
        q, k = queries.start + queries.step * row[:, :, None], keys.start + keys.step * column[:, None, :]
        inside = (row < len(queries))[:, :, None] & (column < len(keys))[:, None, :]
        read = torch.as_tensor(relation.contains(q, k)).expand(inside.shape) & inside
        for mask in np.packbits(read.numpy(), axis=-1, bitorder="little"):
            yield mask.tobytes()


def _sums(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor, bool]:
    """Return output and log-sum-exp over all terms, and whether all is finite."""
    from longspan.kernel.triton import tiles

    query, key, value = _taken(query, key, value)
    batch, heads, rows, width = query.shape
    output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.full(query.shape[:-1], -torch.inf, device=query.device)
    for term in work.terms if query.numel() else ():
        part, part_lse = torch.empty_like(output), torch.empty_like(lse)
        blocks = -(-rows // SIZE)
        strides = (stride for side in (query, key, value, part) for stride in side.stride()[:3])
        tiles.forward[(blocks, batch * heads)](
            query, key, value, part, part_lse, *strides, *_facts(query, key, work, blocks),
            *term.rows.tensors, term.masks, SIZE, width,
        )  # fmt: skip
        merge_into(output, lse, part, part_lse)
    return output, lse, bool(output.sum().isfinite())


def _slopes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    work: Work,
) -> tuple[list[Tensor], bool]:
    """Return the gradients of query, key and value, and whether all is finite."""
    from longspan.kernel.triton import tiles

    lse, grad_lse = without_silent(lse, grad_lse)
    along = ((grad_output.float() * output.float()).sum(-1) - grad_lse.float()).contiguous()
    query, key, value, grad_output = _taken(query, key, value, grad_output)
    batch, heads, rows, width = query.shape
    grads = [torch.zeros(side.shape, device=side.device) for side in (query, key, value)]
    lse = lse.float().contiguous()
    for term in work.terms if query.numel() and key.numel() else ():
        made = [torch.empty_like(grad) for grad in grads]
        strides = [stride for side in (query, key, value, grad_output) for stride in side.stride()[:3]]
        sides = (query, key, value, grad_output, lse, along)
        for program, into, listed, length, number in (
            (tiles.backward_query, made[:1], term.rows, rows, heads),
            (tiles.backward_keys, made[1:], term.columns, key.shape[2], key.shape[1]),
        ):
            blocks = -(-length // SIZE)
            program[(blocks, batch * number)](
                *sides,
                *into,
                *strides,
                *_facts(query, key, work, blocks),
                *listed.tensors,
                term.masks,
                SIZE,
                width,
            )
        for grad, part in zip(grads, made, strict=True):
            grad.add_(part)
    return grads, bool(torch.stack([grad.sum() for grad in grads]).isfinite().all())


def _facts(query: Tensor, key: Tensor, work: Work, blocks: int) -> tuple[float, ...]:
    heads = query.shape[1]
    return heads, heads // key.shape[1], query.shape[2], key.shape[2], work.scale, blocks


def _taken(*sides: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one width, a power of 2, whose rows lie in one piece."""
    sides = alike(*sides)
    width = max(NARROWEST, 1 << (sides[0].shape[-1] - 1).bit_length())
    return sides if sides[0].shape[-1] == width else tuple(widened(side, width) for side in sides)


_frame = Frame(_sums, _slopes, torch.float32)
attend = _frame.attend
