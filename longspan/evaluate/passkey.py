"""Passkey retrieval: how often a model repeats a key hidden in a long text, by length and by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longspan.errors import InputError, message
from longspan.evaluate.forward import Progress, last_logits
from longspan.text.corpus import Corpus
from longspan.text.encoding import opening
from longspan.text.passkey import PasskeyPrompt, passkey_prompt, shortest

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 10


@dataclass(frozen=True)
class Passkey:
    """How often a key was retrieved, at each length and depth.

    Attributes:
        lengths: tokens in a prompt, the answer included.
        depths: where the key stood, 0 at the beginning of the text and 1 at its end.
        shares: share of prompts answered right, `shares[length][depth]`, 0 to 1.
        trials: prompts at each length and depth.
        seed: of the keys and of the places of the text.

    Example:
        >>> found = Passkey((512, 1024), (0.0, 1.0), ((1.0, 1.0), (0.5, 1.0)), trials=4, seed=0)
        >>> found.by_length
        (1.0, 0.75)
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]
    trials: int
    seed: int

    @property
    def by_length(self) -> tuple[float, ...]:
        """Share of prompts answered right at each length, over all depths."""
        return tuple(sum(row) / len(row) for row in self.shares)


def passkey(
    model: Any,
    tokenizer: Any,
    text: Corpus,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    trials: int = TRIALS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Passkey:
    """Hide a five-digit key in text and ask for it, at several lengths and depths.

    A prompt counts as answered when the likeliest next token is the right one at every token of the answer, given
    those before it. That is what greedy decoding would write: it goes on from its own tokens, but as long as they
    are right they are the answer's, and the first wrong one decides. The prompts are the same for every model with
    the same tokenizer.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: text that the model was not trained on, to hide the key in.
        lengths: tokens in a prompt, the answer included.
        depths: where the key stands, 0 is the beginning of the text and 1 its end.
        trials: prompts at each length and depth.
        seed: of the keys and of the places of the text.
        progress: called with the tokens read so far and the tokens in all.

    Raises:
        InputError: a length has no room for the key and the question, or the text is shorter than the longest
            prompt.

    References:
        Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300), section 4.2.
    """
    lengths, depths = tuple(sorted(set(lengths))), tuple(sorted(set(depths)))
    check_prompts(tokenizer, text, lengths)
    first = opening(tokenizer)
    read, total = 0, sum(lengths) * len(depths) * trials
    shares = []
    for length in lengths:
        # One generator per length: the prompts of a length do not depend on the other lengths asked for.
        rng = np.random.default_rng((seed, length))
        prompts = [
            passkey_prompt(tokenizer, text, length=length - len(first), depth=depth, rng=rng)
            for depth in depths
            for _ in range(trials)
        ]
        rows = np.stack([np.concatenate([np.asarray(first, np.int64), prompt.ids]) for prompt in prompts])
        right = []
        for logits, prompt in zip(last_logits(model, rows, _keep(prompts)), prompts, strict=True):
            right.append(_answered(logits, prompt))
            read += length
            if progress is not None:
                progress(read, total)
        cells = np.reshape(right, (len(depths), trials)).mean(axis=1)
        shares.append(tuple(float(share) for share in cells))
    return Passkey(lengths, depths, tuple(shares), trials, seed)


def check_prompts(tokenizer: Any, text: Corpus, lengths: Sequence[int]) -> None:
    """Refuse lengths at which no passkey can be hidden in a text.

    Raises:
        InputError: a length has no room for the key and the question, or the text is shorter than the longest
            prompt.
    """
    least = shortest(tokenizer) + len(opening(tokenizer))
    if min(lengths) < least:
        raise InputError(
            message(
                "A length is too short for a passkey prompt.",
                {
                    "asked": f"a prompt of {min(lengths):,} tokens",
                    "needs": f"{least:,} tokens for key and question",
                },
                fix=f"lengths of {least:,} or more",
            )
        )
    text.require(max(lengths), name="held-out text")


def _keep(prompts: Sequence[PasskeyPrompt]) -> int:
    """Return how many of the last positions predict an answer token, and one more for the last token itself."""
    return max(prompt.answer for prompt in prompts) + 1


def _answered(logits: torch.Tensor, prompt: PasskeyPrompt) -> bool:
    guess = logits[-prompt.answer - 1 : -1].argmax(dim=-1).cpu()
    return bool((guess == torch.from_numpy(prompt.ids[-prompt.answer :])).all())
