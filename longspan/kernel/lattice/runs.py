"""Runs: the blocks of a term, joined into stretches of keys that rows of queries read in one go.

A run is a rectangle of whole blocks. Side by side in a row, full and partial blocks become one run with a mask;
full rows one above the other become one tall run; a triangle that stands alone needs no mask. Runs that look
alike (same shape, same mask) are found here too, so that a kernel can take all of them in one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longspan.derive.blocks import FULL, PARTIAL, TRIANGLE, Blocks
from longspan.derive.tiling import Tile

# Blocks that one run with a mask may span; wider ones are cut into a masked edge and an interior without mask.
WIDEST = 48
# Rows of blocks in one run without a mask; taller ones are cut into several, so that what a call gives stays small.
TALLEST = 64
PLAIN, MASKED, CAUSAL = 0, 1, 2
# More than there are rows of blocks.
_ROWS = np.int64(1) << 24


@dataclass(frozen=True)
class Runs:
    """Rectangles of places, as parallel int64 arrays.

    Attributes:
        query, key: index of the first query and key in their tensors.
        rows, columns: places on each side.
        kind: `PLAIN` (every pair), `MASKED` (the pairs of the pattern) or `CAUSAL` (the lower triangle).
        look: runs with equal `look` have equal shape and equal masks.
        steps: distance from one query to the next, and from one key to the next, as indices.
        masks: for each look the pairs of a rectangle, bool `[rows, columns]`, or None where there is no mask.
    """

    query: np.ndarray
    key: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    kind: np.ndarray
    look: np.ndarray
    steps: tuple[int, int]
    masks: tuple[np.ndarray | None, ...]


def alike(*facts: np.ndarray) -> np.ndarray:
    """Number columns of facts, equal ones by equal numbers from 0 on."""
    if len(facts[0]) < 2:
        return np.zeros(len(facts[0]), dtype=np.int64)
    return np.unique(np.stack(facts), axis=1, return_inverse=True)[1].ravel()


def runs(tile: Tile) -> Runs:
    """Join the blocks of a relation into runs, disjoint and complete."""
    blocks = tile.blocks
    corners, tall, joined = _intervals(blocks)
    stretches = np.concatenate([_stretches(tall, joined), corners])
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
    kind = stretches["kind"].copy()
    columns = np.where(kind == CAUSAL, rows, columns)
    facts = [kind, rows, columns]
    masked = kind == MASKED
    if masked.any():
        facts.append(_masks(tile, query, key, rows, columns, masked))
    look = alike(*facts)
    samples = np.unique(look, return_index=True)[1]
    masks = tuple(
        np.array(tile.mask(query[one], key[one], rows[one], columns[one])) if masked[one] else None
        for one in samples.tolist()
    )
    return Runs(query, key, rows, columns, kind, look, (blocks.query_side.step, blocks.key_side.step), masks)


_STRETCH = np.dtype(
    [(name, np.int64) for name in ("query_class", "key_class", "row", "height", "start", "stop", "kind")]
)


def _whole(blocks: Blocks, chosen: np.ndarray, kind: int) -> np.ndarray:
    """Return one stretch per rectangle, as tall and as wide as the text lets it be."""
    rows, columns = (-(-places[chosen] // blocks.size) for places in blocks.extents())
    made = np.zeros(len(chosen), dtype=_STRETCH)
    made["query_class"], made["key_class"] = blocks.query_class[chosen], blocks.key_class[chosen]
    made["row"], made["height"] = blocks.row[chosen], rows
    made["start"], made["stop"] = blocks.column[chosen], blocks.column[chosen] + columns
    made["kind"] = kind
    return made


def _by_row(whole: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut stretches into rows of blocks; also return which one each came from, and how far down in it."""
    owner = np.repeat(np.arange(len(whole)), whole["height"])
    depth = np.arange(len(owner)) - np.repeat(np.cumsum(whole["height"]) - whole["height"], whole["height"])
    rows = whole[owner]
    rows["row"] += depth
    rows["height"] = 1
    return rows, owner, depth


