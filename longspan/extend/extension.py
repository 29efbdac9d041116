"""The extension: a recipe carried out, from a pretrained model to a plain checkpoint that reads further."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longspan.errors import InputError, message
from longspan.extend import state as states
from longspan.extend.activations import check_activations
from longspan.extend.adapter import adapt, causal_model, check_method, merge
from longspan.extend.folder import OutputFolder
from longspan.extend.forecast import Forecast, Machine
from longspan.extend.loss import chunked
from longspan.extend.recipe import Recipe
from longspan.extend.stretch import SEARCHED, found, settled, stretched
from longspan.extend.training import KEPT, Progress, train, trained_bytes
from longspan.extend.windows import TrainingWindows
from longspan.hf import precision
from longspan.hf.attention import reset, set_pattern
from longspan.hf.layers import windows
from longspan.hf.model import check_tokens, load_config, load_model
from longspan.hf.precision import saved_dtype, training_dtype
from longspan.pattern.expression import parse
from longspan.ring.watch import TIMEOUT
from longspan.text.documents import documents, split
from longspan.text.encoding import encode

Reporter = Callable[[str, int], Progress]


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
    timeout: timedelta = TIMEOUT,
    progress: Reporter | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Extend a model to a longer context and write it as a plain checkpoint.

    Positions are stretched in the configuration, then the weights that the method names are trained on long windows
    with the recipe's pattern, and merged. The result reads densely and needs nothing but transformers.

    Killed at any moment, it can be gone on with by `resume`, to the same result. Under torchrun or accelerate every
    process calls this, and the first one alone writes.

    Args:
        recipe: what to do.
        output: the folder to write, empty or not there yet.
        device: where to train.
        timeout: how long processes wait for one another.
        progress: called with the name of the training and the tokens done before, returns what to call after
            every step.
        note: called before the training with each line of what it will take.

    Returns:
        The folder.

    Raises:
        InputError, PatternError: anything that cannot be done as asked, before the first step; later, a disk that
            is full or a loss that is no number, with the last state kept.
        RankError: a process is gone or did not answer within the timeout, with the last state kept.
        Interrupted: the training was stopped by Ctrl-C; `resume` goes on with it.
    """
    folder = OutputFolder(output)
    first = rank() == 0
    if first:
        folder.check()
    prepared = _Prepared(recipe, device, progress)
    if note is not None:
        for line in prepared.forecast.lines(process=prepared.process()):
            note(line)
    if first:
        folder.require(prepared.written())
        # Factors that were searched or read from a file are in this recipe, so going on needs neither.
        folder.begin(prepared.recipe)
    return prepared.run(folder, None, timeout, progress)


def resume(
    output: str | Path,
    *,
    device: Any = "cpu",
    timeout: timedelta = TIMEOUT,
    progress: Reporter | None = None,
) -> Path:
    """Go on with a run that was interrupted, by the recipe it began with, from its last whole state.

    Raises:
        InputError: there is no unfinished run in the folder.
        RankError: as for `extend`.
        Interrupted: the training was stopped again.
    """
    folder = OutputFolder(output)
    recipe, state = folder.unfinished()
    prepared = _Prepared(recipe, device)
    if rank() == 0:
        states.sweep(folder.training)
        folder.require(prepared.written(kept=0))
    return prepared.run(folder, state, timeout, progress)


def rank() -> int:
    """Return the number of this process among those that torchrun or accelerate started, 0 for one alone."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """Return how many processes torchrun or accelerate started, 1 for one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def together(recipe: Recipe) -> int:
    """Return how many processes read each window together, or raise InputError where they cannot be divided so."""
    number = recipe.sharing(ranks())
    if not recipe.divides(ranks()):
        raise InputError(
            message(
                "The processes cannot be divided among the windows.",
                {
                    "asked": f"{number} processes for each window of {recipe.windows[0]:,} tokens",
                    "there are": f"{ranks()} processes",
                },
                fix="torchrun --nproc-per-node with a multiple of --sequence-ranks, and two tokens for each",
            )
        )
    return number


def _machine(device: torch.device) -> Machine:
    """Return what there is to train on here; its speed is not known, and nothing depends on it."""
    if device.type == "cuda":
        return Machine(ranks(), torch.cuda.mem_get_info(device)[0], 0.0, torch.bfloat16)
    dtype = torch.bfloat16 if precision.bfloat16_is_fast(on_cpu=True) else torch.float32
    return Machine(ranks(), psutil.virtual_memory().available, 0.0, dtype)


