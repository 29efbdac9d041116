"""An evaluation: everything measured of one model, by one protocol."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from longspan.errors import InputError, message
from longspan.evaluate.forward import Progress, check_positions
from longspan.evaluate.passkey import DEPTHS, TRIALS, Passkey, check_prompts, passkey
from longspan.evaluate.perplexity import SEGMENTS, STRIDE, Perplexity, check_windows, perplexity
from longspan.evaluate.speed import RUNS, Speed, speed
from longspan.evaluate.task import TASKS, Scores, drawn, effective_length, scores
from longspan.hf.model import check_tokens
from longspan.text.corpus import Corpus

# What is measured if nothing else is asked for.
USUAL = ("perplexity", "passkey")
MEASURES = (*USUAL, *TASKS, "speed")
# Names that stand for several measures.
GROUPS = {"ruler": TASKS, "all": MEASURES}
LENGTHS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Protocol:
    """What is measured of every model, so that models can be compared.

    Attributes:
        lengths: context lengths, in tokens.
        stride: tokens predicted at the end of each window.
        segments: windows at each length.
        depths: where a key stands in a prompt, 0 to 1.
        trials: prompts at each length and depth.
        seed: of the prompts.
        measures: what is measured, some of `MEASURES`.
    """

    lengths: tuple[int, ...] = LENGTHS
    stride: int = STRIDE
    segments: int = SEGMENTS
    depths: tuple[float, ...] = DEPTHS
    trials: int = TRIALS
    seed: int = 0
    measures: tuple[str, ...] = USUAL


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        label: what to call the model in tables and pictures.
        source: where the model came from, as the user named it.
        context: the length that its configuration states, None if it states none.
        parameters: how many weights it has.
        perplexity: by context length, None if it was not measured.
        passkey: by length and depth, None if it was not measured.
        tokens: read in all.
        seconds: taken in all.
        tasks: scores of each task that was measured.
        speed: speed and memory by length, None if they were not measured.
        dtype: that the model computes in.
    """

    label: str
    source: str
    context: int | None
    parameters: int
    perplexity: Perplexity | None
    passkey: Passkey | None
    tokens: int
    seconds: float
    tasks: tuple[Scores, ...] = ()
    speed: Speed | None = None
    dtype: str = "float32"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths at which it was measured, in tokens."""
        measured = [self.perplexity, self.passkey, *self.tasks, self.speed]
        return next((part.lengths for part in measured if part is not None), ())

    @property
    def effective_length(self) -> int | None:
        """The length up to which the tasks are done well enough, see `longspan.evaluate.task.effective_length`."""
        return effective_length(self.tasks) if self.tasks else None


def evaluate(
    model: Any,
    tokenizer: Any,
    text: Corpus,
    *,
    label: str,
    source: str | None = None,
    protocol: Protocol | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Evaluation:
    """Measure one model.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: text that the model was not trained on.
        label: what to call the model in tables and pictures.
        source: where the model came from, the label if None.
        protocol: what to measure, the default one if None.
        progress: called with the name of each part before it begins, returns what to call while it runs.

    Raises:
        InputError: the text is too short, or a length is, for what the protocol measures.
    """
    protocol = protocol or Protocol()
    # Every part refuses what it cannot measure; here before the first has spent its minutes.
    check(model, tokenizer, text, protocol)
    begun = time.perf_counter()
    lengths, asked = protocol.lengths, protocol.measures
    prompts = {"depths": protocol.depths, "trials": protocol.trials, "seed": protocol.seed}

    def shown(measure: str) -> Progress | None:
        return progress and progress(f"{label}, {measure}")

    by_context = by_depth = by_clock = None
    if "perplexity" in asked:
        windows = {"stride": protocol.stride, "segments": protocol.segments}
        by_context = perplexity(
            model, tokenizer, text, lengths=lengths, **windows, progress=shown("perplexity")
        )
    if "passkey" in asked:
        by_depth = passkey(model, tokenizer, text, lengths=lengths, **prompts, progress=shown("passkey"))
    by_task = tuple(
        scores(model, tokenizer, text, task, lengths=lengths, **prompts, progress=shown(task))
        for task in TASKS
        if task in asked
    )
    if "speed" in asked:
        by_clock = speed(model, text, lengths=lengths, progress=shown("speed"))
    rows = by_context.segments if by_context else 0
    rows += len(protocol.depths) * protocol.trials * (len(by_task) + (by_depth is not None))
    rows += RUNS + 1 if by_clock else 0
    return Evaluation(
        label=label,
        source=source or label,
        context=getattr(model.config, "max_position_embeddings", None),
        parameters=model.num_parameters(),
        perplexity=by_context,
        passkey=by_depth,
        tokens=rows * sum(set(lengths)),
        seconds=time.perf_counter() - begun,
        tasks=by_task,
        speed=by_clock,
        dtype=str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
    )


def check(model: Any, tokenizer: Any, text: Corpus, protocol: Protocol) -> None:
    """Refuse what a protocol cannot measure of a model, without measuring anything.

    Raises:
        InputError: the text is too short, or a length is, for what the protocol measures; the model has no
            positions for the longest length; or there is nothing to measure.
    """
    if not protocol.measures or not set(protocol.measures) <= set(MEASURES):
        raise InputError(
            message(
                "There is no such measure.",
                {"asked": ", ".join(protocol.measures) or "nothing", "there are": ", ".join(MEASURES)},
                fix="some of these",
            )
        )
    check_tokens(model, text.ids)
    check_positions(model, max(protocol.lengths))
    text.require(max(protocol.lengths), name="held-out text")
    if "perplexity" in protocol.measures:
        check_windows(text, protocol.lengths, protocol.stride)
    if "passkey" in protocol.measures:
        check_prompts(tokenizer, text, protocol.lengths)
    prompts = {"depths": protocol.depths, "trials": protocol.trials, "seed": protocol.seed}
    for task in set(protocol.measures) & set(TASKS):
        drawn(tokenizer, text, task, length=min(protocol.lengths), **prompts)
