"""Needles: numbers hidden in a long text under made-up names, asked for at its end."""

from __future__ import annotations

from typing import Any

import numpy as np

from longspan.text.corpus import Corpus
from longspan.text.prompt import Prompt, woven
from longspan.text.words import number, words

DIGITS = 7
# Needles in a text that holds several.
SEVERAL = 4
_HEADER = "Magic numbers are hidden in the text below. Remember them.\n"
_NEEDLE = "\nA magic number of {name} is {value}.\n"


def needle(
    tokenizer: Any, filler: Corpus, *, length: int, rng: np.random.Generator, depth: float | None = None
) -> Prompt:
    """Hide one number and ask for it (RULER's single-key retrieval, in other words).

    Args:
        tokenizer: any transformers tokenizer.
        filler: where the surrounding text is cut from.
        length: tokens in all, those that may be written included.
        rng: source of name, number and places.
        depth: where it stands, 0 (beginning) to 1 (end); None draws it.

    Raises:
        InputError: the length has no room for it.

    References:
        Hsieh et al., RULER (arXiv 2404.06654), section 3.1, as all tasks of this file; the wording is ours.
    """
    return _asked(tokenizer, filler, [1], asked=1, length=length, rng=rng, depth=depth)


def multikey(tokenizer: Any, filler: Corpus, *, length: int, rng: np.random.Generator) -> Prompt:
    """Hide four numbers under four names and ask for one of them; the others distract."""
    return _asked(tokenizer, filler, [1] * SEVERAL, asked=1, length=length, rng=rng)


def multivalue(tokenizer: Any, filler: Corpus, *, length: int, rng: np.random.Generator) -> Prompt:
    """Hide four numbers under one name and ask for all of them."""
    return _asked(tokenizer, filler, [SEVERAL], asked=1, length=length, rng=rng)


def multiquery(tokenizer: Any, filler: Corpus, *, length: int, rng: np.random.Generator) -> Prompt:
    """Hide four numbers under four names and ask for all of them."""
    return _asked(tokenizer, filler, [1] * SEVERAL, asked=SEVERAL, length=length, rng=rng)


def _asked(
    tokenizer: Any,
    filler: Corpus,
    values: list[int],
    *,
    asked: int,
    length: int,
    rng: np.random.Generator,
    depth: float | None = None,
) -> Prompt:
    """Hide as many numbers under each name as `values` says, and ask for those of the first `asked` names."""
    names = words(rng, len(values))
    numbers = {
        name: [number(rng, DIGITS) for _ in range(many)] for name, many in zip(names, values, strict=True)
    }
    hidden = [_NEEDLE.format(name=name, value=value) for name in names for value in numbers[name]]
    wanted = names[:asked]
    answers = [value for name in wanted for value in numbers[name]]
    subject = " and ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
    if len(answers) == 1:
        question = f"\nWhat is the magic number of {subject}? A magic number of {subject} is"
    else:
        question = f"\nWhat are the {len(answers)} magic numbers of {subject}? They are"
    return woven(
        tokenizer,
        filler,
        [hidden[place] for place in rng.permutation(len(hidden))],
        header=_HEADER,
        question=question,
        answers=answers,
        length=length,
        rng=rng,
        depth=depth,
    )
