"""The grid: ranks in rows, which swap tokens for heads, and columns, along which keys move.

Ulysses needs a head for every rank, and a ring of many ranks sends small pieces many times; together they need few heads
and few steps. Within a row every rank gets all tokens of the row for some of the heads; the ranks of a column then
hold all tokens for the same heads, and attend as ranks do that are alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.errors import PlanError, message
from longspan.layout import Layout
from longspan.pattern import Pattern, PerHead
from longspan.ring import rotation
from longspan.ring.plan import STRATEGIES, Plan, cheapest, plan, settled
from longspan.ring.ulysses import Return, Swap, repeated
from longspan.score import Scores, collect

# What can be done along a column.
COLUMN = tuple(name for name in STRATEGIES if name != "ulysses")


@dataclass(frozen=True, eq=False)
class Grid:
    """How attention over a pattern is shared out among rows and columns of ranks.

    Rank `i * columns + j` stands in row i and column j. Bytes are counted as in `Plan`.

    Attributes:
        layout: how positions lie on all ranks.
        rows: for each row how it swaps tokens for heads.
        columns: for each column how its keys move.
    """

    layout: Layout
    rows: tuple[Plan, ...]
    columns: tuple[Plan, ...]

    @cached_property
    def moved(self) -> np.ndarray:
        """Bytes that go from one rank to another in a forward pass, int64 `[receiver, sender]`."""
        return self._placed([row.moved for row in self.rows], [column.moved for column in self.columns])

    @cached_property
    def gradients(self) -> np.ndarray:
        """Bytes that go from one rank to another in a backward pass, int64 `[receiver, sender]`."""
        return self._placed(
            [row.gradients for row in self.rows], [column.gradients for column in self.columns]
        )

    @cached_property
    def pairs(self) -> np.ndarray:
        """Pairs that each rank computes, over all heads it works on, int64 `[ranks]`."""
        return np.stack([column.pairs for column in self.columns], axis=1).ravel()

    @property
    def balance(self) -> float:
        """Pairs of the busiest rank over those of the mean: 1 is even."""
        mean = self.pairs.mean()
        return float(self.pairs.max() / mean) if mean else 1.0

    def _placed(self, rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
        wide, ranks = len(self.columns), self.layout.ranks
        whole = np.zeros((ranks, ranks), dtype=np.int64)
        for i, part in enumerate(rows):
            whole[i * wide : (i + 1) * wide, i * wide : (i + 1) * wide] += part
        for j, part in enumerate(columns):
            whole[j::wide, j::wide] += part
        return whole


def plan_grid(
    pattern: Pattern,
    layout: Layout,
    *,
    columns: int,
    heads: int,
    key_heads: int | None = None,
    width: int = 64,
    dtype: str = "float32",
    strategy: str | None = None,
) -> Grid:
    """Return what `longspan.ring.attend` would do on a two-dimensional mesh with so many columns.

    Args:
        pattern: what is read.
        layout: how positions lie on ranks, a multiple of `columns`.
        columns: ranks that swap tokens for heads, at most `heads`.
        heads, key_heads, width, dtype: as for `plan`.
        strategy: along the columns, "exchange", "ring" or "gather"; None takes the cheapest for each.

    Raises:
        PatternError, PlanError, ShapeError: as for `plan`; ranks that do not fill rows, more columns than heads.

    Example:
        >>> from longspan import Causal
        >>> from longspan.layout import zigzag
        >>> found = plan_grid(Causal(), zigzag(4096, ranks=8), columns=2, heads=4)
        >>> found.balance, int(found.moved.sum(axis=1).max())
        (1.0, 4194304)
    """
    why = _problem((layout.ranks // max(1, columns), columns), heads, strategy)
    if why is None and layout.ranks % columns:
        why = f"{layout.ranks} ranks do not fill rows of {columns}"
    if why is not None:
        raise PlanError(
            message(
                "There is no such grid of ranks.",
                {"why": why},
                fix="columns that divide ranks, and a head for each",
            )
        )
    # Checks what a plan checks.
    alone = plan(pattern, layout, heads=heads, key_heads=key_heads, width=width, dtype=dtype)
    return settled_grid(pattern, layout, columns, (heads, alone.key_heads), alone.widths, alone.row, strategy)


@lru_cache(maxsize=64)
def settled_grid(
    pattern: Pattern,
    layout: Layout,
    columns: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    row: int,
    strategy: str | None,
) -> Grid:
    """Return the grid of checked arguments."""

    def swapped(first: int) -> Plan:
        held = Layout(layout.name, layout.length, layout.shards[first : first + columns])
        return Plan(pattern, held, *heads, widths, row, "ulysses", None, pattern)

    rows = tuple(swapped(first) for first in range(0, layout.ranks, columns))
    joined = layout.rows(columns)

    def column(number: int) -> Plan:
        mine, read = rows[0].share(number)
        own = repeated(mine, read, heads[0] // heads[1])
        key_heads = len(read) if own is None else len(mine)
        patterns = [pattern.at_head(head, heads[0]) for head in mine]
        alike = patterns[0] if len(set(patterns)) == 1 else PerHead(patterns)
        chosen = strategy
        if chosen is None:
            chosen = cheapest(settled(alike, joined, (len(mine), key_heads), widths, row, "exchange"))
        return settled(alike, joined, (len(mine), key_heads), widths, row, chosen)

    return Grid(layout, rows, tuple(column(number) for number in range(columns)))


def number(mesh: DeviceMesh) -> int:
    """Return the number of this rank in the layout."""
    row, column = mesh.get_coordinate()
    return row * mesh.shape[1] + column


def problem(mesh: DeviceMesh, heads: int, strategy: str | None) -> str | None:
    """Say why ranks cannot attend on such a mesh, or None where they can."""
    return _problem(tuple(mesh.shape), heads, strategy)


def _problem(shape: tuple[int, ...], heads: int, strategy: str | None) -> str | None:
    if not 1 <= shape[1] <= heads:
        return f"{heads} heads cannot be shared out among {shape[1]} columns of ranks"
    if strategy is not None and strategy not in COLUMN:
        return f"there is no strategy called {strategy} along the columns, only {', '.join(COLUMN)}"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    layout: Layout,
    mesh: DeviceMesh,
    strategy: str | None,
    changes: tuple[float, Scores],
) -> Tensor:
    """Return the output of this rank's queries, differentiable; every rank of the mesh calls it alike.

    Arguments as for `longspan.ring.attend`; `changes` are the scale of scores and what else is done to them.
    """
    (i, j), (scale, given) = mesh.get_coordinate(), changes
    if scale <= 0:
        query, scale = query * scale, 1.0
    heads, widths = (query.shape[1], key.shape[1]), (key.shape[3], value.shape[3])
    row = query.shape[0] * query.element_size()
    found = settled_grid(pattern, layout, mesh.shape[1], heads, widths, row, strategy)
    swap, column = found.rows[i], found.columns[j]
    across, along = mesh.get_group(1), mesh.get_group(0)
    shares = [swap.share(other) for other in range(mesh.shape[1])]
    mine, read = shares[j]
    with torch.autocast(query.device.type, enabled=False):
        sides = Swap.apply(
            swap.layout, across, [(own, keys, keys) for own, keys in shares], query, key, value
        )
        # Ranks hand their tokens over one after the other, the column has them in the order of the text.
        came = np.concatenate([swap.layout.positions(other) for other in range(mesh.shape[1])])
        order = np.argsort(came)[np.searchsorted(np.sort(came), column.layout.positions(i))]
        there = torch.from_numpy(order).to(query.device)
        query, key, value = (side[:, :, there] for side in sides)
        own = repeated(mine, read, heads[0] // heads[1])
        if own is not None:
            key, value = (side[:, torch.tensor(own, device=side.device)] for side in (key, value))
        changed = collect(given.of(mine), len(mine))
        output = rotation.attend(query, key, value, column, along, scale, changed)
        output = output[:, :, torch.argsort(there)]
        return Return.apply(swap.layout, across, [(own,) for own, _ in shares], output)[0]
