"""Training windows: long pieces of text, with windows mixed in that can only be read by looking far back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longspan.extend.recipe import Recipe
from longspan.pattern import Causal, Pattern, parse
from longspan.text.corpus import Corpus
from longspan.text.encoding import opening
from longspan.text.passkey import passkey_prompt
from longspan.text.repeats import repeated_segments

# Depths that are tried; 41 are a hundred tokens apart in a window of 4,096.
_DEPTHS = 41


class TrainingWindows(torch.utils.data.Dataset):
    """The windows of a recipe; number `n` is always the same.

    A window depends on the seed and its number alone, so a run that is interrupted goes on with the windows that
    it would have seen. Each begins with what the tokenizer puts in front of a text.

    Args:
        corpus: the text, of at least `recipe.length` tokens.
        tokenizer: its tokenizer.
        recipe: length of a window, number of windows, shares of the kinds of windows, pattern, seed.
        heads: query heads of the model.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, recipe: Recipe, *, heads: int) -> None:
        self.corpus, self.tokenizer, self.recipe = corpus, tokenizer, recipe
        self.depths = readable_depths(parse(recipe.pattern), length=recipe.length, heads=heads)
        self.opening = np.asarray(opening(tokenizer), dtype=np.int64)

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.recipe.seed, number))
        body = self._body(rng, self.recipe.length - len(self.opening))
        ids = torch.from_numpy(np.concatenate([self.opening, body]))
        return {"input_ids": ids, "labels": ids}

    def _body(self, rng: np.random.Generator, length: int) -> np.ndarray:
        kind = rng.random()
        if kind < self.recipe.repeats:
            return repeated_segments(self.corpus, length=length, rng=rng)
        if kind < self.recipe.repeats + self.recipe.passkeys and len(self.depths):
            depth = float(rng.choice(self.depths))
            return passkey_prompt(self.tokenizer, self.corpus, length=length, depth=depth, rng=rng).ids
        return self.corpus.window(rng, length)


def readable_depths(pattern: Pattern, *, length: int, heads: int) -> np.ndarray:
    """Return the depths, 0 to 1, at which every head of the last query reads what is hidden there.

    A key that a sparse pattern hides from the question cannot be retrieved, and asking for it all the same would
    teach the model to guess. Where no depth is left, windows are text alone.

    Example:
        >>> from longspan.pattern import Streaming
        >>> readable_depths(Streaming(64, sinks=64), length=256, heads=2)[[0, -1]]
        array([0., 1.])
    """
    depths = np.linspace(0, 1, _DEPTHS)
    places = np.round(depths * (length - 1)).astype(np.int64)
    question = np.asarray(length - 1)
    readable = np.ones(_DEPTHS, dtype=bool)
    for head in range(heads):
        readable &= (pattern.at_head(head, heads) & Causal()).contains(question, places)
    return depths[readable]
