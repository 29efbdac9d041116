"""Causality: does any position of a model read a later one, and in which layer?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError, message

# How many pairs of a leak are printed.
_SHOWN = 4


@dataclass(frozen=True)
class Leak:
    """A part of a model that lets positions read later ones.

    Attributes:
        part: the name of the layer's module, or "logits" for the model from its embeddings to its logits.
        pairs: every offending pair (position that reads, later position that is read), in order.
    """

    part: str
    pairs: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        shown = ", ".join(f"{reader} reads {read}" for reader, read in self.pairs[:_SHOWN])
        return f"{shown}, ... ({len(self.pairs)} pairs)" if len(self.pairs) > _SHOWN else shown


@dataclass(frozen=True)
class Causality:
    """What `check_causality` found: true where nothing leaks, and readable in print.

    Attributes:
        length: positions tested.
        mode: "train" or "eval", the mode that the model was in.
        layers: names of the layers tested, in order.
        leaks: the layers that leak, in order, and last the logits, if they do.
    """

    length: int
    mode: str
    layers: tuple[str, ...]
    leaks: tuple[Leak, ...]

    def __bool__(self) -> bool:
        return not self.leaks

    def __str__(self) -> str:
        tested = f"{self.length} positions, {len(self.layers)} layers, {self.mode} mode"
        if not self.leaks:
            return f"Causal: no position reads a later one ({tested})."
        parts = [leak.part for leak in self.leaks]
        leaking = [part for part in parts if part in self.layers]
        lines = [f"Not causal: {len(leaking)} of {len(self.layers)} layers read later positions ({tested})."]
        width = max(len(part) for part in parts)
        lines += [f"  {leak.part:<{width}}  {leak}" for leak in self.leaks]
        if not leaking:
            lines.append("  The layers are causal by themselves: the leak is before, between or after them.")
        return "\n".join(lines)


def check_causality(model: nn.Module, *, length: int = 64, seed: int = 0) -> Causality:
    """Test a causal language model for leaks of the future, by gradients.

    The law: the logits at position i have a gradient of exactly zero with respect to the embedding of every
    later position. The same is asked of each layer by itself, between the hidden states it gets and those
    it returns, which tells where a leak sits.

    The model is tested in the mode it is in: some implementations leak in training only, so test those with
    `model.train()`. Nothing of it is changed: no gradients, no mode, no random numbers are used up. A leak
    over more than `length` positions is not seen, and neither is one through a choice that has no gradient,
    such as a router that ranks all tokens of a text.

    Args:
        model: any Hugging Face causal language model, with whatever attention it has set.
        length: positions to test, at least 2; the cost is `length` backward passes.
        seed: of the random tokens that are fed.

    Returns:
        A `Causality`: true if nothing leaks, and with every offending pair if something does.

    Raises:
        InputError: the length is less than 2 or more than the model reads, or its output is not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        >>> print(check_causality(LlamaForCausalLM(config).eval(), length=16))
        Causal: no position reads a later one (16 positions, 2 layers, eval mode).
    """
    _check_length(model, length)
    layers = _layers(model)
    embedding = model.get_input_embeddings()
    random = torch.Generator().manual_seed(seed)
    ids = _tokens(model, length, random).to(model.device)
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        with _without_checkpointing(model), _recorded(embedding, layers) as record:
            logits = model(input_ids=ids, use_cache=False).logits
        record["logits"] = (record.pop("embedding"), logits)
        _check_differentiable(record)
        found = [
            Leak(name, _later_reads(*record[name], random)) for name in (*layers, "logits") if name in record
        ]
    return Causality(
        length=length,
        mode="train" if model.training else "eval",
        layers=tuple(name for name in layers if name in record),
        leaks=tuple(leak for leak in found if leak.pairs),
    )


def _later_reads(before: Tensor, after: Tensor, random: torch.Generator) -> tuple[tuple[int, int], ...]:
    """Return the pairs (i, j > i) where row i of `after` depends on row j of `before`; both are [1, length, any]."""
    length = after.shape[1]
    # A random direction: the sum of a layer's output, say, can be constant whatever goes in.
    direction = torch.randn(after.shape[-1], generator=random).to(after)
    pairs = []
    for reader in range(length - 1):
        row = (after[0, reader] * direction).sum()
        (gradient,) = torch.autograd.grad(row, before, retain_graph=True, allow_unused=True)
        if gradient is not None:
            read = gradient[0, reader + 1 :].abs().amax(dim=-1).nonzero().flatten() + reader + 1
            pairs += [(reader, position) for position in read.tolist()]
    return tuple(pairs)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's decoder layers by name: the first list of modules with as many as its config says."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{index}": layer for index, layer in enumerate(module)}
    return {}


@contextmanager
def _recorded(embedding: nn.Module, layers: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Record what each layer gets and returns, and make the embeddings a leaf that gradients can reach."""
    record: dict[str, Any] = {}

    def start(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        record["embedding"] = leaf
        return leaf

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple, options: dict, output: Any) -> None:
            before = arguments[0] if arguments else options["hidden_states"]
            record[name] = (before, output if isinstance(output, Tensor) else output[0])

        return hook

    handles = [embedding.register_forward_hook(start)]
    handles += [layer.register_forward_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Keep activations: a checkpointed layer has no graph between the hidden states that it gets and returns."""
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def _tokens(model: nn.Module, length: int, random: torch.Generator) -> Tensor:
    """Return random ids [1, length] without the padding id, which a model may embed as zero."""
    config = model.config.get_text_config()
    ids = torch.randint(config.vocab_size, (1, length), generator=random)
    padding = getattr(config, "pad_token_id", None)
    return ids if padding is None else torch.where(ids == padding, (padding + 1) % config.vocab_size, ids)


def _check_length(model: nn.Module, length: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length < 2 or (longest is not None and length > longest):
        raise InputError(
            message(
                "Causality cannot be tested at this length.",
                {
                    "asked": f"{length} positions",
                    "model": f"reads up to {longest or 'any number of'} positions",
                },
                fix="a length of at least 2 that the model can read",
            )
        )


def _check_differentiable(record: dict[str, tuple[Tensor, Tensor]]) -> None:
    logits = record["logits"][1]
    if not torch.isfinite(logits).all():
        raise InputError(
            message(
                "The model's logits are not finite, so their gradients tell nothing.",
                {"found": f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} values"},
                fix="weights that were loaded completely, or float32 in place of float16",
            )
        )
    cut = [
        name for name, (before, after) in record.items() if not (before.requires_grad and after.requires_grad)
    ]
    if cut:
        raise InputError(
            message(
                "No gradient flows through the model, so a leak could not be seen.",
                {"cut at": cut[0]},
                fix="a model that can be trained, without torch.no_grad in its forward",
            )
        )
