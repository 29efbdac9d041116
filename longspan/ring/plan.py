"""The plan: what each rank sends, receives and computes under a strategy, and what the others would cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from operator import add

import numpy as np

from longspan.derive.cost import cost
from longspan.derive.strand import strands
from longspan.derive.traffic import Traffic, load, traffic
from longspan.errors import PlanError, ShapeError, message
from longspan.layout import Layout
from longspan.pattern import Nothing, Pattern, PerHead

# In the order in which equal costs are decided.
STRATEGIES = ("gather", "exchange", "ring", "ulysses")
SIZE = 128
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Thread:
    """Every so many-th token of the text, as some heads read them among themselves: a text of its own on the ranks.

    Attributes:
        heads, key_heads: the heads, and the key heads that equally many of them read each.
        tokens: positions of the text.
        plan: how attention among them is shared out.
    """

    heads: tuple[int, ...]
    key_heads: tuple[int, ...]
    tokens: range
    plan: Plan


@dataclass(frozen=True, eq=False)
class Plan:
    """How attention over a pattern is shared out among ranks. Print it to read it.

    Bytes are those of keys and values (and, for "ulysses", queries and outputs) in one forward pass; `gradients` are
    those that come on top in a backward pass.

    Attributes:
        pattern: what is read.
        layout: how positions lie on ranks.
        heads, key_heads: number of query heads and of key heads.
        widths: numbers in a head's key, and in its value.
        row: bytes of one number, times the batch.
        strategy: "gather", "exchange", "ring" or "ulysses".
        traffic: the key blocks that ranks need from one another, but for those of the threads.
        rest: what is read but for the threads.
        threads: what only every so many-th token reads and is read by, where ranks need it of one another.
    """

    pattern: Pattern
    layout: Layout
    heads: int
    key_heads: int
    widths: tuple[int, int]
    row: int
    strategy: str
    traffic: Traffic
    rest: Pattern
    threads: tuple[Thread, ...] = ()

    @property
    def blocks(self) -> int:
        """Key blocks that ranks need from one another."""
        return self.traffic.blocks + sum(thread.plan.blocks for thread in self.threads)

    @cached_property
    def moved(self) -> np.ndarray:
        """Bytes that go from one rank to another in a forward pass, int64 `[receiver, sender]`."""
        return self.moved_by(self.strategy)

    def moved_by(self, strategy: str) -> np.ndarray:
        """Return what `moved` would be under a strategy."""
        if strategy == "ulysses":
            return self.row * _swapped(self)
        return self._rest(strategy) + sum(thread.plan.moved for thread in self.threads)

    def _rest(self, strategy: str) -> np.ndarray:
        tokens = {"exchange": lambda: self.traffic.tokens, "ring": self._passed, "gather": self._spread}[
            strategy
        ]()
        return tokens * self.token

    @property
    def token(self) -> int:
        """Bytes of the key and value of one token."""
        return self.row * self.key_heads * sum(self.widths)

    @cached_property
    def gradients(self) -> np.ndarray:
        """Bytes that go from one rank to another in a backward pass, int64 `[receiver, sender]`."""
        if self.strategy == "ulysses":
            return self.moved.T
        home = self.traffic.tokens.T * self.token
        threads = sum(thread.plan.gradients for thread in self.threads)
        # Only a ring passes its keys round again; the others keep the few that they received.
        return home + threads + (self._rest("ring") if self.strategy == "ring" else 0)

    @property
    def sent(self) -> np.ndarray:
        """Bytes that each rank sends in a forward pass, int64 `[ranks]`."""
        return self.moved.sum(axis=0)

    @property
    def received(self) -> np.ndarray:
        """Bytes that each rank receives in a forward pass, int64 `[ranks]`."""
        return self.moved.sum(axis=1)

    @cached_property
    def pairs(self) -> np.ndarray:
        """Pairs that each rank computes, over all heads it works on, int64 `[ranks]`."""
        if self.strategy != "ulysses":
            return load(self.pattern, self.layout, heads=self.heads)
        alone = {
            head: cost(self.pattern.at_head(head, self.heads), length=self.layout.length).pairs
            for head in range(self.heads)
        }
        return np.array(
            [sum(alone[head] for head in self.share(rank)[0]) for rank in range(self.layout.ranks)]
        )

    @property
    def balance(self) -> float:
        """Pairs of the busiest rank over those of the mean: 1 is even."""
        mean = self.pairs.mean()
        return float(self.pairs.max() / mean) if mean else 1.0

    def busiest(self, strategy: str) -> int:
        """Return the bytes that the busiest rank receives in a forward pass under a strategy."""
        return int(self.moved_by(strategy).sum(axis=1).max())

    def share(self, rank: int) -> tuple[range, range]:
        """Return the query heads that a rank works on where heads are shared out, and the key heads they read."""
        ranks = self.layout.ranks
        mine = range(self.heads * rank // ranks, self.heads * (rank + 1) // ranks)
        group = self.heads // self.key_heads
        return mine, range(mine[0] // group, mine[-1] // group + 1) if mine else range(0)

    def _passed(self) -> np.ndarray:
        ranks = self.layout.ranks
        tokens = np.zeros((ranks, ranks), dtype=np.int64)
        source, step = np.indices((ranks, ranks))[:, :, 1:]
        np.add.at(tokens, ((source + step) % ranks, (source + step - 1) % ranks), self.traffic.passing[:, 1:])
        return tokens

    def _spread(self) -> np.ndarray:
        ranks = self.layout.ranks
        tokens = self.traffic.passing[:, 1] if ranks > 1 else np.zeros(1, dtype=np.int64)
        return np.tile(tokens, (ranks, 1)) * ~np.eye(ranks, dtype=bool)

    def __str__(self) -> str:
        size = self.traffic.size
        rows = [
            ("pattern", str(self.pattern)),
            ("layout", str(self.layout)),
            ("heads", f"{self.heads} on {self.key_heads} key heads"),
            ("strategy", self.strategy),
            ("needed", f"{self.blocks:,} key blocks of {size} from other ranks"),
            *(
                ("received", f"by the busiest rank, {self.busiest(name):,} bytes under {name}")
                for name in STRATEGIES
            ),
            ("balance", f"{self.balance:.3f}, the slowest rank over the mean"),
        ]
        lines = [f"  {label:<9} {text}" for label, text in rows]
        for rank in range(min(self.layout.ranks, _SHOWN)):
            lines.append(
                f"  rank {rank:<4} sends {self.sent[rank]:,}, receives {self.received[rank]:,} bytes, "
                f"computes {self.pairs[rank]:,} pairs"
            )
        if self.layout.ranks > _SHOWN:
            lines.append(f"  and {self.layout.ranks - _SHOWN:,} more ranks")
        return "\n".join(["Plan across ranks", *lines])


def _swapped(plan: Plan) -> np.ndarray:
    """Return the numbers that go from rank to rank when tokens are swapped for heads and back."""
    places = np.array([plan.layout.places(rank) for rank in range(plan.layout.ranks)], dtype=np.int64)
    shares = [plan.share(rank) for rank in range(plan.layout.ranks)]
    heads, key_heads = (np.array([len(share[side]) for share in shares], dtype=np.int64) for side in (0, 1))
    there = np.outer(heads * plan.widths[0] + key_heads * sum(plan.widths), places)
    back = np.outer(places, heads * plan.widths[1])
    return (there + back) * ~np.eye(len(places), dtype=bool)


def plan(
    pattern: Pattern,
    layout: Layout,
    *,
    heads: int = 1,
    key_heads: int | None = None,
    width: int = 64,
    batch: int = 1,
    dtype: str = "float32",
    strategy: str | None = None,
) -> Plan:
    """Return what `longspan.ring.attend` would do, without doing it and without any other rank.

    Law: the bytes of the plan are those that are sent, exactly, and its traffic names every key that is read.

    Args:
        pattern: what is read.
        layout: how positions lie on ranks.
        heads: number of query heads.
        key_heads: number of key heads; None for as many as query heads.
        width: numbers in a head's key and in its value.
        batch: rows of the batch.
        dtype: "float64", "float32", "bfloat16" or "float16".
        strategy: "exchange" (owners send the blocks that `traffic` names), "ring" (blocks go from neighbour to
            neighbour for as long as somebody further on needs them), "ulysses" (tokens are swapped for heads),
            "gather" (owners broadcast what anybody needs); None takes the one whose busiest rank receives least.
            A ring is taken only where a rank needs half of all keys or more, "exchange" and "gather" only where
            none does, "ulysses" only where every rank has a head.

    Returns:
        A Plan; `print` shows it.

    Raises:
        PatternError: a pattern that cannot be shared out among `heads`.
        PlanError: an unknown strategy.
        ShapeError: an unknown dtype, key heads that do not divide the heads.

    Example:
        >>> from longspan import Streaming
        >>> from longspan.layout import contiguous
        >>> found = plan(Streaming(4096, sinks=4), contiguous(32768, ranks=8), heads=8, key_heads=2)
        >>> found.strategy, found.traffic.blocks
        ('exchange', 230)
    """
    if dtype not in _BYTES:
        raise ShapeError(
            message("There is no such dtype here.", {"asked": dtype}, fix=f"one of {', '.join(_BYTES)}")
        )
    key_heads = heads if key_heads is None else key_heads
    if heads < 1 or key_heads < 1 or heads % key_heads:
        raise ShapeError(
            message(
                f"{heads} query heads cannot share {key_heads} key heads equally.",
                {"asked": f"heads={heads}, key_heads={key_heads}"},
                fix="a number of key heads that divides the number of query heads",
            )
        )
    if strategy is not None and strategy not in STRATEGIES:
        raise PlanError(
            message(
                f"There is no strategy called {strategy}.",
                {"asked": str(strategy)},
                fix=f"one of {', '.join(STRATEGIES)}",
            )
        )
    return settled(pattern, layout, (heads, key_heads), (width, width), batch * _BYTES[dtype], strategy)


@lru_cache(maxsize=1024)
def settled(
    pattern: Pattern,
    layout: Layout,
    heads: tuple[int, int],
    widths: tuple[int, int],
    row: int,
    strategy: str | None,
) -> Plan:
    """Return the plan of checked arguments, with the cheapest strategy where none is given."""
    rest, thin = _cut(pattern, layout, heads)
    between = _between(rest, layout, heads[0], SIZE)
    if thin and _everything(between):
        # All keys come anyway; those of threads would come twice.
        rest, thin = pattern, ()
    threads = tuple(
        Thread(
            some,
            read,
            tokens,
            _moving(thinned, layout, tokens, (len(some), len(read)), widths, row, strategy),
        )
        for (tokens, thinned), some, read in thin
    )

    def planned(name: str) -> Plan:
        return Plan(pattern, layout, *heads, widths, row, name, between, rest, threads)

    if strategy is not None:
        return planned(strategy)
    best = planned(cheapest(planned("exchange")))
    if layout.ranks <= heads[0] and best.blocks and best.busiest("ulysses") < best.busiest(best.strategy):
        return planned("ulysses")
    return best


def _everything(between: Traffic) -> bool:
    """Say whether every rank needs all keys of all others."""
    places = np.array([between.layout.places(rank) for rank in range(between.layout.ranks)])
    return bool((between.tokens + np.diag(places) == places).all())


def cheapest(made: Plan) -> str:
    """Return the strategy under which the busiest rank receives the fewest keys."""
    layout, between = made.layout, made.traffic
    if not between.blocks:
        return "exchange"
    others = layout.length - np.array([layout.places(rank) for rank in range(layout.ranks)])
    dense = bool((2 * between.tokens.sum(axis=1) >= np.maximum(others, 1)).any())
    return "ring" if dense else min(("gather", "exchange"), key=made.busiest)


def _moving(
    pattern: Pattern,
    layout: Layout,
    tokens: range,
    heads: tuple[int, int],
    widths: tuple[int, int],
    row: int,
    strategy: str | None,
) -> Plan:
    """Return the plan of a thread, whose keys move whatever the strategy is."""
    held = layout.within(tokens)
    between = _between(pattern, held, 1, SIZE)
    made = Plan(pattern, held, *heads, widths, row, "exchange", between, pattern)
    chosen = cheapest(made) if strategy in (None, "ulysses") else strategy
    return replace(made, strategy=chosen)


Cut = tuple[tuple[tuple[range, Pattern], tuple[int, ...], tuple[int, ...]], ...]


@lru_cache(maxsize=256)
def _cut(pattern: Pattern, layout: Layout, heads: tuple[int, int]) -> tuple[Pattern, Cut]:
    """Return a pattern without its threads, and those: tokens and what is read among them, heads and key heads."""
    rests, found = [], defaultdict(list)
    for head in range(heads[0]):
        whole, thin = strands(pattern.at_head(head, heads[0]), length=layout.length)
        left = list(whole)
        for strand in thin:
            if _between(strand.pattern, layout.within(strand.tokens), 1, SIZE).blocks:
                found[strand.tokens, strand.pattern].append(head)
            else:
                left.append(strand.term)
        rests.append(reduce(add, left) if left else Nothing())
    if not found:
        return pattern, ()
    group, cut = heads[0] // heads[1], []
    for which, members in found.items():
        readers = Counter(head // group for head in members)
        # Key heads that equally many heads read go together.
        for number in sorted(set(readers.values())):
            read = tuple(key_head for key_head in sorted(readers) if readers[key_head] == number)
            cut.append((which, tuple(head for head in members if head // group in read), read))
    return rests[0] if len(set(rests)) == 1 else PerHead(rests), tuple(cut)


@lru_cache(maxsize=1024)
def _between(pattern: Pattern, layout: Layout, heads: int, size: int) -> Traffic:
    return traffic(pattern, layout, heads=heads, size=size)
