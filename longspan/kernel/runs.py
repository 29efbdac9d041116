"""Runs: the blocks of a term, joined into stretches of keys that rows of queries read in one go.

A run is a rectangle of whole blocks. Side by side in a row, full and partial blocks become one run with a mask;
full rows one above the other become one tall run; a triangle that stands alone needs no mask. Runs that look
alike (same shape, same mask) are found here too, so that a kernel can take all of them in one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longspan.derive.blocks import FULL, PARTIAL, TRIANGLE, Blocks
from longspan.pattern import Pattern

# Blocks that one run with a mask may span; wider ones are cut into a masked edge and an interior without mask.
WIDEST = 48
PLAIN, MASKED, CAUSAL = 0, 1, 2


@dataclass(frozen=True)
class Runs:
    """Rectangles of places, as parallel int64 arrays.

    Attributes:
        query, key: index of the first query and key in their tensors.
        rows, columns: places on each side.
        kind: `PLAIN` (every pair), `MASKED` (the pairs of the pattern) or `CAUSAL` (the lower triangle).
        look: runs with equal `look` have equal shape and equal masks.
    """

    query: np.ndarray
    key: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    kind: np.ndarray
    look: np.ndarray


def runs(pattern: Pattern, blocks: Blocks) -> Runs:
    """Join the blocks of a relation into runs, disjoint and complete."""
    alone, joined = _intervals(blocks)
    stretches = np.concatenate([_stretches(joined), alone])
    query = stretches["query_class"] + stretches["row"] * blocks.size * blocks.query_side.step
    key = stretches["key_class"] + stretches["start"] * blocks.size * blocks.key_side.step
    rows = np.minimum(
        stretches["height"] * blocks.size,
        blocks.query_side.lengths[stretches["query_class"]] - stretches["row"] * blocks.size,
    )
    columns = np.minimum(
        (stretches["stop"] - stretches["start"]) * blocks.size,
        blocks.key_side.lengths[stretches["key_class"]] - stretches["start"] * blocks.size,
    )
    kind = stretches["kind"].astype(np.int64)
    facts = [kind, rows, columns]
    masked = kind == MASKED
    if masked.any():
        facts += _mask_facts(pattern, blocks, query, key, rows, columns, masked)
    _, look = np.unique(np.stack(facts), axis=1, return_inverse=True)
    return Runs(query, key, rows, columns, kind, look.ravel())


_STRETCH = np.dtype(
    [(name, np.int64) for name in ("query_class", "key_class", "row", "height", "start", "stop", "kind")]
)


def _stretch(blocks: Blocks, chosen: np.ndarray, repeat: np.ndarray, kind: int) -> np.ndarray:
    """Return one stretch per row of the chosen rectangles, spanning their width."""
    made = np.zeros(int(repeat.sum()), dtype=_STRETCH)
    place = np.arange(len(made)) - np.repeat(np.cumsum(repeat) - repeat, repeat)
    for name in ("query_class", "key_class"):
        made[name] = np.repeat(getattr(blocks, name)[chosen], repeat)
    made["row"] = np.repeat(blocks.row[chosen], repeat) + place
    made["height"] = 1
    made["start"] = np.repeat(blocks.column[chosen], repeat)
    made["stop"] = made["start"] + np.repeat(blocks.span[chosen], repeat)
    made["kind"] = kind
    return made


def _intervals(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles that stand alone, and all else as one stretch per row of blocks."""
    full, partial, triangle = (np.flatnonzero(blocks.kind == kind) for kind in (FULL, PARTIAL, TRIANGLE))
    plain = _stretch(blocks, full, blocks.span[full], PLAIN)
    masked = _stretch(blocks, partial, blocks.span[partial], MASKED)
    rows_of_triangles = _stretch(blocks, triangle, blocks.span[triangle], CAUSAL)
    # A triangle with blocks at its left belongs to a band and is cut into rows like the rest of it.
    others = np.concatenate([plain, masked])
    touching = np.isin(_address(rows_of_triangles, "start"), _address(others, "stop"))
    owner = np.repeat(np.arange(len(triangle)), blocks.span[triangle])
    in_band = np.zeros(len(triangle), dtype=bool)
    in_band[owner[touching]] = True

    alone = _stretch(blocks, triangle[~in_band], np.ones((~in_band).sum(), dtype=np.int64), CAUSAL)
    alone["height"] = blocks.span[triangle[~in_band]]
    cut = rows_of_triangles[in_band[owner]]
    depth = cut["row"] - np.repeat(blocks.row[triangle[in_band]], blocks.span[triangle[in_band]])
    before, corner = cut.copy(), cut.copy()
    before["stop"], before["kind"] = cut["start"] + depth, PLAIN
    corner["start"], corner["stop"], corner["kind"] = before["stop"], before["stop"] + 1, MASKED
    return alone, np.concatenate([others, before[depth > 0], corner])


