"""Digest: a question about a text longer than a model's context, answered chunk by chunk and then over the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.errors import InputError, message
from longspan.evaluate.forward import written
from longspan.evaluate.stream import Progress
from longspan.text.documents import Document
from longspan.text.encoding import encode, opening
from longspan.text.prompt import asking, encoded


@dataclass(frozen=True)
class Digest:
    """An answer, and how it came about.

    Attributes:
        answer: the last one.
        rounds: answers of every round, the first to chunks of the text, each later one to the answers before it,
            the last a single one.
    """

    answer: str
    rounds: tuple[tuple[str, ...], ...]


def digest(
    model: Any,
    tokenizer: Any,
    text: str,
    question: str | None,
    *,
    chunk: int | None = None,
    overlap: int = 0,
    budget: int = 64,
    task: Callable[[str], Progress] | None = None,
) -> Digest:
    """Answer a question about a text that is longer than a model can read, and that it is not extended for.

    The text is cut into chunks, and the model answers from each alone. Answers are joined line by line, as many as
    fit into a chunk, and the model answers again from those, until there is one. What no single chunk tells cannot
    be found so.

    Args:
        model: a causal language model of transformers; it is never given more than `chunk` tokens, the question and
            what it writes.
        tokenizer: its tokenizer.
        text: what to read.
        question: what to answer; it is asked after every chunk. None for a summary.
        chunk: tokens of text in a prompt, at least two answers long; None for what the model's context has room for.
        overlap: tokens at the end of a chunk that begin the next one too, 0 to less than `chunk`.
        budget: the most tokens of an answer, at least 1.
        task: told the name of every round, returns what is told after every answer how many tokens are read.

    Raises:
        InputError: an empty text, sizes outside their ranges, or more than the model's context holds.

    Example:
        >>> from longspan.hf import load_model
        >>> model, tokenizer = load_model()
        >>> found = digest(model, tokenizer, "call me ishmael. " * 40, "Who?", budget=8)
        >>> [len(answers) for answers in found.rounds], found.rounds[-1] == (found.answer,)
        ([2, 1], True)
    """
    first, asked = opening(tokenizer), encoded(tokenizer, asking(question))
    line = encoded(tokenizer, "\n")
    context = getattr(model.config, "max_position_embeddings", None)
    around = len(first) + len(asked) + budget
    if chunk is None:
        chunk = context - around if isinstance(context, int) else 1024
    # Two answers and the line ends after them, so that every round has at most half the answers of the one before.
    _check(text, chunk, overlap, budget, least=2 * (budget + len(line)), around=around, context=context)
    ids = encode([Document("text", text)], tokenizer).ids
    body = ids if tokenizer.eos_token_id is None else ids[:-1]
    parts = [body[begin : begin + chunk] for begin in _begins(len(body), chunk, overlap)]
    rounds: list[tuple[str, ...]] = []
    while True:
        rows = [np.concatenate([first, part, asked]).astype(np.int64) for part in parts]
        # Answers are cut to tokens again below, as decoding and encoding may not give the same number.
        progress = task(f"round {len(rounds) + 1}") if task is not None else None
        found, done, total = [], 0, sum(map(len, parts))
        for part, answer in zip(parts, written(model, rows, [budget] * len(rows)), strict=True):
            found.append(_clean(tokenizer, answer))
            done += len(part)
            if progress is not None:
                progress(done, total)
        rounds.append(tuple(found))
        if len(found) == 1:
            return Digest(found[0], tuple(rounds))
        parts = _joined([[*encoded(tokenizer, answer)[:budget], *line] for answer in found], chunk)


def _begins(length: int, chunk: int, overlap: int) -> range:
    """Return where chunks begin: as many as it takes for the last one to reach the end."""
    return range(0, max(1, length - overlap), chunk - overlap)


def _joined(answers: Sequence[list[int]], chunk: int) -> list[np.ndarray]:
    """Join neighbouring answers, as many as fit into a chunk."""
    parts: list[list[int]] = [[]]
    for answer in answers:
        if len(parts[-1]) + len(answer) > chunk:
            parts.append([])
        parts[-1] += answer
    return [np.array(part, dtype=np.int64) for part in parts]


def _clean(tokenizer: Any, ids: list[int]) -> str:
    """Return an answer as one line, up to where the model went on to a question of its own."""
    said = tokenizer.decode(ids, skip_special_tokens=True)
    return " ".join(said.split("\nQuestion:")[0].split())


def _check(
    text: str, chunk: int, overlap: int, budget: int, *, least: int, around: int, context: int | None
) -> None:
    facts = {"asked": f"chunk={chunk}, overlap={overlap}, budget={budget}"}
    if not text.strip():
        raise InputError(message("There is no text to answer from.", facts, fix="a text that is not empty"))
    if budget < 1 or chunk < least:
        raise InputError(
            message(
                "A chunk must hold two answers, or rounds would never end.",
                facts | {"wanted": f"an answer of 1 token or more, and a chunk of {least} or more"},
                fix="a smaller budget, or a larger chunk",
            )
        )
    if not 0 <= overlap < chunk:
        raise InputError(
            message("Chunks overlap by less than their size.", facts, fix=f"overlap={chunk // 8}")
        )
    if context is not None and chunk + around > context:
        raise InputError(
            message(
                "The model cannot read a chunk, the question and its answer together.",
                facts | {"needs": f"{chunk + around} tokens", "model": f"{context} tokens"},
                fix=f"chunk={max(1, context - around)}",
            )
        )
