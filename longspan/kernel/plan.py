"""The plan: which kernel runs a pattern, in which parts, at what cost, and why not another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from longspan.derive.extent import extent
from longspan.derive.tiling import SIZE
from longspan.errors import PlanError, ShapeError, elided, message
from longspan.kernel.flash import flash, provider
from longspan.kernel.flash.bands import BandGroup
from longspan.kernel.flex import family, flex
from longspan.kernel.heads import banded, head_groups
from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.lattice.numbers import listed, named
from longspan.kernel.lattice.parts import Part
from longspan.kernel.lattice.summary import BlockCounts, block_counts, contiguous_area, most_keys
from longspan.kernel.native import native
from longspan.kernel.rates import dearer
from longspan.kernel.sdpa import sdpa
from longspan.pattern import Pattern
from longspan.size import size

# The most memory that dense scores may take.
REFERENCE_BYTES = 8 * 10**9
KERNELS = ("native", "sdpa", "flash", "flex", "reference")
# Kernels that run for those who ask for them by name, and for no one else.
ASKED = ("triton",)
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, eq=False)
class Plan:
    """How attention over a pattern is done. Print it to read it.

    Attributes:
        pattern: what is read.
        heads: number of query heads.
        queries, keys: absolute positions.
        width: numbers in a head's query.
        dtype: of the tensors.
        kernel: the kernel that runs, "native", "sdpa", "flash", "flex" or "reference".
        groups: heads that read alike, and their parts.
        refused: kernels that do not run, each with its reason.
        calls: what "flex" or "flash" does instead of the parts; none for other kernels.
    """

    pattern: Pattern
    heads: int
    queries: range
    keys: range
    width: int
    dtype: str
    kernel: str
    groups: tuple[HeadGroup, ...]
    refused: tuple[tuple[str, str], ...]
    calls: tuple[family.Group | BandGroup, ...] = ()

    @property
    def pairs(self) -> int:
        """Pairs read by all heads, exactly."""
        return sum(part.pairs * len(group.heads) for group in self.groups for part in group.parts)

    @property
    def area(self) -> int:
        """Pairs computed by all heads, masked ones included."""
        if self.kernel == "flex":
            return (self.blocks.full + self.blocks.partial) * family.BLOCK**2
        if self.kernel == "flash":
            return sum(band.area * len(group.heads) for group in self.calls for band in group.bands)
        area = native.area if self.kernel == "native" else lambda part: part.area
        return sum(area(part) * len(group.heads) for group in self.groups for part in group.parts)

    @property
    def flops(self) -> int:
        """Floating-point operations of the pairs forward, a multiply-add being two."""
        return 4 * self.width * self.pairs

    @cached_property
    def most_keys(self) -> int:
        """The most keys that one query reads on one head, exactly, and counted as often as they are read."""
        return max((most_keys(group.parts, len(self.queries)) for group in self.groups), default=0)

    @cached_property
    def blocks(self) -> BlockCounts:
        """Blocks of 128 by 128 places in the layout of each part, over all heads: full, partial, and all others."""
        if self.kernel == "flex":
            counted = [(1, *group.blocks) for group in self.calls]
        else:
            counted = [(len(group.heads), *block_counts(group.parts)) for group in self.groups]
        full, partial = (sum(heads * found[at] for heads, *found in counted) for at in (0, 1))
        square = self.heads * -(-len(self.queries) // SIZE) * -(-len(self.keys) // SIZE)
        return BlockCounts(full, partial, max(0, square - full - partial))

    @cached_property
    def workspace(self) -> tuple[int, int]:
        """Bytes that the kernel takes at most beside inputs, outputs and gradients, forward and backward; of "flex",
        the lists of blocks only."""
        if self.kernel == "flex":
            listed = {
                id(part): part.nbytes
                for group in self.calls
                for call in group.calls
                for part in call.lists.tensors
            }
            return sum(listed.values()), sum(listed.values())
        size = max(4, _BYTES[self.dtype])
        if self.kernel == "flash":
            return flash.workspace(self.calls, self.heads, len(self.queries), len(self.keys), self.width)
        if self.kernel == "reference":
            # Counts, scores, weights and their gradients are dense.
            scores = self.heads * len(self.queries) * len(self.keys) * size
            return 4 * scores, 8 * scores
        if self.kernel == "native":
            return native.workspace(self.heads, len(self.queries), len(self.keys), self.width, self.dtype)
        return sdpa.workspace(
            self.groups, self.heads, len(self.queries), len(self.keys), self.width, self.dtype
        )

    @cached_property
    def layout(self) -> str:
        """In which order positions are read, and what the contiguous order would have cost."""
        if self.kernel == "flex":
            steps = {max(call.steps) for group in self.calls for call in group.calls} - {1}
        else:
            steps = {max(part.query.step, part.key.step) for group in self.groups for part in group.parts} - {
                1
            }
        if not steps:
            return "contiguous"
        areas = [
            (
                len(group.heads),
                *contiguous_area(self.pattern.at_head(group.heads[0], self.heads), self.queries, self.keys),
            )
            for group in self.groups
        ]
        area = sum(heads * each for heads, each, _ in areas)
        bound = "" if all(exact for *_, exact in areas) else "up to "
        return f"every {listed(sorted(steps))}; contiguous blocks would compute {bound}{area:,}"

    def __str__(self) -> str:
        dense = self.heads * len(self.queries) * len(self.keys)
        share = self.pairs / dense if dense else 0.0
        found = self.blocks
        rows = [
            ("pattern", elided(str(self.pattern))),
            ("heads", f"{self.heads}, width {self.width}, {self.dtype}"),
            ("queries", f"{_span(self.queries)} reading keys {_span(self.keys)}"),
            ("pairs", f"{self.pairs:,}, {share:.2%} of all"),
            ("most keys", f"{self.most_keys:,} for one query"),
            ("blocks", f"{found.full:,} full, {found.partial:,} partial, {found.empty:,} empty"),
            ("layout", self.layout),
            ("computed", f"{self.area:,}, {self.area / max(1, self.pairs):.2f} times the pairs"),
            ("flops", f"{self.flops:,} forward"),
            ("workspace", self._workspace()),
            ("kernel", self.kernel),
            *self._flash(),
            *(("refused", f"{name}: {why}") for name, why in self.refused),
        ]
        lines = [f"  {label:<9}  {text}" for label, text in rows]
        if self.calls:
            return "\n".join(["Plan", *lines, *map(str, self.calls)])
        for group in self.groups:
            lines.append(f"  {named(group.heads)}")
            lines.extend(f"    {_line(part)}" for part in group.parts)
            if not group.parts:
                lines.append("    read nothing" if len(group.heads) > 1 else "    reads nothing")
        return "\n".join(["Plan", *lines])

    def _flash(self) -> Iterator[tuple[str, str]]:
        """Yield which flash attention takes the bands, as it is now."""
        if self.kernel == "flash":
            yield from provider.account(self.calls, flash.taken_width(self.width), provider.capability())

    def _workspace(self) -> str:
        forward, backward = map(size, self.workspace)
        if self.kernel == "flex":
            return f"{forward} of lists"
        return f"{forward} forward, {backward} backward at most"


def _span(positions: range) -> str:
    step = f", every {positions.step}" if positions.step > 1 else ""
    if len(positions) == 1:
        return str(positions[0])
    return f"{positions[0]:,} to {positions[-1]:,}{step}" if positions else "none"


def _line(part: Part) -> str:
    step = max(part.query.step, part.key.step)
    strided = f", every {step}" if step > 1 else ""
    read = "" if part.pairs == part.area else f", {part.pairs / part.area:.0%} of it read"
    rows = f"{part.query.places:,} {'query' if part.query.places == 1 else 'queries'}"
    columns = f"{part.key.places:,} key{'s' * (part.key.places > 1)}"
    return f"{part.rectangles:,} x {part.kind:<6} {rows} by {columns}{strided}{read}"


def plan(
    pattern: Pattern,
    *,
    length: int,
    queries: range | None = None,
    heads: int = 1,
    width: int = 64,
    dtype: torch.dtype | str = "float32",
    kernel: str | None = None,
    device: str = "cpu",
) -> Plan:
    """Return what `attend` would do, without doing it.

    Law: the parts of the plan hold every pair as often as the pattern counts it, and plans of equal arguments are
    the same object.

    Args:
        pattern: what is read.
        length: number of keys, at positions `range(length)`.
        queries: positions of the queries; None for those of the keys.
        heads: number of query heads.
        width: numbers in a head's query.
        dtype: float64, float32, bfloat16 or float16, of torch or by name.
        kernel: "native", "sdpa", "flash", "flex" or "reference" to insist on one; None takes the first that can run.
        device: "cpu" or "cuda"; the device need not be there.

    Returns:
        A Plan; `print` shows it.

    Raises:
        PatternError: a pattern that cannot be shared out among `heads`.
        PlanError: no kernel, or not the one asked for, can run it.
        ShapeError: negative positions or an unknown dtype.

    Example:
        >>> from longspan import SlidingWindow
        >>> print(plan(SlidingWindow(512), length=8192, heads=8, dtype="float64"))
        Plan
          pattern    SlidingWindow(512)
          heads      8, width 64, float64
          queries    0 to 8,191 reading keys 0 to 8,191
          pairs      32,507,904, 6.06% of all
          most keys  512 for one query
          blocks     1,488 full, 992 partial, 30,288 empty
          layout     contiguous
          computed   40,372,224, 1.24 times the pairs
          flops      8,322,023,424 forward
          workspace  19.8 MB forward, 37.6 MB backward at most
          kernel     sdpa
          refused    native: takes float32 or bfloat16, got float64
          heads 0 to 7
            1 x causal 512 queries by 512 keys
            60 x masked 128 queries by 640 keys, 80% of it read
    """
    queries, keys = extent(length, queries)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in _BYTES:
        raise ShapeError(
            message("There is no such dtype here.", {"asked": dtype}, fix=f"one of {', '.join(_BYTES)}")
        )
    if device not in ("cpu", "cuda"):
        raise ShapeError(message("A plan is for one of two devices.", {"asked": device}, fix="cpu or cuda"))
    return _plan(pattern, heads, queries, keys, width, dtype, kernel, device)


@lru_cache(maxsize=256)
def _plan(
    pattern: Pattern,
    heads: int,
    queries: range,
    keys: range,
    width: int,
    dtype: str,
    kernel: str | None,
    device: str,
) -> Plan:
    refusals = {
        "triton": "has no plans: its lists are made when it runs",
        "native": native.plan_refusal(dtype, device, len(queries), asked=kernel == "native"),
        "reference": scores_refusal(heads * len(queries) * len(keys) * max(4, _BYTES[dtype])),
    }
    if device == "cuda":
        refusals["sdpa"] = sdpa.device_refusal(device)
        refusals["flex"] = flex.dtype_refusal(dtype)
        refusals["flash"] = (
            flash.kind_refusal(device, dtype, width)
            or provider.refusal(flash.taken_width(width), provider.capability())
            or flash_refusal(pattern, heads, queries, keys, asked=kernel == "flash")
        )
    elif kernel == "flex":
        refusals["flex"] = refusals["reference"]
    elif kernel == "flash":
        refusals["flash"] = flash.kind_refusal(device, dtype, width)
    chosen, refused = choose(refusals, kernel, {"pattern": str(pattern)})
    grouped = head_groups(pattern, heads, queries, keys)
    calls = ()
    if chosen == "flex":
        # A plan says how many blocks there are, and writes down none.
        calls = family.groups(pattern, heads, queries, keys, torch.device("meta"))
    elif chosen == "flash":
        calls = banded(grouped, len(queries))
    return Plan(pattern, heads, queries, keys, width, dtype, chosen, grouped, refused, calls)


def choose(
    refusals: dict[str, str | None], asked: str | None, facts: dict[str, str]
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the kernel that runs and the reasons of those that cannot.

    Args:
        refusals: for each kernel why it cannot run, None where it can; kernels left out can run.
        asked: the kernel insisted on, or None for the first that can.
        facts: what to say of the tensors where none can.
    """
    if asked is not None and asked not in (*KERNELS, *ASKED):
        raise PlanError(
            message(
                f"There is no kernel called {asked}.", {"asked": asked}, fix=f"one of {', '.join(KERNELS)}"
            )
        )
    names = (*KERNELS, *(name for name in ASKED if name == asked))
    able = [name for name in names if refusals.get(name) is None]
    refused = tuple((name, why) for name in names if (why := refusals.get(name)))
    if not able or (asked is not None and asked not in able):
        problem = f"The kernel {asked}" if asked else "No kernel"
        raise PlanError(
            message(
                f"{problem} can{'not' if asked else ''} run this pattern on these tensors.",
                {**facts, "refused": [f"{name}  {why}" for name, why in refused]},
                fix="kernel=None, which takes the first that can"
                if able
                else "fewer queries at a time, or tensors that a kernel above takes",
            )
        )
    return asked or able[0], refused


def flash_refusal(pattern: Pattern, heads: int, queries: range, keys: range, *, asked: bool) -> str | None:
    """Say why flash attention does not take a pattern, or flex does it cheaper where it is not asked for by name."""
    grouped = head_groups(pattern, heads, queries, keys)
    found = banded(grouped, len(queries))
    if isinstance(found, str):
        return found
    # Decoding asks for a single query at a new length each time, for which flex would list its blocks anew.
    if asked or len(queries) == 1:
        return None
    return dearer(grouped, found, len(queries))


def scores_refusal(needed: int) -> str | None:
    """Say why dense scores of so many bytes cannot be had, or None where they can."""
    if needed <= REFERENCE_BYTES:
        return None
    return f"would need {needed / 1e9:.1f} GB for the scores, limit is {REFERENCE_BYTES / 1e9:.0f} GB"
