"""Passkey prompts: five digits hidden in a long text, asked for at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.text.corpus import Corpus

DIGITS = 5
_HEADER = "A pass key is hidden in the text below. Remember it.\n"
_NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"
_ANSWER = " {key}"


@dataclass(frozen=True)
class PasskeyPrompt:
    """A prompt of an exact number of tokens whose last tokens are the answer.

    Attributes:
        ids: prompt and answer, int64 `[length]`.
        answer: how many of the last tokens are the answer.
    """

    ids: np.ndarray
    answer: int


def passkey_prompt(
    tokenizer: Any, filler: Corpus, *, length: int, depth: float, rng: np.random.Generator, symbols: int = 10
) -> PasskeyPrompt:
    """Hide a random five-digit key in filler text and ask for it at the end.

    Args:
        tokenizer: any transformers tokenizer.
        filler: where the surrounding text is cut from.
        length: tokens in all, answer included.
        depth: where the key stands, 0 is the beginning of the filler and 1 its end.
        rng: source of the key and of the place of the filler.
        symbols: how many digits there are to draw from. Of a few, most come twice, and a model that copies by the
            token before alone loses its place.

    References:
        Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300), section 4.2; the wording is ours.
    """
    drawn = rng.integers(0, symbols, DIGITS)
    if symbols < 10:
        drawn = rng.permutation(10)[drawn]
    key = "".join(str(digit) for digit in drawn)
    header, needle, question, answer = (
        tokenizer(part.format(key=key), add_special_tokens=False)["input_ids"]
        for part in (_HEADER, _NEEDLE, _QUESTION, _ANSWER)
    )
    # A prompt too short for half of it to be filler goes without the header.
    fixed = len(needle) + len(question) + len(answer)
    if length < 2 * (fixed + len(header)):
        header = []
    room = length - fixed - len(header)
    text = filler.window(rng, room)
    cut = round(depth * room)
    ids = np.concatenate([header, text[:cut], needle, text[cut:], question, answer])
    return PasskeyPrompt(ids.astype(np.int64), len(answer))


def shortest(tokenizer: Any) -> int:
    """Return the fewest tokens that any passkey prompt fits in, without header and filler."""
    # Some keys take more tokens than others; of these thirty-two the longest speaks for all.
    keys = np.random.default_rng(0).integers(10 ** (DIGITS - 1), 10**DIGITS, 32)
    prompts = [(_NEEDLE + "\0" + _QUESTION + "\0" + _ANSWER).format(key=key).split("\0") for key in keys]
    encoded = (tokenizer(parts, add_special_tokens=False)["input_ids"] for parts in prompts)
    return max(sum(len(ids) for ids in parts) for parts in encoded)
