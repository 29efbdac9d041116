"""Repeated segments: text in which random strings and pieces of text come back after gaps.

A random string can only be copied by looking back at its first occurrence, and a piece of text is copied best that
way, so these windows teach a model to retrieve at every distance, many times per window, where one passkey teaches
it once.
"""

from __future__ import annotations

import numpy as np

from longspan.text.corpus import Corpus

# How many different tokens a random segment of few is spelled with.
_FEW = (3, 8)


def repeated_segments(
    filler: Corpus, *, length: int, rng: np.random.Generator, few: float = 0.0
) -> np.ndarray:
    """Return `length` tokens in which a few segments recur between pieces of text.

    Half of the segments are made of tokens drawn at random from the corpus, so they are spelled in the corpus's own
    alphabet yet cannot be guessed; the others are pieces of its text. About half of the window is segments.

    Args:
        filler: where tokens and pieces of text come from.
        length: tokens in all.
        rng: source of all that is drawn.
        few: share of the random segments that are spelled with three to seven different tokens, so that each comes
            again within the segment and no single token before tells where in it one is.
    """
    longest = max(4, min(length // 8, 64))
    segments = []
    for _ in range(int(rng.integers(2, 2 + max(1, length // 128)))):
        size = int(rng.integers(4, longest + 1))
        if rng.random() < 0.5:
            segments.append(filler.window(rng, size))
        elif few and rng.random() < few:
            segments.append(rng.choice(rng.choice(filler.ids, int(rng.integers(*_FEW))), size))
        else:
            segments.append(rng.choice(filler.ids, size))
    pieces: list[np.ndarray] = []
    total = 0
    while total < length:
        if rng.random() < 0.5:
            piece = filler.window(rng, int(rng.integers(2, max(4, length // 6))))
        else:
            piece = segments[int(rng.integers(len(segments)))]
        pieces.append(piece)
        total += len(piece)
    return np.concatenate(pieces)[:length].astype(np.int64)
