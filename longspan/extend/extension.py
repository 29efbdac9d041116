"""The extension: a recipe carried out, from a pretrained model to a plain checkpoint that reads further."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from longspan.extend.adapter import adapt, merge
from longspan.extend.folder import OutputFolder
from longspan.extend.recipe import Recipe
from longspan.extend.training import Progress, train
from longspan.extend.windows import TrainingWindows
from longspan.hf.attention import reset, set_pattern
from longspan.hf.config import extended
from longspan.hf.model import load_config, load_model
from longspan.pattern.expression import parse
from longspan.text.documents import documents, split
from longspan.text.encoding import encode


class Interrupted(Exception):
    """The training was stopped on request; its state is saved.

    Attributes:
        step, steps: how far it got.
    """

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(step, steps)
        self.step, self.steps = step, steps


def extend(
    recipe: Recipe,
    output: str | Path,
    *,
    device: Any = "cpu",
    progress: Callable[[str, int], Progress] | None = None,
) -> Path:
    """Extend a model to a longer context and write it as a plain checkpoint.

    Positions are stretched in the configuration, then LoRA, embeddings and norms are trained on long windows with
    the recipe's pattern, and merged. The result reads densely and needs nothing but transformers.

    Args:
        recipe: what to do.
        output: the folder to write, empty or not there yet.
        device: where to train.
        progress: called with the name of the training and the tokens done before, returns what to call after
            every step.

    Returns:
        The folder.

    Raises:
        InputError, PatternError: anything that cannot be done as asked, before the first step.
        Interrupted: the training was stopped by Ctrl-C; `resume` goes on with it.
    """
    prepared = _Prepared(recipe, device)
    folder = OutputFolder(output)
    folder.begin(recipe)
    return prepared.run(folder, None, progress)


def resume(
    output: str | Path, *, device: Any = "cpu", progress: Callable[[str, int], Progress] | None = None
) -> Path:
    """Go on with a run that was interrupted, by the recipe it began with.

    Raises:
        InputError: there is no unfinished run in the folder.
        Interrupted: the training was stopped again.
    """
    folder = OutputFolder(output)
    recipe, state = folder.unfinished()
    return _Prepared(recipe, device).run(folder, state, progress)


def stretched(recipe: Recipe) -> PretrainedConfig:
    """Return the configuration of a recipe's model, with positions stretched to its length and the margin.

    Raises:
        InputError: the model cannot be stretched so.
    """
    config = load_config(recipe.model)
    return extended(config, method=recipe.rope, length=recipe.length, margin=recipe.margin)


class _Prepared:
    """A recipe whose model, text and pattern have been found to fit together."""

    def __init__(self, recipe: Recipe, device: Any) -> None:
        self.recipe = recipe
        pattern = parse(recipe.pattern)
        config = stretched(recipe)
        # Every head must be able to read by the pattern; patterns for attention have no dropout.
        pattern.at_head(0, config.num_attention_heads)
        config.attention_dropout = 0.0
        training, _ = split(documents(recipe.text, column=recipe.column))
        self.model, self.tokenizer = load_model(recipe.model, config=config, device=device)
        corpus = encode(training, self.tokenizer)
        corpus.require(recipe.length, name="the text to train on")
        self.windows = TrainingWindows(corpus, self.tokenizer, recipe, heads=config.num_attention_heads)
        self.adapted = adapt(self.model, rank=recipe.rank)
        set_pattern(self.adapted, pattern)

    def run(
        self, folder: OutputFolder, state: str | None, progress: Callable[[str, int], Progress] | None
    ) -> Path:
        recipe = self.recipe
        done = int(state.rpartition("-")[2]) if state else 0
        name = f"training on {recipe.length:,} tokens"
        steps = train(
            self.adapted,
            self.windows,
            recipe,
            folder=folder.training,
            state=state,
            progress=progress and progress(name, done * recipe.length * recipe.batch),
        )
        if steps < recipe.steps:
            raise Interrupted(steps, recipe.steps)
        reset(self.adapted)
        folder.finish(merge(self.adapted).eval(), self.tokenizer)
        return folder.path
