"""Training windows: long pieces of text, with windows mixed in that can only be read by looking far back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longspan.extend.recipe import Recipe
from longspan.text.corpus import Corpus
from longspan.text.encoding import opening
from longspan.text.passkey import passkey_prompt
from longspan.text.repeats import repeated_segments


class TrainingWindows(torch.utils.data.Dataset):
    """The windows of a recipe; number `n` is always the same.

    A window depends on the seed and its number alone, so a run that is interrupted goes on with the windows that
    it would have seen. Each begins with what the tokenizer puts in front of a text.

    Args:
        corpus: the text, of at least `recipe.length` tokens.
        tokenizer: its tokenizer.
        recipe: length of a window, number of windows, shares of the kinds of windows, seed.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, recipe: Recipe) -> None:
        self.corpus, self.tokenizer, self.recipe = corpus, tokenizer, recipe
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
        if kind < self.recipe.repeats + self.recipe.passkeys:
            depth = rng.random()
            return passkey_prompt(self.tokenizer, self.corpus, length=length, depth=depth, rng=rng).ids
        return self.corpus.window(rng, length)
