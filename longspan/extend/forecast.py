"""The forecast: what an extension will take in memory, time and traffic, and which way to go, from a config alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from longspan.derive.cost import cost
from longspan.errors import InputError, message
from longspan.extend.memory import Memory, training_memory
from longspan.extend.recipe import METHODS, NEAR, Recipe
from longspan.hf.config import GO_ON, extended
from longspan.hf.rope import parameters_of
from longspan.pattern import parse
from longspan.size import size

# What is tried when a recipe does not fit, in the order of how little it changes.
_SMALLER = (
    {"batch": 1},
    {"activations": "recomputed"},
    {"activations": "recomputed", "method": "lora+"},
    {"activations": "recomputed", "method": "lora"},
    {"activations": "recomputed", "method": "qlora"},
)
# Below this, a kernel that reads all keys is as fast as any pattern worth training with.
_DENSE = 8192
_MILLION = 1 << 20


@dataclass(frozen=True)
class Machine:
    """What there is to train on.

    Attributes:
        devices: how many.
        memory: bytes of each.
        speed: floating-point operations per second that each sustains.
        dtype: in which it multiplies.
    """

    devices: int
    memory: float
    speed: float
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Forecast:
    """What carrying out a recipe takes on a machine.

    Memory is for the window held on one device. Flops count matrix products, a multiply-add being two. Seconds
    are flops over sustained speed, so they are as good as that figure.
    """

    config: PretrainedConfig
    recipe: Recipe
    machine: Machine

    @cached_property
    def memory(self) -> Memory:
        """Bytes of training on one device, with the whole window on it."""
        return training_memory(self.config, self.recipe, dtype=self.machine.dtype)

    @property
    def fits(self) -> bool:
        """Whether one device holds the whole window, or its part of it where a window is shared."""
        shared = self.recipe.sequence_ranks or self.machine.devices
        if shared == 1:
            return self.memory.total <= self.machine.memory
        return self.ranks is not None and self.ranks <= shared

    @property
    def lasting(self) -> int:
        """Bytes that are there all the time on each device, whatever the window."""
        return self.memory.weights + self.memory.moments + self.memory.gradients

    @property
    def ranks(self) -> int | None:
        """Devices that a window must be shared by, a power of two; None where no number is enough.

        Weights and optimizer stay whole on each, activations and workspace are divided.
        """
        room = self.machine.memory - self.lasting
        if room <= 0:
            return None
        ranks = 1
        while (self.memory.activations + self.memory.workspace) / ranks > room:
            ranks *= 2
        return ranks

    def pairs(self, window: int) -> int:
        """Return the pairs of query and key that all heads of all layers read in a window of so many tokens."""
        layers, heads = self._text.num_hidden_layers, self._text.num_attention_heads
        counts = [
            cost(parse(f"({text}) & Causal()"), length=window, heads=heads).pairs
            for text in self.recipe.patterns(window)
        ]
        return counts[0] * layers if len(counts) == 1 else sum(counts)

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of the whole training on all devices."""
        recipe, devices = self.recipe, self.machine.devices
        # Devices that share a window read one text together.
        texts = max(1, devices // (recipe.sequence_ranks or devices))
        # Forward, gradients of the input, gradients of the weights where these are trained.
        passes = 3 if recipe.method == "full" else 2
        again = 1 if recipe.activations == "recomputed" else 0
        products = 2 * self.memory.parameters * recipe.tokens(recipe.steps) * (passes + again)
        steps = Counter(recipe.stage(step) for step in range(recipe.steps))
        pairs = sum(count * self.pairs(recipe.windows[stage]) for stage, count in steps.items())
        attention = recipe.batch * recipe.accumulate * 4 * self._width * pairs * (3.5 + again)
        return texts * (products + attention)

    @property
    def seconds(self) -> float:
        """Seconds of the whole training."""
        return self.flops / (self.machine.devices * self.machine.speed)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that each device sends in a step: gradients of a shared model, and keys of a shared window.

        The second is a ring's: keys and values go round on the way there, and with their gradients on the way back.
        """
        devices = self.machine.devices
        gradients = 2 * self.memory.gradients * (devices - 1) // devices
        share = self.recipe.window * (devices - 1) // devices
        return gradients, 3 * share * self._kv * self.machine.dtype.itemsize * self.recipe.batch

    @property
    def cache(self) -> int:
        """Bytes of keys and values of one text of full length, in bfloat16, read densely."""
        return self.recipe.length * self._kv * 2

    @property
    def prefill(self) -> float:
        """Floating-point operations to read one text of full length densely."""
        heads, length = self._text.num_attention_heads, self.recipe.length
        dense = self._text.num_hidden_layers * heads * length * (length + 1) // 2
        return 2 * self.memory.parameters * length + 4 * self._width * dense

    def lines(self) -> list[str]:
        """Say in a few lines what training takes."""
        memory, recipe = self.memory, self.recipe
        return [
            f"training {memory.trained:,} of {memory.parameters:,} parameters, activations {recipe.activations}",
            f"memory {size(memory.total)}: model {size(memory.weights)}, optimizer and gradients "
            f"{size(memory.moments + memory.gradients)}, activations {size(memory.activations)}, workspace "
            f"{size(memory.workspace)}; {size(self.machine.memory)} are there",
        ]

    def require(self) -> None:
        """Refuse a recipe that does not fit, and name what would.

        Raises:
            InputError: it takes more memory than there is.
        """
        if self.fits:
            return
        raise InputError(
            message(
                "This recipe does not fit into memory.",
                {"needs": self.lines()[1].partition(";")[0], "there is": size(self.machine.memory)},
                fix=self.smaller(),
            )
        )

    def smaller(self) -> str:
        """Return options that fit, or what else would."""
        for change in _SMALLER:
            other = replace(self, recipe=replace(self.recipe, **change))
            if other.fits:
                return " ".join(f"--{name} {value}" for name, value in change.items())
        window = self.recipe.window
        smallest = {
            "batch": 1,
            "activations": "recomputed",
            "method": "lora",
            "documents": "joined",
            "stages": 1,
        }
        while window > 256:
            window //= 2
            other = replace(self, recipe=replace(self.recipe, **smallest, window=window))
            if other.ranks is None:
                # The weights alone are too much, whatever the window.
                break
            if other.fits:
                return (
                    f"--batch 1 --activations recomputed --method lora --window {window}, positions then skip"
                )
        return "a smaller model, or a machine with more memory"

    @property
    def _text(self) -> PretrainedConfig:
        return self.config.get_text_config()

    @property
    def _width(self) -> int:
        text = self._text
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def _kv(self) -> int:
        """Numbers in the keys and values of one token, all layers together."""
        text = self._text
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * self._width


def by_method(config: PretrainedConfig, recipe: Recipe, machine: Machine) -> list[Forecast]:
    """Return the forecast of each method, activations kept and recomputed."""
    return [
        Forecast(config, replace(recipe, method=method, activations=activations, rate=None), machine)
        for method in METHODS
        for activations in ("kept", "recomputed")
    ]


def advice(config: PretrainedConfig, recipe: Recipe, machine: Machine) -> list[tuple[str, str]]:
    """Return what to choose, each with its reason: positions, pattern, method, ranks, and other architectures."""
    rows = [("positions", _positions(config, recipe.length))]
    if recipe.window <= _DENSE:
        rows.append(
            ("pattern", f'"Causal()": in windows of up to {_DENSE:,} tokens dense attention is cheap')
        )
    else:
        rows.append(
            (
                "pattern",
                f'"{NEAR["pattern"]}": windows of more than {_DENSE:,} tokens; the result reads densely all the same',
            )
        )
    choices = by_method(config, recipe, machine)
    choices = [each for name in ("lora+", "lora", "qlora") for each in choices if each.recipe.method == name]
    alone = next((each for each in choices if each.fits), None)
    if alone is not None:
        rows.append(
            (
                "method",
                f"{alone.recipe.method}, activations {alone.recipe.activations}: {size(alone.memory.total)} of "
                f"{size(machine.memory)}; each device reads windows of its own",
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
