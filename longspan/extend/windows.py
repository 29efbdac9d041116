"""Training windows: long pieces of text, with windows mixed in that can only be read by looking far back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from longspan.derive.reach import sight
from longspan.extend.positions import restarting, skipping
from longspan.extend.recipe import Recipe
from longspan.hf.layers import layer_patterns
from longspan.pattern import Pattern, parse
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
        own: windows that the model itself has, layer by layer, see `longspan.hf.layers.windows`; None for a model
            that reads densely.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        recipe: Recipe,
        *,
        heads: int,
        ranks: int = 1,
        own: Sequence[int | None] | None = None,
    ) -> None:
        self.corpus, self.tokenizer, self.recipe = corpus, tokenizer, recipe
        self.heads, self.own = heads, own
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
        parts = [parse(text) for text in self.recipe.patterns(window)]
        return readable_depths(parts, length=window, heads=self.heads, own=self.own)


def readable_depths(
    patterns: Sequence[Pattern], *, length: int, heads: int, own: Sequence[int | None] | None = None
) -> np.ndarray:
    """Return the depths, 0 to 1, at which the last query can find what is hidden there.

    A key that a sparse pattern hides from the question cannot be retrieved, and asking for it all the same would
    teach the model to guess. Where no depth is left, windows are text alone.

    Law: every head of one layer reads what stands there. Where all layers of the model have shorter windows of their
    own, it finds what it finds by passing it on, so what stands there must come up to the question layer by layer,
    through whatever heads.

    Args:
        patterns: one for all layers, or one for each.
        length: tokens of a window.
        heads: query heads.
        own: as for `TrainingWindows`.

    Example:
        >>> from longspan.pattern import Causal, Streaming
        >>> readable_depths([Streaming(64, sinks=64)], length=256, heads=2)[[0, -1]]
        array([0., 1.])
        >>> readable_depths([Causal()], length=401, heads=2, own=(101, 101))[[0, -1]]
        array([0.5, 1. ])
    """
    own = (None,) * len(patterns) if own is None else own
    layers = layer_patterns(patterns, own)
    places = np.round(_TRIED * (length - 1)).astype(np.int64)
    if all(window is not None and window < length for window in own):
        readable = sight(layers, length=length, heads=heads)[places]
    else:
        readable = np.zeros(_DEPTHS, dtype=bool)
        for layer in set(layers):
            readable |= _read(layer, places, length - 1, heads)
    return _TRIED[readable]


def _read(pattern: Pattern, places: np.ndarray, question: int, heads: int) -> np.ndarray:
    """Return which places every head of a query reads."""
    read = np.ones(len(places), dtype=bool)
    for single in {pattern.at_head(head, heads) for head in range(heads)}:
        read &= single.contains(np.asarray(question), places)
    return read


_TRIED = np.linspace(0, 1, _DEPTHS)
