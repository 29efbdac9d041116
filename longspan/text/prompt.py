"""Prompts: a question about a long text whose right answers are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.errors import InputError, message
from longspan.text.corpus import Corpus

# Tokens that a model may write, over those that the shortest right answer takes.
_SLACK = 1.5
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Prompt:
    """A question and its answers.

    Attributes:
        ids: token ids up to the answer, int64 `[tokens]`.
        answers: every word or number that belongs into the answer, in any order.
        budget: tokens that a model may write.

    Example:
        >>> prompt = Prompt(np.arange(9), ("71", "305"), budget=8)
        >>> prompt.score(" 305, 71"), prompt.score(" 71 and 3050"), prompt.score("")
        (1.0, 0.5, 0.0)
    """

    ids: np.ndarray
    answers: tuple[str, ...]
    budget: int

    def score(self, written: str) -> float:
        """Return the share of answers that stand in a text as whole words, 0 to 1."""
        found = set(_WORD.findall(written))
        return sum(answer in found for answer in self.answers) / len(self.answers)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a piece of a prompt, without the tokens that open a text."""
    # A warning that a text is longer than the model's context would be true of many texts here.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def asking(question: str | None) -> str:
    """Return what is written after a text to have a question answered, or the text summed up."""
    return "\n\nSummary:" if question is None else f"\n\nQuestion: {question}\nAnswer:"


def budget(tokenizer: Any, answers: Sequence[str]) -> int:
    """Return how many tokens a model may write: half as many again as the answers take, between commas."""
    return int(_SLACK * len(encoded(tokenizer, " " + ", ".join(answers))) + 1)


def woven(
    tokenizer: Any,
    filler: Corpus,
    pieces: Sequence[str],
    *,
    header: str,
    question: str,
    answers: Sequence[str],
    length: int,
    rng: np.random.Generator,
    depth: float | None = None,
) -> Prompt:
    """Hide pieces in filler text, in their order, so that prompt and written answer fill a length exactly.

    Args:
        tokenizer: any transformers tokenizer.
        filler: where the surrounding text is cut from.
        pieces: what is hidden.
        header: what stands in front; left out where less than half of the prompt would be filler.
        question: what stands at the end.
        answers: what belongs into the answer.
        length: tokens in all, those that may be written included.
        rng: source of the places.
        depth: where the pieces stand, 0 (the beginning of the filler) to 1 (its end); None draws a place for each.

    Raises:
        InputError: the length has no room for pieces, question and answer.
    """
    hidden = [encoded(tokenizer, piece) for piece in pieces]
    front, end, writing = (
        encoded(tokenizer, header),
        encoded(tokenizer, question),
        budget(tokenizer, answers),
    )
    fixed = sum(map(len, hidden)) + len(end) + writing
    if length < 2 * (fixed + len(front)):
        front = []
    room = length - fixed - len(front)
    if room < 0:
        raise too_short(length, fixed)
    text = filler.window(rng, room)
    places = np.sort(rng.random(len(pieces))) if depth is None else np.full(len(pieces), depth)
    cuts = np.rint(places * room).astype(int)
    parts: list[Any] = [front]
    for begin, cut, piece in zip([0, *cuts[:-1]], cuts, hidden, strict=True):
        parts += [text[begin:cut], piece]
    parts += [text[cuts[-1] :], end]
    return Prompt(np.concatenate(parts).astype(np.int64), tuple(answers), writing)


def too_short(length: int, needed: int) -> InputError:
    """Say that a prompt does not fit into a length."""
    return InputError(
        message(
            "A length is too short for this task.",
            {
                "asked": f"a prompt of {length:,} tokens",
                "needs": f"{needed:,} tokens before any text around it",
            },
            fix=f"lengths well above {needed:,}, or other tasks",
        )
    )
