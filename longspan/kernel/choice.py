"""The choice: which kernel runs a pattern on given tensors, and the run of it where no kernel is set apart for it."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from longspan.kernel import reference
from longspan.kernel.flash import flash
from longspan.kernel.flex import flex
from longspan.kernel.heads import banded, head_groups
from longspan.kernel.native import native
from longspan.kernel.plan import choose, flash_refusal, scores_refusal
from longspan.kernel.sdpa import sdpa
from longspan.kernel.triton import triton
from longspan.pattern import Pattern
from longspan.score import Scores


def at_once(query: Tensor, changes: Scores, *, asked: str | None) -> str | None:
    """Return the kernel on CPU that runs, or None where others are to be looked at first."""
    if asked in ("native", None) and not native.refusal(query, changes, asked=asked == "native"):
        return "native"
    if asked in ("sdpa", None) and not sdpa.refusal(query, changes):
        return "sdpa"
    return None


def chosen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    queries: range,
    changes: Scores,
    asked: str | None,
) -> str:
    """Return the name of the kernel that runs, or raise PlanError with a reason for each that does not."""
    too_large = scores_refusal(reference.scores_bytes(query, key))
    why_not_flash = flash.refusal(query, value, changes) or flash_refusal(
        pattern, query.shape[1], queries, range(key.shape[2]), asked=asked == "flash"
    )
    why_not_flex = flex.refusal((query, key, value), pattern, changes, asked=asked == "flex")
    if query.device.type == "cpu":
        why_not_flex = why_not_flex or too_large
    refusals = {
        "native": native.refusal(query, changes, asked=asked == "native"),
        "sdpa": sdpa.refusal(query, changes),
        "flash": why_not_flash,
        "flex": why_not_flex,
        "reference": too_large,
        "triton": triton.refusal(query, value, changes) if asked == "triton" else None,
    }
    return choose(refusals, asked, facts(query, key, value, pattern, queries))[0]


def run(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    queries: range,
    scale: float,
    changes: Scores,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp by "flash", "flex", "triton" or "reference"; gradients flow through both."""
    if name == "flash":
        asked = work(pattern, query.shape[1], queries, key.shape[2], scale)
        return flash.attend(query, key, value, changes.sinks, asked)
    if name == "triton":
        size = triton.size(query, value)
        found = triton.terms(pattern, query.shape[1], queries, range(key.shape[2]), query.device, size)
        return triton.attend(query, key, value, changes.sinks, triton.Work(found, scale))
    kernel = {"flex": flex, "reference": reference}[name]
    return kernel.attend(query, key, value, pattern, queries=queries, scale=scale, changes=changes)


def work(pattern: Pattern, heads: int, queries: range, keys: int, scale: float) -> flash.Work:
    """Return what the flash kernel is asked, for a pattern that it does not refuse; layers that ask alike share it."""
    return _work(banded(head_groups(pattern, heads, queries, range(keys)), len(queries)), scale)


_work = lru_cache(maxsize=256)(flash.Work)


def facts(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, queries: range | None
) -> dict[str, str]:
    """Return what a message says of tensors."""
    sides = {"query": query, "key": key, "value": value}
    described = {
        name: f"{list(side.shape)} {str(side.dtype).removeprefix('torch.')}, {side.device}"
        for name, side in sides.items()
    }
    return {
        "pattern": str(pattern),
        **described,
        "queries": "the last ones" if queries is None else str(queries),
    }
