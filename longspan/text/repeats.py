"""Repeated segments: text in which random strings come back after gaps.

Copying such a string is only possible by looking back at its first occurrence, so these windows teach a
model to retrieve at every distance, many times per window, where one passkey teaches it once.
"""

from __future__ import annotations

import numpy as np

from longspan.text.corpus import Corpus


def repeated_segments(filler: Corpus, *, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return `length` tokens in which a few random segments recur between pieces of text.

    A segment is made of tokens drawn at random from the corpus itself, so it is spelled in the corpus's
    own alphabet yet cannot be guessed. About half of the window is text, half segments.
    """
    longest = max(4, min(length // 8, 48))
    segments = [
        rng.choice(filler.ids, int(rng.integers(4, longest + 1)))
        for _ in range(int(rng.integers(2, 2 + max(1, length // 128))))
    ]
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