def _address(stretches: np.ndarray, edge: str) -> np.ndarray:
    """Return one number per row and column edge, for looking up neighbours."""
    large = np.int64(1) << 24
    classes = stretches["query_class"] * 65_536 + stretches["key_class"]
    return (classes * large + stretches["row"]) * large + stretches[edge]


def _stretches(intervals: np.ndarray) -> np.ndarray:
    """Join neighbours in a row, then equal plain rows one above the other."""
    if not len(intervals):
        return intervals
    ordered = np.sort(intervals, order=["query_class", "key_class", "row", "start"])
    same_row = _same(ordered, "query_class", "key_class", "row")
    joins = same_row & (ordered["start"][1:] == ordered["stop"][:-1])
    wide = _width(ordered, joins) > WIDEST
    same_kind = (ordered["kind"][1:] == ordered["kind"][:-1]) & (
        (ordered["kind"][1:] == PLAIN) | (ordered["start"][1:] % WIDEST > 0)
    )
    joined = _joined(ordered, joins & (~wide[1:] | same_kind))

    plain = joined[joined["kind"] == PLAIN]
    plain = np.sort(plain, order=["query_class", "key_class", "start", "stop", "row"])
    above = _same(plain, "query_class", "key_class", "start", "stop") & (
        plain["row"][1:] == plain["row"][:-1] + 1
    )
    first = np.flatnonzero(np.concatenate([[True], ~above])) if len(plain) else np.zeros(0, dtype=np.int64)
    tall = plain[first]
    tall["height"] = np.diff(np.append(first, len(plain)))
    return np.concatenate([tall, joined[joined["kind"] != PLAIN]])


def _same(stretches: np.ndarray, *names: str) -> np.ndarray:
    """Say for each stretch but the first whether it equals the one before it in the fields named."""
    equal = np.ones(max(0, len(stretches) - 1), dtype=bool)
    for name in names:
        equal &= stretches[name][1:] == stretches[name][:-1]
    return equal


def _width(ordered: np.ndarray, joins: np.ndarray) -> np.ndarray:
    """Return for each stretch the width of the chain of neighbours that it belongs to."""
    first = np.flatnonzero(np.concatenate([[True], ~joins]))
    last = np.append(first[1:], len(ordered)) - 1
    width = ordered["stop"][last] - ordered["start"][first]
    return np.repeat(width, last - first + 1)


def _joined(ordered: np.ndarray, joins: np.ndarray) -> np.ndarray:
    first = np.flatnonzero(np.concatenate([[True], ~joins]))
    last = np.append(first[1:], len(ordered)) - 1
    joined = ordered[first]
    joined["stop"] = ordered["stop"][last]
    joined["kind"] = np.maximum.reduceat(ordered["kind"], first)
    return joined


def _mask_facts(
    pattern: Pattern,
    blocks: Blocks,
    query: np.ndarray,
    key: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    masked: np.ndarray,
) -> list[np.ndarray]:
    """Return arrays that are equal for two masked runs of one shape only if their masks are equal."""
    q = blocks.query_side.positions.start + query * blocks.query_side.positions.step
    k = blocks.key_side.positions.start + key * blocks.key_side.positions.step
    period = pattern.period
    if period is not None:
        # A shift by the period changes no pair, so distance and phase decide the mask.
        return [np.where(masked, q - k, 0), np.where(masked, q % period, 0)]
    content = np.full(len(query), -1)
    seen: dict[bytes, int] = {}
    for index in np.flatnonzero(masked):
        allowed = exact(pattern, blocks, int(query[index]), int(key[index]), rows[index], columns[index])
        packed = np.packbits(allowed).tobytes()
        content[index] = seen.setdefault(packed, len(seen))
    return [content]


def exact(pattern: Pattern, blocks: Blocks, query: int, key: int, rows: int, columns: int) -> np.ndarray:
    """Return the exact mask of one rectangle of places, bool `[rows, columns]`."""
    sides = ((blocks.query_side, query, rows), (blocks.key_side, key, columns))
    q, k = (
        side.positions.start + (first + np.arange(count) * side.step) * side.positions.step
        for side, first, count in sides
    )
    return np.broadcast_to(pattern.contains(q[:, None], k[None, :]), (int(rows), int(columns)))