def _intervals(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the triangles that stand alone, the full rectangles that do, and all else as one stretch per row of
    blocks."""
    full, partial, triangle = (
        _whole(blocks, np.flatnonzero(blocks.kind == found), kind)
        for found, kind in ((FULL, PLAIN), (PARTIAL, MASKED), (TRIANGLE, CAUSAL))
    )
    single = _single(np.concatenate([full, partial, triangle]))[: len(full)]
    others = np.concatenate([_by_row(full[~single])[0], partial])
    # A triangle with blocks at its left belongs to a band and is cut into rows like the rest of it.
    rows, owner, depth = _by_row(triangle)
    touching = _among(_address(rows, "start"), _address(others, "stop"))
    in_band = np.zeros(len(triangle), dtype=bool)
    in_band[owner[touching]] = True
    cut = in_band[owner]
    before, corner, depth = rows[cut], rows[cut], depth[cut]
    before["stop"], before["kind"] = before["start"] + depth, PLAIN
    corner["start"], corner["kind"] = before["stop"], MASKED
    corner["stop"] = corner["start"] + 1
    return triangle[~in_band], full[single], np.concatenate([others, before[depth > 0], corner])


def _single(stretches: np.ndarray) -> np.ndarray:
    """Say which stretches have no other one beside them in any row."""
    first = (stretches["query_class"] * 65_536 + stretches["key_class"]) * _ROWS + stretches["row"]
    order = np.argsort(first, kind="stable")
    first, last = first[order], (first + stretches["height"])[order]
    clear = first[1:] >= np.maximum.accumulate(last)[:-1]
    single = np.zeros(len(stretches), dtype=bool)
    single[order] = np.append(True, clear) & np.append(clear, True) if len(order) else True
    return single


def _among(numbers: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Say which numbers are listed."""
    listed = np.append(np.sort(listed), np.iinfo(np.int64).max)
    return listed[np.searchsorted(listed, numbers)] == numbers


def _address(stretches: np.ndarray, edge: str) -> np.ndarray:
    """Return one number per row and column edge, for looking up neighbours."""
    classes = stretches["query_class"] * 65_536 + stretches["key_class"]
    return (classes * _ROWS + stretches["row"]) * _ROWS + stretches[edge]


def _stretches(tall: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Join neighbours in a row, then equal plain ones one above the other."""
    joined = _side_by_side(intervals)
    plain = np.concatenate([tall, joined[joined["kind"] == PLAIN]])
    return np.concatenate([_upon_another(plain), joined[joined["kind"] != PLAIN]])


def _side_by_side(intervals: np.ndarray) -> np.ndarray:
    if not len(intervals):
        return intervals
    ordered = _sorted(intervals, "query_class", "key_class", "row", "start")
    same_row = _same(ordered, "query_class", "key_class", "row")
    joins = same_row & (ordered["start"][1:] == ordered["stop"][:-1])
    wide = _width(ordered, joins) > WIDEST
    same_kind = (ordered["kind"][1:] == ordered["kind"][:-1]) & (
        (ordered["kind"][1:] == PLAIN) | (ordered["start"][1:] % WIDEST > 0)
    )
    return _joined(ordered, joins & (~wide[1:] | same_kind))


def _upon_another(plain: np.ndarray) -> np.ndarray:
    if not len(plain):
        return plain
    plain = _sorted(plain, "query_class", "key_class", "start", "stop", "row")
    above = _same(plain, "query_class", "key_class", "start", "stop")
    above &= plain["row"][1:] == plain["row"][:-1] + plain["height"][:-1]
    first = np.flatnonzero(np.concatenate([[True], ~above]))
    height = np.add.reduceat(plain["height"], first)
    number = -(-height // TALLEST)
    owner = np.repeat(np.arange(len(first)), number)
    depth = (np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number)) * TALLEST
    cut = plain[first[owner]]
    cut["row"] += depth
    cut["height"] = np.minimum(TALLEST, height[owner] - depth)
    return cut


def _sorted(stretches: np.ndarray, *names: str) -> np.ndarray:
    return stretches[np.lexsort([stretches[name] for name in reversed(names)])]


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


def _masks(
    tile: Tile,
    query: np.ndarray,
    key: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    masked: np.ndarray,
) -> np.ndarray:
    """Return an array that is equal for two masked runs of one shape just where their masks are equal."""
    chosen = np.flatnonzero(masked)
    sides = (
        side.span(index[chosen], np.int64(0), count[chosen])
        for side, index, count in (
            (tile.blocks.query_side, query, rows),
            (tile.blocks.key_side, key, columns),
        )
    )
    # The signature tells most of the equal ones without a look at their pairs; what it tells apart is compared.
    facts = np.stack([rows[chosen], columns[chosen], *tile.term.signature(*sides)])
    _, sample, alike = np.unique(facts, axis=1, return_index=True, return_inverse=True)
    seen: dict[bytes, int] = {}
    content = np.array(
        [
            seen.setdefault(_packed(tile, *run), len(seen))
            for run in zip(*(side[chosen[sample]] for side in (query, key, rows, columns)), strict=True)
        ]
    )
    found = np.full(len(query), -1)
    found[chosen] = content[alike.ravel()]
    return found


def _packed(tile: Tile, query: int, key: int, rows: int, columns: int) -> bytes:
    return np.packbits(tile.mask(query, key, rows, columns)).tobytes()
