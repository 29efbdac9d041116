"""Advice: which way to go to a length, each choice with its reason, from a configuration alone."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from longspan.errors import InputError
from longspan.extend.forecast import Forecast, Machine, hidden
from longspan.extend.recipe import METHODS, NEAR, Recipe
from longspan.hf.config import GO_ON, extended
from longspan.hf.layers import windows
from longspan.hf.rope import parameters_of
from longspan.size import size

# Below this, a kernel that reads all keys is as fast as any pattern worth training with.
_DENSE = 8192
_MILLION = 1 << 20


def by_method(config: PretrainedConfig, recipe: Recipe, machine: Machine) -> list[Forecast]:
    """Return the forecast of each method, activations kept and recomputed."""
    return [
        Forecast(config, replace(recipe, method=method, activations=activations, rate=None), machine)
        for method in METHODS
        for activations in ("kept", "recomputed")
    ]


def advice(config: PretrainedConfig, recipe: Recipe, machine: Machine) -> list[tuple[str, str]]:
    """Return what to choose, each with its reason: positions, pattern, method, ranks, and other architectures."""
    rows = [("positions", _positions(config, recipe.length)), ("pattern", _pattern(config, recipe))]
    unseen = hidden(config, recipe.length)
    if unseen:
        rows.append(("windows", unseen))
    choices = by_method(config, recipe, machine)
    choices = [each for name in ("lora+", "lora", "qlora") for each in choices if each.recipe.method == name]
    alone = next((each for each in choices if each.fits), None)
    if alone is not None:
        reading = "each device reads windows of its own"
        if recipe.sequence_ranks != 1:
            reading = f"{alone.sharing} devices read each window together"
        rows.append(
            (
                "method",
                f"{alone.recipe.method}, activations {alone.recipe.activations}: {size(alone.memory.total)} of "
                f"{size(machine.memory)}; {reading}",
            )
        )
    else:
        rows.append(("method", _sharing(choices, machine)))
    if recipe.length >= _MILLION:
        rows.append(
            (
                "instead",
                "from a million tokens on, look at models whose state does not grow: Mamba-2 and its hybrids "
                "(Jamba, Nemotron-H), gated delta nets (Qwen3-Next, Kimi Linear), RWKV-7; or at retrieval",
            )
        )
    return rows


def _pattern(config: PretrainedConfig, recipe: Recipe) -> str:
    """Say what to read by while training."""
    if recipe.window <= _DENSE:
        return f'"Causal()": in windows of up to {_DENSE:,} tokens dense attention is cheap'
    own = windows(config)
    if all(window is not None and window <= _DENSE for window in own):
        return f'"Causal()": every layer reads through a window of its own, of {max(own):,} tokens at most'
    return (
        f'"{NEAR["pattern"]}": windows of more than {_DENSE:,} tokens; the result reads as far as the model itself '
        f"does all the same"
    )


def _sharing(choices: list[Forecast], machine: Machine) -> str:
    """Say how windows that no device holds whole can be read all the same."""
    held = [each for each in choices if each.ranks is not None]
    if not held:
        least = min(choices, key=lambda each: each.lasting)
        return (
            f"none: weights, gradients and optimizer of {least.recipe.method} alone take {size(least.lasting)}, "
            f"and a device has {size(machine.memory)}"
        )
    best = min(held, key=lambda each: each.ranks)
    if best.ranks > machine.devices:
        return f"{best.smaller()}: devices that hold a whole window together would be {best.ranks}"
    return (
        f"{best.recipe.method}, activations {best.recipe.activations}, each window shared by {best.ranks} devices "
        f"(--sequence-ranks {best.ranks} --window {best.recipe.window}); or a window that skips (--window)"
    )


def _positions(config: PretrainedConfig, length: int) -> str:
    """Say how positions are best stretched, among the methods that this model takes."""
    reads = config.max_position_embeddings
    if length <= reads:
        return "as they are: the model reads that far already"
    try:
        now = parameters_of(config)
    except InputError as error:
        return f"none: {str(error).splitlines()[0]}"
    before = now.get("rope_type", "default")
    trained = now.get("original_max_position_embeddings") or reads
    if before in GO_ON and _takes(config, before, length):
        return f"{before}, which it was stretched by before: {length / trained:g} times the {trained:,} tokens it was trained on"
    factor = length / reads
    if factor <= 2 and _takes(config, "ntk", length):
        return f"ntk: {factor:g} times further needs little or no training"
    if not _takes(config, "yarn", length):
        return f'frequencies that are told, such as --rope "Linear({length / trained:g})", or searched, --rope longrope: no other method is for this model'
    if factor <= 32:
        return f"yarn: {factor:g} times further, within what it was published for"
    return f"yarn in several runs, or searched factors (LongRoPE): {factor:g} times further is more than 32"


def _takes(config: PretrainedConfig, method: str, length: int) -> bool:
    try:
        extended(config, method=method, length=length)
    except InputError:
        return False
    return True
