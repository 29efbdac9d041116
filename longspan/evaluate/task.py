"""Tasks: questions about long texts in the manner of RULER, answered in writing, and the length up to which they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.evaluate.forward import Progress, written
from longspan.text.corpus import Corpus
from longspan.text.encoding import opening
from longspan.text.needle import multikey, multiquery, multivalue, needle
from longspan.text.prompt import Prompt
from longspan.text.variable import variables
from longspan.text.wordlist import common_words, frequent_words

# What Llama-2-7B-chat reaches at its own 4,096 tokens, on average over the paper's thirteen tasks.
THRESHOLD = 0.856

# From tokenizer, text, tokens in all, depth and source of chance to a prompt.
_Draw = Callable[[Any, Corpus, int, "float | None", np.random.Generator], Prompt]
_DRAWS: dict[str, _Draw] = {
    "needle": lambda tokenizer, text, length, depth, rng: needle(
        tokenizer, text, length=length, rng=rng, depth=depth
    ),
    "multikey": lambda tokenizer, text, length, _, rng: multikey(tokenizer, text, length=length, rng=rng),
    "multivalue": lambda tokenizer, text, length, _, rng: multivalue(tokenizer, text, length=length, rng=rng),
    "multiquery": lambda tokenizer, text, length, _, rng: multiquery(tokenizer, text, length=length, rng=rng),
    "variables": lambda tokenizer, text, length, _, rng: variables(tokenizer, text, length=length, rng=rng),
    "common-words": lambda tokenizer, _, length, __, rng: common_words(tokenizer, length=length, rng=rng),
    "frequent-words": lambda tokenizer, _, length, __, rng: frequent_words(tokenizer, length=length, rng=rng),
}
TASKS = tuple(_DRAWS)
# The one task whose answer has a single place.
_PLACED = "needle"


@dataclass(frozen=True)
class Scores:
    """How well a task was done, at each length.

    Attributes:
        task: its name.
        lengths: tokens in a prompt and its answer.
        depths: where the needle stood, 0 to 1; empty for tasks whose answers lie all over the text.
        shares: share of answers found, 0 to 1, `shares[length][depth]`; one column where there are no depths.
        prompts: at each length.
        seed: of the prompts.

    Example:
        >>> found = Scores("needle", (512, 1024), (0.0, 1.0), ((1.0, 1.0), (0.5, 1.0)), prompts=8, seed=0)
        >>> found.by_length
        (1.0, 0.75)
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]
    prompts: int
    seed: int

    @property
    def by_length(self) -> tuple[float, ...]:
        """Share of answers found at each length, over all prompts."""
        return tuple(sum(row) / len(row) for row in self.shares)


def scores(
    model: Any,
    tokenizer: Any,
    text: Corpus,
    task: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Let a model write its answers to one task at several lengths, by greedy decoding.

    A prompt's score is the share of its answers that stand in what was written, as whole words, within half as
    many tokens again as the answers take. Prompt and answer together never exceed the length. The prompts are
    the same for every model with the same tokenizer.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: text that the model was not trained on, to hide things in.
        task: one of `TASKS`.
        lengths: tokens in a prompt and its answer.
        depths: where a needle stands, 0 to 1. Other tasks draw their places, and have as many prompts.
        trials: prompts at each length and depth.
        seed: of the prompts.
        progress: called with the tokens read so far and the tokens in all.

    Raises:
        InputError: a length has no room for the task, or the text is shorter than the longest prompt.

    References:
        Hsieh et al., RULER (arXiv 2404.06654), section 3. The wording, the made-up words and the small sizes of
        short lists are ours, so scores are not those of the paper's tables.
    """
    lengths, depths = tuple(sorted(set(lengths))), tuple(sorted(set(depths)))
    text.require(max(lengths), name="held-out text")
    first = np.asarray(opening(tokenizer), np.int64)
    prompts = len(depths) * trials
    read, total = 0, sum(lengths) * prompts
    shares = []
    for length in lengths:
        asked = drawn(tokenizer, text, task, length=length, depths=depths, trials=trials, seed=seed)
        rows = [np.concatenate([first, prompt.ids]) for prompt in asked]
        found = []
        for prompt, ids in zip(asked, written(model, rows, [prompt.budget for prompt in asked]), strict=True):
            found.append(prompt.score(tokenizer.decode(ids, skip_special_tokens=True)))
            read += length
            if progress is not None:
                progress(read, total)
        cells = np.reshape(found, (len(depths) if task == _PLACED else 1, -1)).mean(axis=1)
        shares.append(tuple(float(share) for share in cells))
    return Scores(task, lengths, depths if task == _PLACED else (), tuple(shares), prompts, seed)


def drawn(
    tokenizer: Any,
    text: Corpus,
    task: str,
    *,
    length: int,
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> list[Prompt]:
    """Return the prompts of a task at one length, depth by depth; with their answers they fit into the length.

    Raises:
        InputError: the length has no room for the task.
    """
    # A generator per task and length: prompts do not depend on what else is measured.
    rng = np.random.default_rng((seed, length, TASKS.index(task)))
    room = length - len(opening(tokenizer))
    return [_DRAWS[task](tokenizer, text, room, depth, rng) for depth in depths for _ in range(trials)]


def means(found: Sequence[Scores]) -> tuple[float, ...]:
    """Return the mean over tasks at each length."""
    return tuple(float(mean) for mean in np.mean([scores.by_length for scores in found], axis=0))


def effective_length(found: Sequence[Scores], *, threshold: float = THRESHOLD) -> int | None:
    """Return the longest length up to which the mean over tasks stays at or above a threshold.

    Args:
        found: scores of one model on several tasks, at the same lengths.
        threshold: 0 to 1. By default 85.6 %, which Llama-2-7B-chat reaches at 4,096 tokens, on average over
            the paper's thirteen tasks: that model at its full length is what the paper calls good enough.

    Returns:
        A length at which, as at all shorter ones measured, the mean is high enough; None if it is at none.

    References:
        Hsieh et al., RULER (arXiv 2404.06654), section 4 and table 3.

    Example:
        >>> found = [Scores("needle", (512, 1024, 2048), (), ((1.0,), (0.9,), (0.5,)), prompts=8, seed=0)]
        >>> effective_length(found)
        1024
    """
    reached = None
    for length, mean in zip(found[0].lengths, means(found), strict=True):
        if mean < threshold:
            break
        reached = length
    return reached
