"""Captured: what a batch has to be while a CUDA graph is captured, where no number on the device can be looked at.

A graph runs the calls that were made when it was captured, whatever its inputs hold later. So what decides about calls is
known before, or refused, or checked on the device each time the graph runs: there what is wrong stops it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.errors import ShapeError, message

# What stops a graph where documents are packed.
RESTARTING = "positions restart, as in packed documents, and the graph was captured for one text a row"


def capturing(device: torch.device) -> bool:
    """Say whether a CUDA graph is being captured on a device; not of code that is being compiled, which runs later."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()


def required(holds: Tensor, problem: str) -> None:
    """Let a graph that is being captured stop with an error of the device wherever `holds` has a false in it.

    Args:
        holds: bool, of any shape.
        problem: what is wrong then; CUDA prints the first 255 characters.
    """
    torch._assert_async(holds.all(), f"longspan: {problem}")


def hidden(given: str, *, why: str, fix: str) -> ShapeError:
    """Return the error for something that would have to be looked at."""
    return ShapeError(
        message(
            "This batch cannot be read while a CUDA graph is captured.",
            {"given": given, "why": why},
            fix=fix,
        )
    )


def padded(mask: Tensor) -> ShapeError:
    """Return the error for a mask whose padding nobody knows."""
    return hidden(
        f"attention_mask {list(mask.shape)}",
        why="which tokens are padding decides what is computed, and is on the device",
        fix="no attention_mask where nothing is padded; or one from transformers' create_causal_mask, made before the "
        "capture, whose padding the graph then keeps",
    )
