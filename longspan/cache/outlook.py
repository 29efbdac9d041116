"""Outlook: which of the keys held the next tokens will read, found for many tokens before they come."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longspan.pattern import Pattern, Progression

# The most tokens, and pairs, that are looked at ahead: a table of a megabyte in float32.
_TOKENS, _PAIRS = 64, 1 << 18


@dataclass(frozen=True)
class Outlook:
    """What the next tokens read, one after the other, if nothing but them comes and no slot is given up.

    Law: the row of a token is that of `bias_of` for the slots that are taken once it is in.

    Attributes:
        before: slots taken before the first of them.
        tokens: how many it holds for.
        bias: `[rows, readers or 1, tokens, before + tokens]`, None where each token reads once all that is there.
        begins: for each token the slot from which on it reads everything once and nothing before, -1 where it does not.
        silent: whether one of the tokens may read nothing.
    """

    before: int
    tokens: int
    bias: Tensor | None
    begins: tuple[int, ...]
    silent: bool

    @classmethod
    def of(cls, before: int, bias: Tensor) -> Outlook:
        """Return the outlook of a bias."""
        tokens = bias.shape[2]
        # Slots of later tokens are not there yet, and are not counted.
        there = torch.ones(bias.shape[2:], dtype=torch.bool, device=bias.device).tril(before)
        reads = torch.isfinite(bias) & there
        ends = torch.arange(before + 1, before + tokens + 1, device=bias.device)
        first = reads.flatten(0, 1).any(0).int().argmax(-1)
        slots = torch.arange(bias.shape[3], device=bias.device)
        wanted = there & (slots >= first[:, None])
        simple = ((reads == wanted) & ((bias == 0) | ~reads)).flatten(0, 1).all(0).all(-1) & (first < ends)
        begins = torch.where(simple, first, -1)
        return cls(before, tokens, bias, tuple(begins.tolist()), not bool(reads.any(-1).all()))

    def covers(self, used: int) -> bool:
        """Whether it tells what a token reads that comes to `used` slots taken."""
        return 0 <= used - self.before < self.tokens

    def at(self, used: int) -> tuple[int, Tensor | None]:
        """Say what the token in the last of `used` slots reads.

        Returns:
            The slot from which on it reads, and a bias `[rows, readers or 1, 1, used]`, None where it reads all of
            them once.
        """
        token = used - 1 - self.before
        if self.bias is None or self.begins[token] >= 0:
            return (0 if self.bias is None else self.begins[token]), None
        return 0, self.bias[:, :, token : token + 1, :used]


def outlook(
    readers: tuple[Pattern, ...], held: Tensor, starts: np.ndarray, tokens: int, dtype: torch.dtype
) -> Outlook:
    """Look ahead. Layers that read and hold alike, as those of a model do, share what is found.

    Args:
        readers: the pattern of every query head, or one for all.
        held: positions in the slots taken, `[rows, slots]`, -1 where nobody's.
        starts: position of the next token, `[rows]`.
        tokens: the most to look ahead for, at least 1.
        dtype: of the bias.
    """
    places, tokens = held.cpu().numpy(), min(tokens, _TOKENS)
    return _outlook(
        readers, places.tobytes(), places.shape, tuple(starts.tolist()), tokens, dtype, held.device
    )


@lru_cache(maxsize=8)
def _outlook(
    readers: tuple[Pattern, ...],
    held: bytes,
    shape: tuple[int, int],
    starts: tuple[int, ...],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Outlook:
    places = np.frombuffer(held, dtype=np.int64).reshape(shape)
    gaps = bool((places < 0).any())
    if len(places) == 1 and not gaps and _reads_all(readers, places[0], starts[0], tokens):
        return Outlook(shape[1], tokens, None, (), silent=False)
    tokens = max(1, min(tokens, _PAIRS // (shape[1] + tokens)))
    queries = torch.tensor(starts)[:, None] + torch.arange(tokens)
    keys = torch.cat([torch.from_numpy(places.copy()), queries], dim=1)
    bias = bias_of(readers, queries.to(device), keys.to(device), dtype, gaps=gaps)
    return Outlook.of(shape[1], bias)


def bias_of(
    readers: tuple[Pattern, ...], queries: Tensor, keys: Tensor, dtype: torch.dtype, *, gaps: bool = False
) -> Tensor:
    """Return the logarithm of how often queries read keys, `[rows, len(readers), queries, keys]`: the formula.

    Args:
        readers: patterns of heads.
        queries, keys: positions `[rows, tokens]`; -1 for no token where there are `gaps`, which read nothing and are
            not read.
    """
    q, k = queries[:, :, None], keys[:, None, :]
    counted = {reader: reader.count(q, k) for reader in set(readers)}
    if gaps:
        real = (q >= 0) & (k >= 0)
        counted = {reader: often * real for reader, often in counted.items()}
    # Heads that read alike share one logarithm.
    logs = {reader: often.to(dtype).log() for reader, often in counted.items()}
    if len(readers) == 1:
        return logs[readers[0]].expand(-1, queries.shape[1], keys.shape[1])[:, None]
    shape = (max(len(queries), len(keys)), queries.shape[1], keys.shape[1])
    return torch.stack([logs[reader].expand(shape) for reader in readers], dim=1)


def _reads_all(readers: tuple[Pattern, ...], held: np.ndarray, start: int, tokens: int) -> bool:
    """Whether the next tokens each read once all that is held and all of themselves up to the own one."""
    queries = Progression.of(range(start, start + tokens))
    begins = np.flatnonzero(np.diff(held, prepend=-2) != 1)
    low, high = held[begins], held[np.append(begins[1:], len(held))[: len(begins)] - 1]
    keys = Progression(low, high, (high > low) * 1)
    new = np.arange(start, start + tokens)
    for reader in set(readers):
        if len(held):
            bracket = reader.count(queries, keys)
            if not (bracket.full & (bracket.high <= 1)).all():
                return False
        among = reader.count(torch.from_numpy(new)[:, None], torch.from_numpy(new)[None, :])
        if not bool((among.expand(tokens, tokens) == 1)[np.tril_indices(tokens)].all()):
            return False
    return True
