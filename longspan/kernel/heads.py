"""Heads: which of them read alike, and the parts and bands that they read by."""

from __future__ import annotations

from functools import lru_cache

from longspan.kernel.flash.band import Band
from longspan.kernel.flash.bands import BandGroup, band_groups
from longspan.kernel.lattice.calls import HeadGroup, regular
from longspan.kernel.lattice.parts import parts
from longspan.kernel.lattice.step import step_parts
from longspan.pattern import Pattern, simplify


@lru_cache(maxsize=256)
def head_groups(pattern: Pattern, heads: int, queries: range, keys: range) -> tuple[HeadGroup, ...]:
    """Return the heads that read alike, cut into regular ranges, with the parts they read by."""
    groups = []
    for single, members in _alike(pattern, heads):
        done = None
        if len(queries) == 1 and keys == range(queries[0] + 1):
            # Decoding, which has a new length with every token.
            done = step_parts(single, queries[0])
        if done is None:
            done = parts(single, queries, keys)
        groups.extend(HeadGroup(run, done) for run in members)
    return tuple(groups)


@lru_cache(maxsize=64)
def _alike(pattern: Pattern, heads: int) -> tuple[tuple[Pattern, list[range]], ...]:
    """Return the patterns of single heads, each with the heads that read by it."""
    alike: dict[Pattern, list[int]] = {}
    for head in range(heads):
        alike.setdefault(pattern.at_head(head, heads), []).append(head)
    # What is written otherwise and reads the same is planned, and read, once.
    same: dict[Pattern, tuple[Pattern, list[int]]] = {}
    for single, members in alike.items():
        same.setdefault(simplify(single), (single, []))[1].extend(members)
    return tuple((single, regular(sorted(members))) for single, members in same.values())


@lru_cache(maxsize=256)
def banded(groups: tuple[HeadGroup, ...], length: int) -> tuple[BandGroup, ...] | str:
    """Return the bands of groups of heads over a number of queries, or say what is no band."""
    pieces = [part for group in groups for part in group.parts]
    if length > 1 or any(part.allowed is not None or part.rectangles > 1 for part in pieces):
        return band_groups(groups)
    # The parts of one query are stretches of keys: bands as they are, with nothing to join.
    return tuple(
        BandGroup(
            group.heads,
            tuple(Band(part.query, part.key, part.shape) for part in group.parts),
        )
        for group in groups
    )
