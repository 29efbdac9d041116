"""The summary: what a plan comes to, counted from its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from longspan.derive.blocks import TRIANGLE, Blocks, blocks
from longspan.derive.region import regions
from longspan.derive.terms import terms
from longspan.derive.tiling import COMPARABLE, SIZE
from longspan.kernel.lattice.calls import slices
from longspan.kernel.lattice.parts import Lattice, Part
from longspan.pattern import Complement, Everything, Pattern


@dataclass(frozen=True)
class BlockCounts:
    """Blocks of 128 by 128 places, or what is left of them at an edge."""

    full: int
    partial: int
    empty: int


def block_counts(parts: Sequence[Part]) -> tuple[int, int]:
    """Return how many blocks of some parts are full and how many are partial, exactly.

    Example:
        >>> from longspan.kernel.lattice.parts import parts
        >>> from longspan.pattern import Causal
        >>> block_counts(parts(Causal(), range(512), range(512)))
        (6, 4)
    """
    full = partial = 0
    for part in parts:
        down, across = (range(0, side.places, SIZE) for side in (part.query, part.key))
        if part.allowed is not None:
            rows, columns = (
                np.diff(np.append(side, end))
                for side, end in zip((down, across), part.allowed.shape, strict=True)
            )
            held = np.add.reduceat(
                np.add.reduceat(part.allowed, down, axis=0, dtype=np.int64), across, axis=1
            )
            whole = int((held == np.outer(rows, columns)).sum())
            broken = int((held > 0).sum()) - whole
        elif part.causal:
            # A last block of one row is a whole one.
            broken = len(down) - (part.query.places % SIZE == 1)
            whole = len(down) * (len(down) + 1) // 2 - broken
        else:
            whole, broken = len(down) * len(across), 0
        full += whole * part.rectangles
        partial += broken * part.rectangles
    return full, partial


def most_keys(parts: Sequence[Part], queries: int) -> int:
    """Return the most keys that one query reads, exactly, and counted as often as they are read.

    Example:
        >>> from longspan.kernel.lattice.parts import parts
        >>> from longspan.pattern import Causal, Window
        >>> most_keys(parts(Causal() & Window(100), range(512), range(512)), 512)
        100
    """
    read = np.zeros(queries, dtype=np.int64)
    for part in parts:
        query = part.query
        if part.allowed is not None:
            each = part.allowed.sum(axis=1)
        else:
            each = np.arange(1, query.places + 1) if part.causal else np.int64(part.key.places)
        stride = read.itemsize
        for outer in range(part.shape[0]):
            # Rectangles side by side share no query, those one after the other may.
            rows = as_strided(
                read[query.start + outer * query.outer :],
                (part.shape[1], query.places),
                (query.inner * stride, query.step * stride),
            )
            rows += each
    return int(read.max(initial=0))


def contiguous_area(pattern: Pattern, queries: range, keys: range) -> tuple[int, bool]:
    """Return how many pairs the pattern of one head would compute in contiguous blocks, and whether that is exact.

    Over a text so long that a pattern of residues has too many blocks to be counted, the answer is safe: it takes
    every block for one that is read which would be if all residues were.
    """
    area, exact = 0, True
    for term in terms(pattern):
        for region in regions(term, queries, keys, size=SIZE):
            squares = -(-len(region.queries) // SIZE) * -(-len(region.keys) // SIZE)
            counted = region.term.steps == (1, 1) or squares <= COMPARABLE
            exact &= counted
            term_read = region.term if counted else _all_residues(region.term)
            found = blocks(term_read, queries=region.queries, keys=region.keys, size=SIZE)
            area += (found.area + (0 if counted else _corners(found))) * region.times
    return area, exact


def _corners(found: Blocks) -> int:
    """Return the pairs that triangles leave out of the blocks on their diagonal."""
    rows = found.extents()[0][found.kind == TRIANGLE]
    whole, rest = np.divmod(rows, found.size)
    return int((whole * (found.size * (found.size - 1)) + rest * (rest - 1)).sum()) // 2


def _all_residues(pattern: Pattern) -> Pattern:
    """Return a pattern that reads more: all residues where the given one reads some."""
    if isinstance(pattern, Complement):
        return pattern
    if not pattern.operands:
        return pattern if pattern.steps == (1, 1) else Everything()
    return pattern.rebuilt(tuple(map(_all_residues, pattern.operands)))


def workspace(
    parts: Sequence[Part],
    *,
    heads: int,
    size: int,
    limit: int,
    kept: int,
    needed: Sequence[Callable[[Lattice, Lattice], int]],
) -> tuple[int, int]:
    """Return the bytes that the sdpa kernel takes at most for some parts, forward and backward.

    Counted are temporary results and biases, for one row of a batch. Inputs, outputs and gradients are not. The
    answer is safe: a call may need less than what it is counted with. It does not grow with the length of a text.

    Args:
        parts: what one group of heads reads.
        heads: number of heads of the group.
        size: bytes of a number.
        limit: bytes of the temporary results of one call.
        kept: bytes of biases that are kept.
        needed: what one rectangle on one head needs, forward and backward, as `slices` takes it.
    """
    forward, backward = [0], [0]
    for part in parts:
        each = []
        for direction in needed:
            # The first slice is the largest one.
            first = next(slices(part, direction, limit // size))
            numbers = direction(first.query, first.key) * size
            each.append(min(heads * part.shape[1] * numbers, max(limit, numbers)))
        # What the call before gave is held until this one is done, and merging takes a difference.
        forward.append(each[0] * (2 if part.fresh else 3))
        # PyTorch's kernel lays strided views out anew, and sums come before they are added.
        backward.append(each[1] * 4)
    masks = [part.allowed.size * size for part in parts if part.allowed is not None]
    biases = min(sum(masks), kept) + 2 * max(masks, default=0)
    return max(forward) + biases, max(backward) + biases
