"""The papers in small: what they report of sparse training, positions and adapters, measured again on the default model.

Every part compares a few ways to extend the default model (or to train a small one), with the same text, steps and
seeds. A cell, one way with one seed, is written to the JSON as soon as it is finished and skipped by the next run, so
a run may be killed at any moment. Cells that several parts share run once. What comes out is a table for each part,
with the claims of its paper that it reproduces and those that it does not, here and in docs/papers.md.

    python benchmarks/papers.py --list
    python benchmarks/papers.py --part leak --seeds 1
    python benchmarks/papers.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from page import PARTS, page, table
from transformers import LlamaConfig, LlamaForCausalLM
from ways import SCRATCH, Cell, cells

from longspan.evaluate.evaluation import Protocol, evaluate
from longspan.extend import extension, settings, training, windows
from longspan.extend.recipe import Recipe
from longspan.extend.stretch import BUDGET, SEARCHED, WINDOWS, stretched
from longspan.extend.training import train
from longspan.extend.windows import TrainingWindows
from longspan.hf.attention import attention_modules, reset, set_pattern
from longspan.hf.causality import check_causality
from longspan.hf.model import load_model
from longspan.hf.precision import bfloat16_is_fast
from longspan.pattern import S2, parse
from longspan.text.corpus import Corpus
from longspan.text.documents import documents, split
from longspan.text.encoding import encode

ROOT = Path(__file__).parents[1]
# Positions of the test for leaks, and the groups in it.
_PROBED, _GROUP = 32, 8


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:<10} {len(cells(options, name, 0)):>2} ways  {part.title}")
        return
    report = _read(options)
    wanted = [
        cell for seed in range(options.seeds) for name in options.part for cell in cells(options, name, seed)
    ]
    base = report["base"]
    left = {cell.key(base): cell for cell in wanted if cell.key(base) not in report["cells"]}
    if left:
        _run(left, report, options)
    report["parts"] |= {
        name: [
            {"name": cell.name, "cells": [each.key(base) for each in _same(options, name, cell)]}
            for cell in cells(options, name, 0)
        ]
        for name in options.part
    }
    _write(report, options.json)
    for name in options.part:
        print(table(report, name))
    options.page.write_text(page(report), encoding="utf-8")
    print(f"figures in {options.json}, page in {options.page}")


def _same(options: argparse.Namespace, part: str, cell: Cell) -> list[Cell]:
    """Return a cell with every seed."""
    return [
        each for seed in range(options.seeds) for each in cells(options, part, seed) if each.name == cell.name
    ]


def _run(left: dict[str, Cell], report: dict[str, Any], options: argparse.Namespace) -> None:
    """Carry out the cells that are left, each written at once."""
    guessed = _guess(left.values(), options)
    total = sum(guessed.values())
    print(f"{len(left)} cells to run, about {total / 60:,.0f} minutes on this machine", flush=True)
    begun, past = time.perf_counter(), 0.0
    for number, (key, cell) in enumerate(left.items(), 1):
        started = time.perf_counter()
        found = _carried_out(cell, report, options)
        report["cells"][key] = {
            "kind": cell.kind,
            "recipe": asdict(cell.recipe),
            "seconds": round(time.perf_counter() - started, 1),
            **found,
        }
        _write(report, options.json)
        past += guessed[cell]
        left_minutes = (time.perf_counter() - begun) / past * (total - past) / 60
        print(
            f"{number} of {len(left)}: {cell.name}, seed {cell.recipe.seed}, "
            f"{report['cells'][key]['seconds']:.0f} s; about {left_minutes:,.0f} minutes left",
            flush=True,
        )


def _guess(cells: Any, options: argparse.Namespace) -> dict[Cell, float]:
    """Guess the seconds of each cell, from one window of each kind read with and without a way back."""
    model, tokenizer = load_model(options.model)
    models = {True: _untrained(len(tokenizer)), False: model}
    speeds: dict[tuple[bool, int], tuple[float, float]] = {}

    def speed(small: bool, window: int) -> tuple[float, float]:
        if (small, window) not in speeds:
            speeds[small, window] = _speed(models[small], window)
        return speeds[small, window]

    guessed = {}
    for cell in cells:
        recipe, small = cell.recipe, cell.kind == "scratch"
        reading, _ = speed(small, recipe.length)
        ways = (recipe.pattern != "Causal()") + (not small)
        # Every length is half of the next; six prompts are asked beside.
        seconds = 2 * recipe.length * (ways * options.segments + 6 * (not small)) * reading
        if cell.kind != "alone":
            seconds += recipe.tokens(recipe.steps) * speed(small, recipe.window)[1]
            if recipe.rope == SEARCHED:
                seconds += BUDGET.evaluations * WINDOWS * recipe.length * reading
        guessed[cell] = seconds
    return guessed


def _speed(model: Any, window: int) -> tuple[float, float]:
    """Return the seconds per token of reading a window, and of learning from it."""
    ids = torch.zeros(1, window, dtype=torch.long)
    lower = bfloat16_is_fast(on_cpu=True)
    # The first pass brings in what libraries load late.
    model(ids[:, :64], labels=ids[:, :64], use_cache=False).loss.backward()
    begun = time.perf_counter()
    with torch.no_grad():
        model(ids, logits_to_keep=1, use_cache=False)
    read = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=lower):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return (read - begun) / window, (time.perf_counter() - read) / window


def _carried_out(cell: Cell, report: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one cell."""
    recipe = cell.recipe
    if cell.kind == "alone":
        if recipe.rope == SEARCHED:
            # The factors that the trained cell of the same seed was given.
            recipe = replace(recipe, rope=report["cells"][Cell("", recipe).key(report["base"])]["rope"])
        model, tokenizer = load_model(recipe.model, config=stretched(recipe))
        return _measured(model, tokenizer, recipe, options)
    losses: list[float] = []
    clock: list[float] = []

    def progress(*told: Any, **loss: float) -> None:
        if loss:
            losses.extend(loss.values())
            clock.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        if cell.kind == "scratch":
            model, tokenizer = _trained(recipe, folder, progress)
        elif recipe.repeats:
            model, tokenizer = _closed(cell, folder, progress)
        else:
            extension.extend(recipe, folder, progress=lambda name, done: progress)
            recipe = settings.load(folder)
            model, tokenizer = load_model(folder)
    steps = [after - before for before, after in pairwise(clock)]
    found = {
        "rope": recipe.rope,
        "losses": losses,
        "step_seconds": statistics.median(steps) if steps else None,
    }
    if recipe.repeats:
        return found | {"leaks": _leaks(model, cell.kind)}
    return found | _measured(model, tokenizer, recipe, options, dense=cell.kind != "scratch")


