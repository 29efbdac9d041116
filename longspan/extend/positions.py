"""Positions: short windows that reach over a long context, and documents that each count from 0."""

from __future__ import annotations

import numpy as np


def skipping(length: int, *, reach: int, rng: np.random.Generator) -> np.ndarray:
    """Return positions for a short window that reaches over a long context, in two chunks (PoSE).

    The first chunk begins at 0, and its length is uniform from 1 to half of the window, rounded up. The second goes
    on after a skip that is uniform from 0 to `reach - length`, so its last position is anywhere up to `reach - 1`,
    and every distance below `reach` can come up. What is read is contiguous: only positions jump.

    Args:
        length: tokens of the window, 2 or more.
        reach: tokens of the context, at least `length`.
        rng: source of the two draws.

    Returns:
        Positions int64 `[length]`, strictly rising from 0.

    Example:
        >>> skipping(8, reach=100, rng=np.random.default_rng(1))
        array([ 0,  1, 49, 50, 51, 52, 53, 54])

    References:
        Zhu et al., PoSE (arXiv 2309.10400), section 3: two chunks, u_0 = 0 and u_1 ~ U{0, ..., L_t - L_c}; chunk
        lengths as in the authors' code. Where each chunk's content comes from makes next to no difference
        (their table 4), and one piece of text keeps passkeys whole.
    """
    first = int(rng.integers(1, -(-length // 2), endpoint=True))
    skip = int(rng.integers(0, reach - length, endpoint=True))
    positions = np.arange(length, dtype=np.int64)
    positions[first:] += skip
    return positions


def restarting(starts: np.ndarray, length: int) -> np.ndarray:
    """Return positions that count every document of a window from 0.

    Args:
        starts: places in the window where a document begins, rising; 0 begins one anyway.
        length: tokens of the window.

    Returns:
        Positions int64 `[length]`.

    Example:
        >>> restarting(np.array([3, 5]), 7)
        array([0, 1, 2, 0, 1, 0, 1])
    """
    places = np.arange(length, dtype=np.int64)
    begins = np.zeros(length, dtype=np.int64)
    begins[starts] = starts
    return places - np.maximum.accumulate(begins)
