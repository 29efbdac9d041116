"""The ways that `papers.py` compares: every cell of every part."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass, replace

from longspan.extend.recipe import Recipe
from longspan.extend.stretch import SEARCHED
from longspan.hf.model import load_config

PATTERNS = {
    "dense": "Causal()",
    "S2": "S2({1/4})",
    "SCCA fixed": "SCCA({1/4})",
    "SCCA flow": "SCCA({1/4}, flow=4)",
    "SDA": "SDA(4)",
    "LongMixed": "LongMixed({1/4})",
    "LongNet": "LongNet(({1/4}, {1/2}, {1/1}), (1, 2, 4))",
    "window": "SlidingWindow({1/4})",
}
POSITIONS = ("Plain()", "linear", "ntk", "DynamicNTK({context})", "yarn", SEARCHED)
# The small model of Longformer's windows, and the length that it is trained at.
SCRATCH = {"width": 128, "layers": 6, "heads": 8, "length": 1024}


@dataclass(frozen=True)
class Cell:
    """One way with one seed.

    Attributes:
        name: of the way.
        recipe: by which it is trained.
        kind: "extended"; "alone", positions stretched and nothing trained; "scratch", a small model trained from random
            weights; "closing", the model itself trained on windows that end as they begin; "leaking", the same by a
            pattern that is not made causal.
    """

    name: str
    recipe: Recipe
    kind: str = "extended"

    def key(self, base: str) -> str:
        """Return what tells this work from other work: the same in all parts that ask for it."""
        told = json.dumps([base, self.kind, asdict(self.recipe), SCRATCH if self.kind == "scratch" else 0])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def cells(options: argparse.Namespace, part: str, seed: int) -> list[Cell]:
    """Return the cells of a part with one seed."""
    length, context = options.length, load_config(options.model).max_position_embeddings
    plain = Recipe(
        model=options.model,
        text=options.text,
        length=length,
        margin=1.0,
        pattern="Causal()",
        stages=1,
        positions="counted",
        batch=1,
        repeats=0.0,
        passkeys=0.0,
        steps=options.steps,
        seed=seed,
    )
    shorter = replace(plain, length=length // 2, window=None)
    if part == "patterns":
        return [
            Cell(f"{name}, {recipe.length // context}x", replace(recipe, pattern=pattern))
            for recipe in (shorter, plain)
            for name, pattern in PATTERNS.items()
        ]
    if part == "positions":
        ways = {text.partition("(")[0]: text.format(context=context) for text in POSITIONS}
        trained = [Cell(name, replace(plain, rope=rope)) for name, rope in ways.items()]
        return trained + [replace(cell, name=f"{cell.name}, untrained", kind="alone") for cell in trained]
    if part == "windows":
        return [
            Cell(name, _scratch(options, seed, "; ".join(texts)), "scratch")
            for name, texts in _windows().items()
        ]
    if part == "adapters":
        return [
            Cell("LoRA", replace(plain, method="lora")),
            Cell("LoRA+", plain),
            Cell("full", replace(plain, method="full", rate=None)),
            Cell("full, rate 3e-4", replace(plain, method="full", rate=3e-4)),
        ]
    if part == "skipping":
        skips = replace(plain, window=context, positions="skipping", batch=length // context)
        return [Cell("full length", plain), Cell("PoSE", skips)]
    # Windows end as they begin, which a leak can give away: what is trained on them must be able to learn it.
    closing = replace(
        plain,
        length=context // 2,
        window=None,
        margin=None,
        method="full",
        rate=1e-3,
        batch=8,
        repeats=1.0,
        steps=2 * options.steps,
    )
    rolled = "S2({1/4}, wrap='roll', length={1/1})"
    return [
        Cell("S2", replace(closing, pattern=PATTERNS["S2"]), "closing"),
        Cell("wrapped", replace(closing, pattern=rolled), "leaking"),
    ]


def _windows() -> dict[str, list[str]]:
    """Return Longformer's ways to share out windows among layers, the same number of keys in each."""
    layers, length = SCRATCH["layers"], SCRATCH["length"]
    sizes = [length // 2 >> (layers - 1 - layer) for layer in range(layers)]
    mean = sum(sizes) // layers
    # A quarter of the heads, in the upper half of the layers.
    dilated = "Longformer({0}, dilation=(1, 1, 1, 2), global_tokens=0)"
    return {
        "increasing": [f"SlidingWindow({size})" for size in sizes],
        "fixed": [f"SlidingWindow({mean})"] * layers,
        "decreasing": [f"SlidingWindow({size})" for size in reversed(sizes)],
        "dilated": [
            f"SlidingWindow({size})" if layer < layers // 2 else dilated.format(size)
            for layer, size in enumerate(sizes)
        ],
    }


def _scratch(options: argparse.Namespace, seed: int, pattern: str) -> Recipe:
    shape = {
        "length": SCRATCH["length"],
        "pattern": pattern,
        "method": "full",
        "stages": 1,
        "repeats": 0.0,
        "passkeys": 0.0,
        "rate": 3e-3,
    }
    return Recipe(
        model=options.model, text=options.text, steps=2 * options.steps, batch=4, seed=seed, **shape
    )
