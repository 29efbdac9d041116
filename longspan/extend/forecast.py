"""The forecast: what an extension will take in memory, time and traffic, from a config alone."""

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
from longspan.extend.recipe import Recipe
from longspan.hf.layers import layer_patterns, windows
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
        shared = self.recipe.sharing(self.machine.devices)
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
        texts = max(1, devices // recipe.sharing(devices))
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

        The second is of keys, values and their gradients.
        """
        devices, recipe = self.machine.devices, self.recipe
        gradients = 2 * self.memory.gradients * (devices - 1) // devices
        # Layers that are computed again are sent their keys again.
        forwards = 2 if recipe.activations == "recomputed" else 1
        keys = self._sent(self.trained(recipe.window), recipe.window, forwards, backwards=1)
        return gradients, recipe.batch * recipe.accumulate * keys

    @property
    def passing(self) -> int:
        """Bytes of keys and values that a device sends while the result reads one text of full length on all of them."""
        return self._sent(self.own, self.recipe.length, forwards=1, backwards=0)

    def _sent(self, layers: tuple[Pattern, ...], length: int, forwards: int, backwards: int) -> int:
        """Return what `longspan.ring` moves on the device that sends the most in a layer, all layers together."""
        if length < 2 * self.sharing:
            return 0
        total = 0
        for layer, often in Counter(layers).items():
            shares = shared_out(
                layer,
                zigzag(length, self.sharing),
                heads=self._text.num_attention_heads,
                key_heads=self._key_heads,
                width=self._width,
                dtype=str(self.machine.dtype).removeprefix("torch."),
            )
            total += often * int((forwards * shares.sent + backwards * shares.gradients.sum(axis=0)).max())
        return total

    @property
    def cache(self) -> int:
        """Bytes of the keys and values of one text of full length that the result still reads, in bfloat16."""
        length = self.recipe.length
        held = sum(
            often * sum(map(len, live(layer, at=length))) for layer, often in Counter(self.own).items()
        )
        return held * 2 * self._key_heads * self._width * torch.bfloat16.itemsize

    @property
    def fetched(self) -> int:
        """Bytes that writing one more token at full length fetches from memory: all weights and the cache, in bfloat16."""
        return self.memory.parameters * torch.bfloat16.itemsize + self.cache

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
        unseen = hidden(self.config, recipe.length)
        if unseen:
            lines.append(f"windows: {unseen}")
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


def hidden(config: PretrainedConfig, length: int) -> str:
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
