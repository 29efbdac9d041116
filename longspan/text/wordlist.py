"""Word lists: long lists of made-up words, of which the most frequent are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longspan.text.prompt import Prompt, budget, encoded, too_short
from longspan.text.words import WORDS, words

# From so many entries on, a list has the paper's frequencies; shorter ones have lower ones, or nothing else would fit.
_LONG = 600
_PAPER, _SHORT = (10, 30, 3), (5, 8, 1)
_TOP, _EXPONENT = 3, 2.0
# The fewest entries whose three most frequent words differ in frequency from the fourth.
_LEAST_FREQUENT = 40


def common_words(tokenizer: Any, *, length: int, rng: np.random.Generator) -> Prompt:
    """List words in random order, a few of them often and all others seldom, and ask for the few.

    From 600 entries on ten words stand there 30 times each and others 3 times, as in the paper; in shorter
    lists, five words 8 times and others once.

    Args:
        tokenizer: any transformers tokenizer.
        length: tokens in all, those that may be written included; the list takes what the rest leaves.
        rng: source of the words and of their order.

    Raises:
        InputError: the length has no room for the common words.

    References:
        Hsieh et al., RULER (arXiv 2404.06654), section 3.3; with made-up words and without its solved example.
    """
    pool = words(rng, min(WORDS, max(_PAPER[0], length)))

    def entries(size: int) -> tuple[list[str], list[str]]:
        common, often, seldom = _PAPER if size >= _LONG else _SHORT
        others = -(-max(0, size - common * often) // seldom)
        counted = [(word, often) for word in pool[:common]]
        counted += [(word, seldom) for word in pool[common : common + others]]
        # The last of the others is cut off where the size asks for less of it.
        listed = [word for word, times in counted for _ in range(times)]
        return listed[: max(size, common * often)], pool[:common]

    return _listed(tokenizer, entries, _SHORT[0] * _SHORT[1] + 1, length=length, rng=rng)


def frequent_words(tokenizer: Any, *, length: int, rng: np.random.Generator) -> Prompt:
    """List words whose frequencies follow a Zeta distribution, and ask for the three most frequent.

    The word of rank k stands there `size * k ** -2 / zeta(2)` times, rounded down, until the list is full.

    Args:
        tokenizer: any transformers tokenizer.
        length: tokens in all, those that may be written included; the list takes what the rest leaves.
        rng: source of the words and of their order.

    Raises:
        InputError: the length has no room for forty words.

    References:
        Hsieh et al., RULER (arXiv 2404.06654), section 3.3, with its exponent of 2.0.
    """
    pool = words(rng, min(WORDS, length))
    weight = np.arange(1, length + 1) ** -_EXPONENT * 6 / np.pi**2

    def entries(size: int) -> tuple[list[str], list[str]]:
        counts = np.maximum(1, (size * weight[:size]).astype(int))
        listed = [word for word, times in zip(pool, counts.tolist(), strict=False) for _ in range(times)]
        return listed[:size], pool[:_TOP]

    return _listed(tokenizer, entries, _LEAST_FREQUENT, length=length, rng=rng)


def _listed(
    tokenizer: Any,
    entries: Callable[[int], tuple[list[str], list[str]]],
    least: int,
    *,
    length: int,
    rng: np.random.Generator,
) -> Prompt:
    """Return a list that fits, of at least `least` entries and within a percent of the longest."""
    order = rng.random(length)

    def prompt(size: int) -> Prompt:
        listed, answers = entries(size)
        question = _asked([listed[place] for place in np.argsort(order[: len(listed)])], answers)
        ids = np.asarray(encoded(tokenizer, question), np.int64)
        return Prompt(ids, tuple(answers), budget(tokenizer, answers))

    found = prompt(least)
    if len(found.ids) + found.budget > length:
        raise too_short(length, len(found.ids) + found.budget)
    # No word takes less than a token.
    low, high = least, length
    while high - low > low // 100:
        # Tokens are nearly proportional to entries, which a guess makes use of.
        guess = int(low * (length - found.budget) / len(found.ids))
        guess = min(high, max(low + 1, guess))
        tried = prompt(guess)
        if len(tried.ids) + tried.budget <= length:
            low, found = guess, tried
        else:
            high = guess - 1
    return found


def _asked(listed: Sequence[str], answers: Sequence[str]) -> str:
    return (
        f"{' '.join(listed)}\nWhich {len(answers)} words are the most frequent in this list? "
        f"The {len(answers)} most frequent words are"
    )