def _untrained(vocabulary: int) -> LlamaForCausalLM:
    """Return the small model with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=SCRATCH["width"],
            intermediate_size=4 * SCRATCH["width"],
            num_hidden_layers=SCRATCH["layers"],
            num_attention_heads=SCRATCH["heads"],
            max_position_embeddings=SCRATCH["length"],
            tie_word_embeddings=True,
        )
    )


def _trained(recipe: Recipe, folder: Path, progress: Any) -> tuple[Any, Any]:
    """Return a small model trained from random weights, by the training that extends models."""
    _, tokenizer = load_model(recipe.model)
    torch.manual_seed(recipe.seed)
    return _taught(_untrained(len(tokenizer)), tokenizer, recipe, folder, progress), tokenizer


def _closed(cell: Cell, folder: Path, progress: Any) -> tuple[Any, Any]:
    """Return the model trained on windows that end as they begin, its pattern made causal or leaking."""
    model, tokenizer = load_model(cell.recipe.model)
    with ExitStack() as changed:
        changed.enter_context(mock.patch.object(windows, "repeated_segments", _closing))
        if cell.kind == "leaking":
            changed.enter_context(mock.patch.object(training, "set_pattern", _set_leaking))
        return _taught(model, tokenizer, cell.recipe, folder, progress), tokenizer


def _taught(model: Any, tokenizer: Any, recipe: Recipe, folder: Path, progress: Any) -> Any:
    corpus = encode(split(documents(recipe.text))[0], tokenizer)
    heads = model.config.num_attention_heads
    given = TrainingWindows(corpus, tokenizer, recipe, heads=heads)
    train(model, given, recipe, folder=folder, progress=progress)
    return model.eval()


def _measured(
    model: Any, tokenizer: Any, recipe: Recipe, options: argparse.Namespace, *, dense: bool = True
) -> dict[str, Any]:
    """Measure a model with dense attention and by the pattern that it was trained with."""
    lengths = tuple(
        recipe.length >> halvings
        for halvings in (3, 2, 1, 0)
        if recipe.length >> halvings >= options.shortest
    )
    told = {"lengths": lengths, "stride": options.shortest // 2, "segments": options.segments}
    prompts = {"depths": (0.0, 0.5, 1.0), "trials": 2}
    text, found = _held(recipe.text, tokenizer), {}
    reset(model)
    if dense:
        whole = evaluate(model, tokenizer, text, label="", protocol=Protocol(**told, **prompts))
        found["dense"] = dict(zip(map(str, lengths), whole.perplexity.values, strict=True))
        found["passkeys"] = dict(zip(map(str, lengths), whole.passkey.by_length, strict=True))
    if recipe.pattern != "Causal()":
        patterns = [parse(text) for text in recipe.patterns(recipe.window)]
        set_pattern(model, patterns if len(patterns) > 1 else patterns[0])
        alone = evaluate(
            model, tokenizer, text, label="", protocol=Protocol(**told, measures=("perplexity",))
        ).perplexity
        found["sparse"] = dict(zip(map(str, lengths), alone.values, strict=True))
        found["bits"] = dict(zip(map(str, lengths), alone.bits_per_byte, strict=True))
    return found


def _leaks(model: Any, kind: str) -> int:
    """Count the pairs in which a model reads the future, on a few positions."""
    if kind == "leaking":
        _set_leaking(model, S2(_GROUP, wrap="roll", length=_PROBED))
    else:
        set_pattern(model, S2(_GROUP))
    found = check_causality(model, length=_PROBED)
    return sum(len(leak.pairs) for leak in found.leaks if leak.part == "logits")


def _set_leaking(model: Any, pattern: Any) -> None:
    """Set one pattern on all layers as it is: `set_pattern` would make it causal."""
    set_pattern(model, pattern)
    for module in attention_modules(model):
        module.longspan = replace(module.longspan, pattern=pattern)


def _closing(filler: Corpus, *, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return text that ends as it began, for as long as half a group of a quarter: only a reader of the future can
    tell from the end what the beginning will be."""
    text = filler.window(rng, length - length // 8)
    return np.concatenate([text, text[: length // 8]]).astype(np.int64)


@cache
def _held(source: str | None, tokenizer: Any) -> Corpus:
    return encode(split(documents(source))[1], tokenizer)


def _read(options: argparse.Namespace) -> dict[str, Any]:
    """Return the report of earlier runs, without what was measured of other weights."""
    model, _ = load_model(options.model)
    digest = hashlib.sha256()
    for weights in model.parameters():
        digest.update(weights.detach().numpy().tobytes())
    base = digest.hexdigest()[:12]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    fresh = {
        "base": base,
        "machine": machine,
        "torch": torch.__version__,
        "steps": options.steps,
        "length": options.length,
        "segments": options.segments,
        "parts": {},
        "cells": {},
    }
    if not options.json.exists():
        return fresh
    held = json.loads(options.json.read_text())
    same = all(held[name] == fresh[name] for name in ("base", "steps", "length", "segments"))
    if not same:
        sys.exit(
            f"{options.json} holds figures of another model, length or number of steps; move it away, or name "
            "another file with --json"
        )
    return held


def _write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".writing")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    unfinished.replace(path)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the parts and leave")
    parser.add_argument(
        "--part", action="append", choices=tuple(PARTS), help="one part; several times for more"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each cell (default: 3)")
    parser.add_argument("--model", metavar="FOLDER", help="what is extended (default: the default model)")
    parser.add_argument("--text", metavar="FILE", help="what is read (default: the standard library)")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="the longest (default: 4096)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of each training (default: 50)")
    parser.add_argument("--segments", type=int, default=8, metavar="N", help="windows measured (default: 8)")
    parser.add_argument(
        "--shortest", type=int, default=512, metavar="N", help="length measured (default: 512)"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "papers.json", metavar="FILE")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "papers.md", metavar="FILE")
    options = parser.parse_args(arguments)
    options.part = options.part or list(PARTS)
    return options


if __name__ == "__main__":
    main()
