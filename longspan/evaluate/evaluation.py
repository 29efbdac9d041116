"""An evaluation: everything measured of one model, by one protocol."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from longspan.evaluate.forward import Progress
from longspan.evaluate.passkey import DEPTHS, TRIALS, Passkey, check_prompts, passkey
from longspan.evaluate.perplexity import SEGMENTS, STRIDE, Perplexity, check_windows, perplexity
from longspan.text.corpus import Corpus

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
    """

    lengths: tuple[int, ...] = LENGTHS
    stride: int = STRIDE
    segments: int = SEGMENTS
    depths: tuple[float, ...] = DEPTHS
    trials: int = TRIALS
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        label: what to call the model in tables and pictures.
        source: where the model came from, as the user named it.
        context: the length that its configuration states, None if it states none.
        parameters: how many weights it has.
        perplexity: by context length.
        passkey: by length and depth.
        tokens: read in all.
        seconds: taken in all.
    """

    label: str
    source: str
    context: int | None
    parameters: int
    perplexity: Perplexity
    passkey: Passkey
    tokens: int
    seconds: float


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
    # Both parts refuse what they cannot measure; here before the first has spent its minutes.
    check_windows(text, protocol.lengths, protocol.stride)
    check_prompts(tokenizer, text, protocol.lengths)
    begun = time.perf_counter()
    by_context = perplexity(
        model,
        tokenizer,
        text,
        lengths=protocol.lengths,
        stride=protocol.stride,
        segments=protocol.segments,
        progress=progress and progress(f"{label}, perplexity"),
    )
    by_depth = passkey(
        model,
        tokenizer,
        text,
        lengths=protocol.lengths,
        depths=protocol.depths,
        trials=protocol.trials,
        seed=protocol.seed,
        progress=progress and progress(f"{label}, passkey"),
    )
    windows = by_context.segments + len(by_depth.depths) * by_depth.trials
    return Evaluation(
        label=label,
        source=source or label,
        context=getattr(model.config, "max_position_embeddings", None),
        parameters=model.num_parameters(),
        perplexity=by_context,
        passkey=by_depth,
        tokens=windows * sum(by_context.lengths),
        seconds=time.perf_counter() - begun,
    )
