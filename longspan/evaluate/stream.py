"""Stream: one long text through a model from start to end, with a cache that is asked how large it is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from longspan.errors import InputError, message
from longspan.hf.cache import PatternCache
from longspan.size import size

# By this many tokens any window of a small model is full, so a long text is looked at there too.
_EARLY = 10_000
_STATM = Path("/proc/self/statm")
_PAGE = 4096


class Progress(Protocol):
    """Told after every piece how many tokens are read, of how many, and what to show beside that."""

    def __call__(self, done: int, total: int, **figures: float | str) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """What was true at one place of a text.

    Attributes:
        tokens: read so far.
        loss: mean negative log-likelihood of all tokens so far but the first, in nats.
        recent: the same of the tokens since the checkpoint before.
        seconds: since the beginning.
        cache_bytes: what keys and values take.
        memory_bytes: what the process has in memory, on CUDA what tensors take there; None where nobody tells.
    """

    tokens: int
    loss: float
    recent: float
    seconds: float
    cache_bytes: int
    memory_bytes: int | None

    @property
    def perplexity(self) -> float:
        """Perplexity of all tokens so far."""
        return math.exp(self.loss)

    @property
    def tokens_per_second(self) -> float:
        """Tokens read in a second, from the beginning on."""
        return self.tokens / self.seconds


class Stream:
    """A text that a model reads in pieces, and what it writes after it.

    Law: the losses are those of one pass over the whole text with the model's patterns, whatever the pieces.

    Args:
        model: a causal language model of transformers, with patterns set.
        cache: made for it: `StreamCache` inside its `with`, or `PatternCache`.

    Example:
        >>> from longspan.hf import load_model, set_pattern
        >>> from longspan.hf.stream import StreamCache
        >>> from longspan.pattern import Streaming
        >>> model, tokenizer = load_model()
        >>> set_pattern(model, Streaming(60, sinks=4))
        >>> with StreamCache(model) as cache:
        ...     stream = Stream(model, cache)
        ...     found = stream.read(np.arange(1000) % 251, chunk=100, checkpoints=4)
        ...     written = stream.write([32], budget=8)
        >>> [at.tokens for at in found], len({at.cache_bytes for at in found}), len(written) <= 8
        ([300, 500, 800, 1000], 1, True)
    """

    def __init__(self, model: Any, cache: PatternCache) -> None:
        self.model, self.cache = model, cache
        self._next: torch.Tensor | None = None

    def read(
        self, ids: np.ndarray, *, chunk: int = 512, checkpoints: int = 8, progress: Progress | None = None
    ) -> tuple[Checkpoint, ...]:
        """Read token ids from start to end, and say how it went at places evenly spread over them.

        Args:
            ids: int64 `[tokens]`, at least 2.
            chunk: tokens of a piece, at least 1. Larger pieces are faster and take more memory while they are read.
            checkpoints: how many places, at least 1; a text of more than 10,000 tokens for each has one there too.
            progress: told after every piece.

        Raises:
            InputError: fewer than two tokens, a piece without tokens.
        """
        total = len(ids)
        if total < 2 or chunk < 1 or checkpoints < 1:
            raise InputError(
                message(
                    "A text is read in pieces of a token or more, and is two tokens long at least.",
                    {"asked": f"{total} tokens, chunk={chunk}, checkpoints={checkpoints}"},
                    fix="chunk=512, checkpoints=8, and a longer text",
                )
            )
        marks = {total * number // checkpoints for number in range(1, checkpoints + 1)}
        if total > _EARLY * checkpoints:
            marks.add(_EARLY)
        waiting = sorted(marks)
        found: list[Checkpoint] = []
        # Sums in float64: a text may have millions of tokens.
        loss = before = 0.0
        guessed = guessed_before = 0
        begun = time.perf_counter()
        for begin in range(0, total, chunk):
            end = min(begin + chunk, total)
            logits = self._forward(ids[begin:end])
            targets = torch.from_numpy(ids[begin + 1 : end + 1]).to(logits.device)
            loss += F.cross_entropy(logits[: len(targets)].float(), targets, reduction="sum").item()
            guessed += len(targets)
            if end >= waiting[0] and guessed:
                waiting = [mark for mark in waiting if mark > end]
                recent = (loss - before) / max(1, guessed - guessed_before)
                seconds = time.perf_counter() - begun
                memory = _memory(logits.device)
                found.append(Checkpoint(end, loss / guessed, recent, seconds, self.cache.nbytes, memory))
                before, guessed_before = loss, guessed
            if progress is not None:
                cache = size(self.cache.nbytes)
                progress(end, total, perplexity=math.exp(loss / max(1, guessed)), cache=cache)
        return tuple(found)

    def write(self, ids: Sequence[int], *, budget: int, ends: Sequence[int] = ()) -> list[int]:
        """Read a question after what was read, and return what the model writes after it, by greedy decoding.

        Args:
            ids: of the question; may be empty where something was read before.
            budget: the most tokens to write, at least 0.
            ends: tokens after which writing stops; they are not returned.
        """
        if len(ids):
            self._forward(np.asarray(ids, dtype=np.int64))
        if self._next is None:
            raise InputError(
                message("There is nothing to write after.", {"asked": "no tokens"}, fix="read a text first")
            )
        written: list[int] = []
        while len(written) < budget:
            token = int(self._next.argmax())
            if token in ends:
                break
            written.append(token)
            self._forward(np.array([token]))
        return written

    def _forward(self, ids: np.ndarray) -> torch.Tensor:
        """Read one piece; return logits `[tokens, vocabulary]`."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                row = torch.from_numpy(ids)[None].to(self.model.device)
                logits = self.model(row, past_key_values=self.cache).logits[0]
        finally:
            self.model.train(training)
        # A copy, for a view would hold the logits of the whole piece.
        self._next = logits[-1].clone()
        return logits


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE
    except OSError:
        return None
