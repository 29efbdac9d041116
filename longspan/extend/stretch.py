"""The stretch: what a recipe says of positions, as the configuration of its model."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PretrainedConfig

from longspan.errors import InputError, message
from longspan.extend.recipe import Recipe
from longspan.extend.search import Budget, search
from longspan.frequency import Frequency, LongRoPE
from longspan.frequency.expression import parse
from longspan.hf.config import METHODS, extended, with_frequency
from longspan.hf.model import load_config, load_model
from longspan.hf.rope import from_config
from longspan.text.documents import Document
from longspan.text.encoding import encode, opening

SEARCHED = "longrope"
BUDGET = Budget(population=12, parents=6, mutations=6, crossovers=6, rounds=4)
# Windows that factors are tried on, and tokens at the end of each whose loss counts, at most.
WINDOWS = 4
SCORED = 256
_FILES = (".json", ".yaml", ".yml")


def stretched(recipe: Recipe) -> PretrainedConfig:
    """Return the configuration of a recipe's model, with positions stretched to its length.

    Raises:
        InputError: the model cannot be stretched so, or factors have to be searched first.

    Example:
        >>> stretched(Recipe(rope="Linear(8)")).rope_parameters["factor"]
        8
    """
    config, rope = load_config(recipe.model), recipe.rope
    if "(" in rope:
        now = from_config(config)
        frequency = parse(rope, theta=now.theta, share=now.share)
        return with_frequency(config, frequency, length=recipe.length)
    if rope not in (*METHODS, "dynamic"):
        known = (*METHODS, SEARCHED)
        near = difflib.get_close_matches(rope, METHODS, n=1, cutoff=0.0)[0]
        raise InputError(
            message(
                "No RoPE scaling has this name.",
                {
                    "asked": f"rope {rope}",
                    "known": ", ".join(known),
                    "or": "a frequency such as YaRN(8, original=4096), or a file of factors",
                },
                fix=near,
            )
        )
    return extended(config, method=rope, length=recipe.length, margin=recipe.margin)


def settled(recipe: Recipe) -> Recipe:
    """Return a recipe with the frequency that its file holds in place of the file's name.

    A file is JSON or YAML: numbers, one for each pair of a head, as LongRoPE's factors for short and long texts; or
    the config.json of a stretched model, or the `rope_parameters` in it.

    Raises:
        InputError: the file cannot be read, or holds none of these.
    """
    if not recipe.rope.lower().endswith(_FILES):
        return recipe
    return replace(recipe, rope=str(_read(Path(recipe.rope).expanduser(), recipe)))


def found(
    recipe: Recipe,
    training: Sequence[Document],
    *,
    device: Any = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Recipe:
    """Return a recipe with factors that were searched on windows of its text, as long as the model shall read.

    Args:
        recipe: how far to stretch, and the seed of windows and search.
        training: the text to train on.
        device: where to try factors.
        progress: called with the tokens read so far and the most that will be read.

    Raises:
        InputError: as `longspan.extend.search.search`, or the text is shorter than a window.
    """
    model, tokenizer = load_model(recipe.model, device=device)
    corpus = encode(training, tokenizer)
    corpus.require(recipe.length, name="the text to search on")
    first, rng = opening(tokenizer), np.random.default_rng(recipe.seed)
    windows = [[*first, *corpus.window(rng, recipe.length - len(first))] for _ in range(WINDOWS)]
    tokens = WINDOWS * recipe.length
    best = search(
        model,
        windows,
        original=round(model.config.max_position_embeddings / recipe.margin),
        scored=min(SCORED, recipe.length // 2),
        budget=BUDGET,
        seed=recipe.seed,
        progress=progress and (lambda done, most: progress(done * tokens, most * tokens)),
    )
    return replace(recipe, rope=str(best.frequency))


def _read(path: Path, recipe: Recipe) -> Frequency:
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _unreadable(path, " ".join(str(error).split())) from error
    config = load_config(recipe.model)
    now = from_config(config)
    if isinstance(held, list):
        trained = config.max_position_embeddings
        own = {"theta": now.theta, "share": now.share}
        return LongRoPE(held, held, original=trained, factor=recipe.length / trained, **own)
    if not isinstance(held, dict):
        raise _unreadable(path, f"it holds {type(held).__name__}, not numbers or names with values")
    if "rope_type" in held:
        held = {"rope_parameters": held}
    return from_config({"rope_theta": now.theta, "max_position_embeddings": recipe.length} | held)


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        message(
            "The file of factors cannot be read.",
            {"asked": f"rope {path}", "because": reason},
            fix=f"a file with one number for each pair of a head, such as {json.dumps([1.0, 2.0, 8.0])}",
        )
    )
