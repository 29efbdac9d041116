"""Words: made-up ones, which no model has seen and every tokenizer can spell."""

from __future__ import annotations

import numpy as np

_CONSONANTS, _VOWELS = "bdfgjklmnprstvwz", "aeiou"
_SYLLABLES = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
# A word is three syllables.
WORDS = len(_SYLLABLES) ** 3


def words(rng: np.random.Generator, number: int) -> list[str]:
    """Return made-up words of six letters, all different.

    Args:
        rng: source of the choice.
        number: how many, at most 512,000.

    Example:
        >>> words(np.random.default_rng(0), 3)
        ['razeno', 'naweje', 'vobozi']
    """
    size = len(_SYLLABLES)
    chosen = rng.choice(WORDS, number, replace=False, shuffle=False)
    drawn = rng.permutation(chosen).tolist()
    return ["".join(_SYLLABLES[code // size**place % size] for place in (2, 1, 0)) for code in drawn]


def number(rng: np.random.Generator, digits: int) -> str:
    """Return a random number of so many digits, the first of which is not zero."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))
