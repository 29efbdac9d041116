"""A LongNet mixture over a text of any length, read chunk by chunk in memory that does not grow with it.

The terms whose segments fit into a chunk are one call of `attend` on every chunk. A longer term keeps the keys of its
present segment, and only those at its dilation, which are as many for a billion tokens as for a million. Terms are merged
by their log-sum-exps. Some queries are checked against sums in float64 over the pairs that the paper's words give. Their
budget is twice the error of the same sums in the precision of the text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from truth import EXACT, apart, dense

from longspan import Causal, LongNet, attend_with_lse
from longspan.kernel.softmax.merge import merge_into

# Query, key and value of a number of tokens from a position on, `[1, 1, tokens, width]` each.
Source = Callable[[int, int], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Reading:
    """What came of reading a text.

    Attributes:
        tokens: how many were read.
        seconds: of attention, making up the text not included.
        worst: largest difference of a sampled output from float64.
        budget: twice the largest one of the same sums in the dtype of the text.
        kept: keys held between chunks, at most.
    """

    tokens: int
    seconds: float
    worst: float
    budget: float
    kept: int


def mixture(tokens: int, *, first: int = 2_048, growth: int = 4) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return segments and dilations that grow alike up to the whole text, so that all segments keep `first` keys."""
    segments = [first * growth**power for power in range(int(math.log(tokens / first, growth) + 1e-9) + 1)]
    if segments[-1] < tokens:
        segments.append(tokens)
    return tuple(segments), tuple(segment // first for segment in segments)


def generated(width: int, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Source:
    """Return a text of random numbers that are the same whenever a chunk is asked for."""

    def source(start: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + start)
        made = torch.randn(3, 1, 1, tokens, width, generator=generator, device=device, dtype=dtype)
        return made[0], made[1], made[2]

    return source


def read(
    source: Source,
    tokens: int,
    segments: Sequence[int],
    dilations: Sequence[int],
    *,
    chunk: int,
    samples: Sequence[int],
) -> Reading:
    """Read a text by the mixture on one head, and check the outputs of some positions.

    Args:
        source: the text.
        tokens: its length, a multiple of `chunk`.
        segments, dilations: of the mixture; segments divide a chunk or are multiples of it, dilations divide it.
        chunk: tokens at a time.
        samples: positions to check.
    """
    short = sum(segment <= chunk for segment in segments)
    local = LongNet(tuple(segments[:short]), tuple(dilations[:short]))
    long = [_Long(*term) for term in zip(segments[short:], dilations[short:], strict=True)]
    wanted = {q: _read_by(q, segments, dilations) for q in samples}
    places = torch.tensor(sorted({k for keys in wanted.values() for k in keys} | set(wanted)))
    picked: list[Tensor] = []
    seconds, kept = 0.0, 0
    for start in range(0, tokens, chunk):
        query, key, value = source(start, chunk)
        _wait(query)
        watch = time.perf_counter()
        output, lse = attend_with_lse(query, key, value, local)
        # Merging is done in float32, which the output of one call need not be.
        output = output.to(lse.dtype)
        for term in long:
            term.join(output, lse, query, key, value, start)
        _wait(query)
        seconds += time.perf_counter() - watch
        kept = max(kept, sum(term.number for term in long))
        here = places[(places >= start) & (places < start + chunk)] - start
        sides = (query, key, value, output.to(query.dtype))
        picked.append(torch.stack([side[0, 0, here.to(side.device)].double().cpu() for side in sides]))
    queries, keys, values, outputs = torch.cat(picked, dim=1)
    worst = plain = band = 0.0
    for q, read_keys in wanted.items():
        own, rows = (torch.searchsorted(places, torch.tensor(asked)) for asked in (q, read_keys))
        sides = (queries[own], keys[rows], values[rows])
        truth, lse = _sums(*sides)
        worst = max(worst, apart(outputs[own], truth))
        plain = max(plain, apart(_sums(*(side.to(query.device, query.dtype) for side in sides))[0], truth))
        # Terms are merged by their log-sum-exps, which float32 rounds.
        band = max(band, float((1 + lse.abs()) * truth.abs().max()) * torch.finfo(torch.float32).eps)
    budget = EXACT if query.dtype == torch.float64 else 2 * plain + band
    return Reading(tokens, seconds, worst, budget, kept)


def telling(tokens: int, dilations: Sequence[int]) -> list[int]:
    """Return positions that say most: both ends, and for each term the last one that it and all shorter ones keep."""
    return [0, tokens - 1, *(tokens - dilation for dilation in dilations)]


class _Long:
    """A term whose segments are longer than a chunk, with the keys of the present one."""

    def __init__(self, segment: int, dilation: int) -> None:
        self.segment, self.dilation = segment, dilation
        self.keys: tuple[Tensor, Tensor] | None = None
        self.number = 0

    def join(
        self, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, start: int
    ) -> None:
        """Merge what the term reads of this chunk and before into output and log-sum-exp."""
        if start % self.segment == 0:
            self.number = 0
        first = -(start % self.segment) % self.dilation
        if first >= query.shape[2]:
            return
        query, key, value = (side[:, :, first :: self.dilation] for side in (query, key, value))
        if self.keys is None:
            most = -(-self.segment // self.dilation)
            self.keys = tuple(side.new_empty(*side.shape[:2], most, side.shape[3]) for side in (key, value))
        held = self.number + key.shape[2]
        for whole, side in zip(self.keys, (key, value), strict=True):
            whole[:, :, self.number : held] = side
        self.number = held
        part, part_lse = attend_with_lse(query, *(side[:, :, :held] for side in self.keys), Causal())
        merge_into(output[:, :, first :: self.dilation], lse[:, :, first :: self.dilation], part, part_lse)


def _read_by(q: int, segments: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return the keys that a query of head 0 reads, as often as it does (arXiv 2307.02486, section 3.1)."""
    keys: list[int] = []
    for segment, dilation in zip(segments, dilations, strict=True):
        begin = q - q % segment
        if (q - begin) % dilation == 0:
            keys += range(begin, q + 1, dilation)
    return keys


def _sums(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return what one query reads of keys and values `[keys, width]`, and its log-sum-exp, in their precision."""
    once = torch.ones(1, 1, len(keys))
    output, lse = dense(query[None, None, None], keys[None, None], values[None, None], once)
    return output[0, 0, 0], lse[0, 0, 0]


def _wait(side: Tensor) -> None:
    if side.is_cuda:
        torch.cuda.synchronize()
