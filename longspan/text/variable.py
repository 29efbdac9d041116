"""Variables: a chain of assignments scattered over a long text, whose value leads to all its names."""

from __future__ import annotations

from typing import Any

import numpy as np

from longspan.text.corpus import Corpus
from longspan.text.prompt import Prompt, woven
from longspan.text.words import number, words

# How often the value is handed on.
HOPS = 4
_DIGITS = 5
_HEADER = "Values are assigned to variables in the text below. Follow them.\n"


def variables(tokenizer: Any, filler: Corpus, *, length: int, rng: np.random.Generator) -> Prompt:
    """Assign a number to a variable, hand it on four times, and ask for all five variables that have it.

    Args:
        tokenizer: any transformers tokenizer.
        filler: where the surrounding text is cut from.
        length: tokens in all, those that may be written included.
        rng: source of names, number and places.

    Raises:
        InputError: the length has no room for the chain.

    References:
        Hsieh et al., RULER (arXiv 2404.06654), section 3.2, variable tracking with one chain of four hops; without its
        solved example, and the wording is ours.
    """
    names = [name.upper() for name in words(rng, HOPS + 1)]
    value = number(rng, _DIGITS)
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [f"\nVAR {name} = {source}\n" for name, source in zip(names, sources, strict=False)]
    question = f"\nWhich {len(names)} variables have the value {value}? VAR"
    return woven(
        tokenizer,
        filler,
        chain,
        header=_HEADER,
        question=question,
        answers=names,
        length=length,
        rng=rng,
    )
