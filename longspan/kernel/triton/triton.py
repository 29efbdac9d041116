"""The triton kernel: a program of our own over lists of blocks, all heads in one call, each with lists of its own.

It is for what is no band and falls into many families of FlexAttention: different patterns on different heads, masks that
no formula of few operations gives. It has never been measured on a GPU, so it runs only where it is asked for. On CPU it
runs in Triton's interpreter, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.derive.blocks import blocks
from longspan.derive.terms import terms as disjoint
from longspan.kernel.flex.family import plain
from longspan.kernel.flex.lists import squares
from longspan.kernel.softmax.finite import capturing
from longspan.kernel.softmax.frame import Frame
from longspan.kernel.softmax.merge import merge_into
from longspan.kernel.softmax.rows import alike, widened, without_silent
from longspan.pattern import Pattern, Sum, simplify
from longspan.score import Scores

# The narrowest head that tensor cores multiply.
NARROWEST = 16
# The widest head in each dtype: of wider ones a block of the smallest size does not fit into registers.
WIDEST = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}
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
    """A relation on all heads.

    Attributes:
        rows, columns: its blocks by rows and by columns.
        masks: the pairs of partial blocks as bits, int32 `[masks, size, size / 32]`, queries down and keys across.
        turned: the same, keys down and queries across.
    """

    rows: Lines
    columns: Lines
    masks: Tensor
    turned: Tensor

    @property
    def size(self) -> int:
        """Places on a side of a block."""
        return self.masks.shape[1]


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
    dtype = str(query.dtype).removeprefix("torch.")
    if query.device.type != "cuda" and query.dtype == torch.bfloat16:
        return "takes float32 or float16 in Triton's interpreter, got bfloat16"
    if query.dtype not in WIDEST:
        return f"takes float32, bfloat16 or float16, got {dtype}"
    if _width(query, value) > WIDEST[query.dtype]:
        return f"takes {dtype} heads of {WIDEST[query.dtype]} numbers at most, got {_width(query, value)}"
    if capturing(query):
        return "cannot be captured in a CUDA graph: it waits to see whether its results are finite"
    if changes.limit is not None or changes.slopes is not None:
        return "changes no scores beside learned sinks"
    return None


def size(query: Tensor, value: Tensor) -> int:
    """Return how many places a side of a block has: as many as fit into registers, gradients of keys and values
    included."""
    return 64 if query.dtype != torch.float32 and _width(query, value) <= 64 else 32


def _width(query: Tensor, value: Tensor) -> int:
    return max(query.shape[-1], value.shape[-1])


@lru_cache(maxsize=16)
def terms(
    pattern: Pattern, heads: int, queries: range, keys: range, device: torch.device, size: int
) -> tuple[Term, ...]:
    """Return the blocks of a pattern, of `size` places on a side; a pair that counts several times is in as many
    terms."""
    apart = [tuple(_relations(pattern.at_head(head, heads))) for head in range(heads)]
    most = max(map(len, apart))
    return tuple(
        _term([parts[at] if at < len(parts) else None for parts in apart], queries, keys, device, size)
        for at in range(most)
    )


def _relations(single: Pattern) -> Iterator[Pattern]:
    """Yield relations that add up to what one head reads."""
    whole = simplify(single)
    for part in whole.parts if isinstance(whole, Sum) else (whole,):
        yield from (part,) if plain(part) else disjoint(part)


def _term(heads: list[Pattern | None], queries: range, keys: range, device: torch.device, size: int) -> Term:
    """Return one relation for each head, None for nothing, as lists."""
    down, across = -(-len(queries) // size), -(-len(keys) // size)
    known: dict[bytes, int] = {}
    full, part, numbers = [], [], []
    for head, relation in enumerate(heads):
        if relation is None:
            continue
        found = blocks(relation, queries=queries, keys=keys, size=size)
        one = (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        for kept, wanted in ((full, True), (part, False)):
            _, row, column = squares(found, one, wanted)
            kept.append(np.stack([np.full_like(row, head), row, column]))
        numbers += [
            known.setdefault(mask, len(known)) for mask in _masks(relation, part[-1][1:], queries, keys, size)
        ]
    whole, broken = (
        np.concatenate(kept, axis=1) if kept else np.zeros((3, 0), np.int64) for kept in (full, part)
    )
    table = np.frombuffer(b"".join(known) or bytes(size * size // 8), dtype=np.uint8)
    table = table.reshape(-1, size, size // 8)
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

    masks = (torch.from_numpy(side.view(np.int32)).to(device) for side in (table.copy(), _turned(table)))
    return Term(lines(1, down), lines(2, across), *masks)


def _turned(table: np.ndarray) -> np.ndarray:
    """Return masks with their columns as rows."""
    made = np.empty_like(table)
    for begin in range(0, len(table), TOGETHER):
        bits = np.unpackbits(table[begin : begin + TOGETHER], axis=-1, bitorder="little")
        made[begin : begin + TOGETHER] = np.packbits(bits.transpose(0, 2, 1), axis=-1, bitorder="little")
    return made


def _masks(relation: Pattern, partial: np.ndarray, queries: range, keys: range, size: int) -> Iterator[bytes]:
    """Yield the pairs of each partial block as bits, row by row."""
    place = torch.arange(size)
    for begin in range(0, partial.shape[1], TOGETHER):
        row, column = (
            torch.from_numpy(side[begin : begin + TOGETHER])[:, None] * size + place for side in partial
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
        blocks = -(-rows // term.size)
        strides = (stride for side in (query, key, value, part) for stride in side.stride()[:3])
        with _on(query):
            tiles.forward[(blocks, batch * heads)](
                query, key, value, part, part_lse, *strides, *_facts(query, key, work, blocks),
                *term.rows.tensors, term.masks, term.size, width, **_options(query),
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
        for program, into, listed, masks, length, number in (
            (tiles.backward_query, made[:1], term.rows, term.masks, rows, heads),
            (tiles.backward_keys, made[1:], term.columns, term.turned, key.shape[2], key.shape[1]),
        ):
            blocks = -(-length // term.size)
            with _on(query):
                program[(blocks, batch * number)](
                    *sides, *into, *strides, *_facts(query, key, work, blocks), *listed.tensors, masks,
                    term.size, width, **_options(query),
                )  # fmt: skip
        for grad, part in zip(grads, made, strict=True):
            grad.add_(part)
    return grads, bool(torch.stack([grad.sum() for grad in grads]).isfinite().all())


def _facts(query: Tensor, key: Tensor, work: Work, blocks: int) -> tuple[float, ...]:
    heads = query.shape[1]
    return heads, heads // key.shape[1], query.shape[2], key.shape[2], work.scale, blocks


def _on(query: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which programs start on the device of a tensor."""
    return torch.cuda.device(query.device) if query.is_cuda else nullcontext()


def _options(query: Tensor) -> dict[str, int]:
    """Return how programs are compiled: with more threads where there are more numbers than these have registers."""
    many = query.dtype == torch.float32 or query.shape[-1] > 128
    return {"num_warps": 8 if many else 4, "num_stages": 2}


def _taken(*sides: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one width, a power of 2, whose rows lie in one piece."""
    sides = alike(*sides)
    width = max(NARROWEST, 1 << (sides[0].shape[-1] - 1).bit_length())
    return sides if sides[0].shape[-1] == width else tuple(widened(side, width) for side in sides)


_frame = Frame(_sums, _slopes, torch.float32)
attend = _frame.attend