def _check_alone() -> None:
    """Refuse a search by several processes, which might find different factors."""
    if ranks() > 1:
        raise InputError(
            message(
                "Factors are searched by one process.",
                {"asked": f"rope {SEARCHED} on {ranks()} processes"},
                fix="longspan extend on one device first; then --rope with the rope in its recipe.yaml",
            )
        )


class _Prepared:
    """A recipe whose model, text and pattern have been found to fit together."""

    def __init__(self, recipe: Recipe, device: Any, progress: Reporter | None = None) -> None:
        check_method(recipe.method)
        check_activations(recipe.activations, torch.device(device))
        recipe = settled(recipe)
        self.together = together(recipe)
        patterns = [[parse(text) for text in recipe.patterns(window)] for window in recipe.windows]
        searching = recipe.rope == SEARCHED
        if searching:
            _check_alone()
        config = load_config(recipe.model) if searching else stretched(recipe)
        # Every head must be able to read by the pattern.
        for pattern in {part for stage in patterns for part in stage}:
            pattern.at_head(0, config.num_attention_heads)
        self.forecast = Forecast(config, recipe, _machine(torch.device(device)))
        self.forecast.require()
        training, _ = split(documents(recipe.text, column=recipe.column))
        if ranks() > 1 and torch.device(device).type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if searching:
            step = progress and progress("searching factors", 0)
            recipe = found(recipe, training, device=device, progress=step)
            config = stretched(recipe)
        # Patterns for attention have no dropout.
        config.attention_dropout = 0.0
        self.recipe, self.config = recipe, config
        self.device, self.saved = torch.device(device), saved_dtype(config)
        self.model, self.tokenizer = self._loaded(bits=4 if recipe.method == "qlora" else 0)
        if recipe.loss == "chunked":
            # It finds out whether it is this model's loss.
            with chunked(self.model):
                pass
        corpus = encode(training, self.tokenizer)
        check_tokens(self.model, corpus.ids)
        corpus.require(recipe.window, name="the text to train on")
        self.windows = TrainingWindows(
            corpus,
            self.tokenizer,
            recipe,
            heads=config.num_attention_heads,
            ranks=ranks() // self.together,
            own=windows(config),
        )
        self.size = self.model.num_parameters() * self.saved.itemsize
        self.adapted = adapt(self.model, rank=recipe.rank, method=recipe.method, seed=recipe.seed)
        # Any of the patterns will do to find out that the model takes them.
        set_pattern(causal_model(self.adapted), patterns[0] if len(patterns[0]) > 1 else patterns[0][0])

    def process(self) -> int | None:
        """Return the bytes that this process takes now beside the model; None where that lies on another device."""
        weights = list(self.adapted.parameters())
        if weights[0].device.type != "cpu":
            return None
        held = sum(weight.numel() * weight.element_size() for weight in weights)
        return max(0, psutil.Process().memory_info().rss - held)

    def written(self, kept: int = KEPT) -> int:
        """Return the bytes that the run writes at most: states that are kept, one more, and the result."""
        return (kept + 1) * trained_bytes(self.adapted) + self.size

    def run(
        self, folder: OutputFolder, state: Path | None, timeout: timedelta, progress: Reporter | None
    ) -> Path:
        recipe = self.recipe
        done = states.step(state) if state else 0
        name = f"training on {recipe.window:,} tokens"
        steps = train(
            self.adapted,
            self.windows,
            recipe,
            folder=folder.training,
            state=state,
            together=self.together,
            timeout=timeout,
            progress=progress and progress(name, recipe.tokens(done)),
        )
        if steps < recipe.steps:
            raise Interrupted(steps, recipe.steps)
        if rank() == 0:
            reset(self.adapted)
            merged = merge(self.adapted, fresh=lambda: self._loaded()[0])
            folder.finish(merged.to(self.saved).eval(), self.tokenizer)
        return folder.path

    def _loaded(self, bits: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Read the model, in the lowest precision that its training may be in."""
        full = self.recipe.method == "full"
        dtype = torch.float32 if full else training_dtype(self.config, _machine(self.device).dtype)
        return load_model(self.recipe.model, config=self.config, dtype=dtype, device=self.device, bits=bits)
