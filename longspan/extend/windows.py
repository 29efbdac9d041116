"""Training windows: long pieces of text, with windows mixed in that can only be read by looking far back."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from longspan.extend.positions import restarting, skipping
from longspan.extend.recipe import Recipe
from longspan.pattern import Causal, Pattern, parse
from longspan.text.corpus import Corpus
from longspan.text.encoding import opening
from longspan.text.passkey import passkey_prompt, shortest
from longspan.text.repeats import repeated_segments

# Depths that are tried; 41 are a hundred tokens apart in a window of 4,096.
_DEPTHS = 41
# How many different digits a key of few is drawn from.
_FEW = (2, 6)
_IGNORED = -100


class TrainingWindows(torch.utils.data.Dataset):
    """The windows of a recipe, in the order in which they are read; number `n` is always the same.

    A window depends on the seed and its number alone, so a run that is interrupted goes on with the windows that
    it would have seen. Each begins with what the tokenizer puts in front of a text. All windows of a step are of one
    kind: a step that takes the mean over their labels would not hear a passkey's few digits beside the text of others.

    Args:
        corpus: the text, of at least `recipe.window` tokens.
        tokenizer: its tokenizer.
        recipe: length of a window, number of windows, shares of the kinds of windows, pattern, seed.
        heads: query heads of the model.
        ranks: devices that share the windows of a step.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, recipe: Recipe, *, heads: int, ranks: int = 1) -> None:
        self.corpus, self.tokenizer, self.recipe, self.heads = corpus, tokenizer, recipe, heads
        self.per_step = recipe.batch * recipe.accumulate * ranks
        self.opening = np.asarray(opening(tokenizer), dtype=np.int64)
        self.least = shortest(tokenizer) + len(self.opening)
        # Where passkeys may stand depends on the stage alone, and is found once for each.
        self.depths = cache(self._depths)

    def __len__(self) -> int:
        return self.recipe.steps * self.per_step

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, number))
        step = number // self.per_step
        window = recipe.windows[recipe.stage(step)]
        body, starts, answer = self._body(self.kind(step), rng, window - len(self.opening))
        ids = torch.from_numpy(np.concatenate([self.opening, body]))
        labels = ids
        if answer:
            labels = ids.clone()
            labels[:-answer] = _IGNORED
        item = {"input_ids": ids, "labels": labels, "window": torch.tensor(number)}
        if recipe.documents == "packed":
            # The opening belongs to the first document, as far as there is one.
            starts = starts + len(self.opening)
            # Nothing in a document says how the next one begins.
            labels = labels.clone()
            labels[starts] = _IGNORED
            item |= {"labels": labels, "position_ids": torch.from_numpy(restarting(starts, window))}
        if recipe.skips and window < recipe.length:
            positions = skipping(window, reach=recipe.reach, rng=rng)
            # Without a mask, positions that jump would begin another document.
            item |= {"position_ids": torch.from_numpy(positions), "attention_mask": torch.ones_like(ids)}
        return item

    def kind(self, step: int) -> str:
        """Return what the windows of a step hold: "segments" that recur, a "passkey", or "text" alone."""
        recipe = self.recipe
        # Another stream than that of any window: a zero at the end would be the window of that number again.
        drawn = np.random.default_rng((recipe.seed, step, 1)).random()
        if drawn < recipe.repeats:
            return "segments"
        hides = drawn < recipe.repeats + recipe.passkeys
        return "passkey" if hides and len(self.depths(recipe.windows[recipe.stage(step)])) else "text"

    def _body(self, kind: str, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return tokens, the places after the first where a document begins, and how many of the last tokens are all
        that is to be guessed; 0 is the whole window."""
        one = np.zeros(0, dtype=np.int64)
        if kind == "segments":
            return repeated_segments(self.corpus, length=length, rng=rng), one, 0
        if kind == "passkey":
            depth = float(rng.choice(self.depths(length + len(self.opening))))
            # Half of the keys are of few digits: where one comes twice, the digit before does not tell which is next.
            symbols = 10 if rng.random() < 0.5 else int(rng.integers(*_FEW))
            prompt = passkey_prompt(
                self.tokenizer, self.corpus, length=length, depth=depth, rng=rng, symbols=symbols
            )
            return prompt.ids, one, prompt.answer
        start = int(rng.integers(0, len(self.corpus) - length + 1))
        starts = self.corpus.starts - start
        return self.corpus.ids[start : start + length], starts[(starts > 0) & (starts < length)], 0

    def _depths(self, window: int) -> np.ndarray:
        if window < self.least:
            return np.zeros(0)
        # One layer that reads so far is enough.
        kept = np.zeros(_DEPTHS, dtype=bool)
        for text in self.recipe.patterns(window):
            kept |= np.isin(_TRIED, readable_depths(parse(text), length=window, heads=self.heads))
        return _TRIED[kept]


def readable_depths(pattern: Pattern, *, length: int, heads: int) -> np.ndarray:
    """Return the depths, 0 to 1, at which every head of the last query reads what is hidden there.

    A key that a sparse pattern hides from the question cannot be retrieved, and asking for it all the same would
    teach the model to guess. Where no depth is left, windows are text alone.

    Example:
        >>> from longspan.pattern import Streaming
        >>> readable_depths(Streaming(64, sinks=64), length=256, heads=2)[[0, -1]]
        array([0., 1.])
    """
    places = np.round(_TRIED * (length - 1)).astype(np.int64)
    question = np.asarray(length - 1)
    readable = np.ones(_DEPTHS, dtype=bool)
    for head in range(heads):
        readable &= (pattern.at_head(head, heads) & Causal()).contains(question, places)
    return _TRIED[readable]


_TRIED = np.linspace(0, 1, _DEPTHS)
