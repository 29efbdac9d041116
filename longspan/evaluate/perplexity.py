"""Perplexity by context length: the same tokens predicted from ever longer contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from longspan.errors import InputError, message
from longspan.evaluate.forward import Progress, last_logits
from longspan.text.corpus import Corpus
from longspan.text.encoding import opening

STRIDE = 256
SEGMENTS = 24


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts the same tokens from contexts of several lengths.

    Attributes:
        lengths: tokens in a window, the predicted ones included.
        losses: mean negative log-likelihood at each length, in nats per token.
        stride: tokens predicted at the end of each window.
        segments: windows at each length.
        text_bytes: bytes of UTF-8 that the predicted tokens spell.
        crossing: whether windows run across the borders of documents, for lack of documents long enough.

    Example:
        >>> found = Perplexity((512, 1024), (1.5, 1.25), stride=256, segments=4, text_bytes=4096, crossing=False)
        >>> found.tokens, [round(value, 3) for value in found.values]
        (1024, [4.482, 3.49])
        >>> [round(value, 3) for value in found.bits_per_byte]
        [0.541, 0.451]
    """

    lengths: tuple[int, ...]
    losses: tuple[float, ...]
    stride: int
    segments: int
    text_bytes: int
    crossing: bool

    @property
    def tokens(self) -> int:
        """Predicted tokens, the same ones at every length."""
        return self.stride * self.segments

    @property
    def values(self) -> tuple[float, ...]:
        """Perplexity at each length, `exp(loss)`."""
        return tuple(float(value) for value in np.exp(self.losses))

    @property
    def bits_per_byte(self) -> tuple[float, ...]:
        """Loss at each length in bits per byte of text, which compares models of different tokenizers."""
        return tuple(loss / float(np.log(2)) * self.tokens / self.text_bytes for loss in self.losses)


def perplexity(
    model: Any,
    tokenizer: Any,
    text: Corpus,
    *,
    lengths: Sequence[int],
    stride: int = STRIDE,
    segments: int = SEGMENTS,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure perplexity at several context lengths on the same tokens.

    `segments` runs of `stride` tokens are spread evenly over the text, each with at least `max(lengths)` tokens
    up to its end. For a length L a run is predicted from the window of L tokens that ends with it, so its tokens
    see L - stride to L - 1 others before them, and the lengths differ in nothing but context.

    Windows lie within one document if the long enough documents hold `segments` runs; else they are cut from
    the documents end to end, and the result says so (`crossing`). A text with fewer runs gives fewer segments.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: text that the model was not trained on.
        lengths: tokens in a window, each more than `stride`.
        stride: tokens predicted at the end of each window.
        segments: windows at each length.
        progress: called with the tokens read so far and the tokens in all.

    Raises:
        InputError: a length is not more than the stride, or the text is shorter than the longest window.

    References:
        Press et al., Train Short, Test Long (arXiv 2108.12409), section 2.2 and appendix B, on sliding windows.
    """
    lengths = tuple(sorted(set(lengths)))
    check_windows(text, lengths, stride)
    ends, crossing = _ends(text, lengths[-1], stride, segments)
    first = opening(tokenizer)
    read, total = 0, sum(lengths) * len(ends)
    losses = []
    for length in lengths:
        rows = np.stack([text.ids[end - length : end] for end in ends])
        rows[:, : len(first)] = first
        loss = 0.0
        for logits, row in zip(last_logits(model, rows, stride + 1), rows, strict=True):
            targets = torch.from_numpy(row[-stride:]).to(logits.device)
            loss += torch.nn.functional.cross_entropy(logits[:-1].float(), targets).item()
            read += length
            if progress is not None:
                progress(read, total)
        losses.append(loss / len(ends))
    spelled = [
        tokenizer.decode(text.ids[end - stride : end].tolist(), skip_special_tokens=True) for end in ends
    ]
    return Perplexity(
        lengths=lengths,
        losses=tuple(losses),
        stride=stride,
        segments=len(ends),
        text_bytes=sum(len(part.encode()) for part in spelled),
        crossing=crossing,
    )


def check_windows(text: Corpus, lengths: Sequence[int], stride: int) -> None:
    """Refuse lengths at which the perplexity of a text cannot be measured.

    Raises:
        InputError: a length is not more than the stride, or the text is shorter than the longest window.
    """
    if min(lengths) <= stride:
        raise InputError(
            message(
                "A context must be longer than the tokens it predicts.",
                {
                    "asked": f"perplexity at {min(lengths):,} tokens",
                    "stride": f"the last {stride:,} are predicted",
                },
                fix=f"lengths above {stride:,}, or a smaller stride",
            )
        )
    text.require(max(lengths), name="held-out text")


def _ends(text: Corpus, longest: int, stride: int, segments: int) -> tuple[np.ndarray, bool]:
    """Return where the segments end, evenly spread, and whether their windows cross borders of documents."""
    borders = [*text.starts.tolist(), len(text)]
    within = [np.arange(begin + longest, end + 1, stride) for begin, end in pairwise(borders)]
    places = np.concatenate(within)
    crossing = len(places) < segments
    if crossing:
        places = np.arange(longest, len(text) + 1, stride)
    chosen = min(segments, len(places))
    # The middles of `chosen` equal parts of the list.
    return places[(np.arange(chosen) * 2 + 1) * len(places) // (2 * chosen)], crossing
