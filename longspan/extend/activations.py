"""Activations: what is done with what the way back needs, until it comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError, message


def kept(model: nn.Module, how: str) -> Any:
    """Return a context in which a model keeps its activations in one way.

    Args:
        model: the model of transformers, inside any wrapper.
        how: "kept", "recomputed" or "offloaded", see `longspan.extend.recipe.Recipe`.
    """
    return {"kept": nullcontext, "recomputed": _recomputed, "offloaded": _offloaded}[how](model)


def check_activations(how: str, device: torch.device) -> None:
    """Refuse to move activations from the CPU to the CPU.

    Raises:
        InputError: "offloaded" without another device.
    """
    if how == "offloaded" and device.type == "cpu":
        raise InputError(
            message(
                "Activations cannot be moved away from here.",
                {"asked": "activations offloaded on cpu", "why": "they are in the CPU's memory already"},
                fix="--activations recomputed",
            )
        )


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Let every layer compute its activations again on the way back, for as long as a block runs."""
    # transformers has renamed these.
    new = hasattr(model, "activation_checkpointing_enable")
    kind = "activation" if new else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


@contextmanager
def _offloaded(model: nn.Module) -> Iterator[None]:
    """Let activations wait in the CPU's memory for as long as a block runs; weights stay where they are."""
    weights = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    cpu = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())

    def pack(saved: Tensor) -> Any:
        return saved if saved.untyped_storage().data_ptr() in weights else cpu.pack_hook(saved)

    def unpack(held: Any) -> Tensor:
        return held if isinstance(held, Tensor) else cpu.unpack_hook(held)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
