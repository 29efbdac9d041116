"""The oracle, continued: methods of blocks, columns and tables, and the leaks of public code, key by key.

Nothing here comes from longspan either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from oracle import tally

# Tables.


def keys(heads: int, n: int, listed: Iterable[int]) -> np.ndarray:
    """The keys listed."""
    listed = list(listed)
    return tally(heads, n, lambda head, q: listed)


def documents(heads: int, n: int, ids: Sequence[int]) -> np.ndarray:
    """The keys with the query's own id, none where it is negative; positions without an id have no document."""

    def reads(head: int, q: int) -> list[int]:
        return [k for k, other in enumerate(ids) if q < len(ids) and other == ids[q] and other >= 0]

    return tally(heads, n, reads)


def blocks(heads: int, n: int, size: int, table: Callable[[int, int], Iterable[int]]) -> np.ndarray:
    """All keys of the blocks that `table(head, row)` names for the query's block."""
    return tally(
        heads,
        n,
        lambda head, q: [
            k for block in table(head, q // size) for k in range(block * size, block * size + size)
        ],
    )


def drawn(row: int, number: int, *, of: int = 0, seed: int = 0, stream: int = 0) -> list[int]:
    """Draw so many blocks for a row out of a hat that holds the candidates in order, none put back.

    Candidates are neither the first nor the last block, nor the row's own or a neighbour; row 1 has not the last but
    one, the last row but one not block 1, and the outermost rows have none. Where `of` is 0, those before the row.
    """
    if of:
        outer = {1: {of - 2}, of - 2: {1}}.get(row, set())
        hat = [b for b in range(1, of - 1) if abs(b - row) > 1 and b not in outer and 0 < row < of - 1]
    else:
        hat = [b for b in range(1, row) if abs(b - row) > 1]
    return [
        hat.pop(_hash(seed, stream, draw, row) * len(hat) // 2**32) for draw in range(min(number, len(hat)))
    ]


def _hash(*numbers: int) -> int:
    """Stir 32 bits: each number is xored in, multiplied twice after folding the upper half, and folded again."""
    state = 2654435769
    for number in numbers:
        state = (state ^ number) % 2**32
        for _ in range(2):
            state = (state ^ state // 2**16) * 73244475 % 2**32
        state ^= state // 2**16
    return state


# Methods.


def strided(
    heads: int, n: int, stride: int, *, factor: str = "both", near: int = 0, causal: bool = True
) -> np.ndarray:
    """Sparse Transformer, strided (1904.10509, section 4.3): itself and `stride` back, and all multiples of it away."""

    def reads(head: int, q: int) -> set[int]:
        reach = near - 1 if near else stride
        parts = {
            "near": set(range(q - reach, q + reach + 1)),
            "far": {k for k in range(n) if (q - k) % stride == 0},
        }
        return _factor(parts, factor, head < heads // 2, q, causal)

    return tally(heads, n, reads)


def fixed(
    heads: int,
    n: int,
    stride: int,
    summary: int,
    *,
    variants: int = 1,
    factor: str = "both",
    causal: bool = True,
) -> np.ndarray:
    """Sparse Transformer, fixed: the own block of `stride`, and so many columns of all blocks, counted from their end.

    Heads take turns (among those that read columns) with the columns, the first at the end of the blocks.
    """

    def reads(head: int, q: int) -> set[int]:
        turn = head - heads // 2 if factor == "divided" and head >= heads // 2 else head
        last = stride - turn % variants * summary
        columns = {k for k in range(n) if last - summary <= k % stride < last}
        parts = {"near": {k for k in range(n) if k // stride == q // stride}, "far": columns}
        return _factor(parts, factor, head < heads // 2, q, causal)

    return tally(heads, n, reads)


def _factor(parts: dict[str, set[int]], factor: str, first_half: bool, q: int, causal: bool) -> set[int]:
    if factor == "divided":
        factor = "near" if first_half else "far"
    keys = parts["near"] | parts["far"] if factor == "both" else parts[factor]
    return {k for k in keys if k <= q or not causal}


def bigbird(
    heads: int, n: int, size: int, table: Callable[[int, int], Iterable[int]], *, causal: bool
) -> np.ndarray:
    """BigBird (2007.14062, section 2): own and neighbouring blocks, the outermost ones, and those `table` names.

    The outermost blocks read everything. Causally the last block is not known, so it is the first one only.
    """
    last = (n - 1) // size

    def reads(head: int, q: int) -> set[int]:
        row = q // size
        chosen = {row - 1, row, row + 1, 0, *table(head, row)} | (set() if causal else {last})
        if row == 0 or (row == last and not causal):
            chosen = set(range(last + 1))
        return {k for k in range(n) if k // size in chosen and (k <= q or not causal)}

    return tally(heads, n, reads)


def neighborhood(heads: int, n: int, kernel: int, apart: int, *, causal: bool = False) -> np.ndarray:
    """Neighborhood attention (2204.07143, 2209.15001): the `kernel` nearest of the query's residue class.

    Left and right equally many, one more left where the kernel is even, and all inside the text; causally the last.
    """

    def reads(head: int, q: int) -> list[int]:
        own = list(range(q % apart, n, apart))
        place = own.index(q)
        if causal:
            return own[max(0, place - kernel + 1) : place + 1]
        start = min(max(place - kernel // 2, 0), len(own) - kernel)
        return own[start : start + kernel]

    return tally(heads, n, reads)


# Leaks.


def rolled_s2(heads: int, n: int, group: int, *, causal: bool = True) -> np.ndarray:
    """The pseudo-code of LongLoRA: everything rolls by half a group to the left, so the last group wraps around."""

    def reads(head: int, q: int) -> list[int]:
        shift = 0 if head < heads // 2 else group // 2
        place = (q - shift) % n
        start = place - place % group
        return [(slot + shift) % n for slot in range(start, place + 1 if causal else start + group)]

    return tally(heads, n, reads)


def rolled_scca(heads: int, n: int, size: int, shifts: Sequence[int], *, causal: bool = True) -> np.ndarray:
    """What a causal kernel sees that knows nothing of the roll: triangles in rolled places, read at true ones."""
    group = heads // len(shifts)

    def reads(head: int, q: int) -> list[int]:
        start = q - q % size
        slots = range(start, q + 1 if causal else start + size)
        return [(slot - shifts[head // group]) % n for slot in slots]

    return tally(heads, n, reads)
