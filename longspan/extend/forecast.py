"""The forecast: what an extension will take in memory, time and traffic, and which way to go, from a config alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from longspan.derive.cost import cost
from longspan.derive.lifetime import live
from longspan.errors import InputError, message
from longspan.extend.memory import Memory, training_memory
from longspan.extend.recipe import METHODS, NEAR, Recipe
from longspan.hf.config import GO_ON, extended
from longspan.hf.layers import layer_patterns, windows
from longspan.hf.rope import parameters_of
from longspan.layout import zigzag
from longspan.pattern import Causal, Pattern, parse
from longspan.ring.plan import plan as shared_out
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
    are flops over sustained speed, so they are as good as that figure. Each layer reads through the window that the
    model itself has on it, in training inside the pattern.
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

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that the model itself has on its attention layers."""
        return windows(self.config)

    @cached_property
    def own(self) -> tuple[Pattern, ...]:
        """What each attention layer of the result reads."""
        return layer_patterns([Causal()], self.windows)

    def trained(self, window: int) -> tuple[Pattern, ...]:
        """Return what each attention layer reads in a training window of so many tokens."""
        return layer_patterns([parse(text) for text in self.recipe.patterns(window)], self.windows)

    def pairs(self, window: int) -> int:
        """Return the pairs of query and key that all heads of all layers read in a training window."""
        return self._pairs(self.trained(window), window)

    def _pairs(self, layers: tuple[Pattern, ...], length: int) -> int:
        heads = self._text.num_attention_heads
        return sum(
            often * cost(layer, length=length, heads=heads).pairs for layer, often in Counter(layers).items()
        )

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
    def sharing(self) -> int:
        """Devices that share a window: those asked for, or all where each was to read windows of its own."""
        ranks = self.recipe.sequence_ranks
        return ranks if ranks > 1 else self.machine.devices

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that a device sends in a step: gradients of a shared model, and keys of shared windows.

        The second is what `longspan.ring` moves of keys, values and their gradients, on the device that sends the most
        of them in a layer.
        """
        devices, recipe = self.machine.devices, self.recipe
        gradients = 2 * self.memory.gradients * (devices - 1) // devices
        if recipe.window < 2 * self.sharing:
            return gradients, 0
        # Layers that are computed again are sent their keys again.
        forwards = 2 if recipe.activations == "recomputed" else 1
        keys = 0
        for layer, often in Counter(self.trained(recipe.window)).items():
            sharing = shared_out(
                layer,
                zigzag(recipe.window, self.sharing),
                heads=self._text.num_attention_heads,
                key_heads=self._key_heads,
                width=self._width,
                dtype=str(self.machine.dtype).removeprefix("torch."),
            )
            keys += often * int((forwards * sharing.sent + sharing.gradients.sum(axis=0)).max())
        return gradients, recipe.batch * recipe.accumulate * keys

    @property
    def cache(self) -> int:
        """Bytes of the keys and values of one text of full length that the result still reads, in bfloat16."""
        length = self.recipe.length
        held = sum(
            often * sum(map(len, live(layer, at=length))) for layer, often in Counter(self.own).items()
        )
        return held * 2 * self._key_heads * self._width * torch.bfloat16.itemsize

    @property
    def prefill(self) -> float:
        """Floating-point operations of the result to read one text of full length."""
        length = self.recipe.length
        return 2 * self.memory.parameters * length + 4 * self._width * self._pairs(self.own, length)

    def lines(self, *, process: int | None = None) -> list[str]:
        """Say in a few lines what training takes.

        Args:
            process: bytes that the process takes beside the model, where both lie in the same memory.
        """
        memory, recipe = self.memory, self.recipe
        lines = [
            f"training {memory.trained:,} of {memory.parameters:,} parameters, activations {recipe.activations}",
            f"memory {size(memory.total)}: model {size(memory.weights)}, optimizer and gradients "
            f"{size(memory.moments + memory.gradients)}, activations {size(memory.activations)}, workspace "
            f"{size(memory.workspace)}; {size(self.machine.memory)} are there",
        ]
        hidden = _hidden(self.config, recipe.length)
        if hidden:
            lines.append(f"windows: {hidden}")
        if process is None:
            lines.append(
                "not counted: what libraries and kernels hold on the device, and freed memory in pieces"
            )
        else:
            lines.append(
                f"with {size(process)} of libraries and text in this process {size(process + memory.total)}; not "
                "counted: what libraries keep for each new shape, and freed memory that the allocator holds"
            )
        return lines

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
    def _key_heads(self) -> int:
        return getattr(self._text, "num_key_value_heads", None) or self._text.num_attention_heads


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
    hidden = _hidden(config, recipe.length)
    if hidden:
        rows.append(("windows", hidden))
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


def _hidden(config: PretrainedConfig, length: int) -> str:
    """Say how much of a text windows of the model's own hide from its last token, through all layers; "" is nothing."""
    own = windows(config)
    # As far back as all windows together, each of which includes the token that looks.
    seen = length if None in own else 1 + sum(window - 1 for window in own)
    if seen >= length:
        return ""
    return (
        f"the model's own, of {max(own):,} tokens, show a token {seen:,} of {length:,} through all {len(own)} layers, "
        f"however it is trained; what lies before cannot be found"
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
