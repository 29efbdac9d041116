"""Precision: the numbers that a model's weights are held in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from longspan.errors import InputError, message

DTYPES = ("float32", "bfloat16", "float16")


def saved_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype that a checkpoint's weights are saved in, float32 where its configuration says none.

    Example:
        >>> saved_dtype(PretrainedConfig(dtype="bfloat16"))
        torch.bfloat16
    """
    dtype = config.dtype
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype) or torch.float32


def reading_dtype(asked: str | None, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """Return the dtype to read a model in: the one asked for, else the checkpoint's own on CUDA and float32 on the CPU.

    Few CPUs multiply in a lower precision by instructions of their own, and on those that do not it is slow.

    Args:
        asked: one of `DTYPES`, or None.
        config: of the model.
        device: where it will run.

    Raises:
        InputError: there is no such dtype for a model.

    Example:
        >>> reading_dtype(None, PretrainedConfig(dtype="bfloat16"), torch.device("cpu"))
        torch.float32
    """
    if asked is None:
        return torch.float32 if device.type == "cpu" else saved_dtype(config)
    return named_dtype(asked, DTYPES)


def named_dtype(asked: str, known: Sequence[str]) -> torch.dtype:
    """Return the dtype of a name, or raise InputError where it is none of those known.

    Example:
        >>> named_dtype("bfloat16", DTYPES)
        torch.bfloat16
    """
    if asked not in known:
        raise InputError(
            message(
                "There is no such dtype for a model.",
                {"asked": f"dtype {asked}"},
                fix=f"one of {', '.join(known)}",
            )
        )
    return getattr(torch, asked)


def training_dtype(config: PretrainedConfig, computed: torch.dtype) -> torch.dtype:
    """Return the dtype to hold weights in that are not trained: bfloat16 where they are saved so and computed in so.

    Nothing is lost by it, and half of their memory saved. Weights of float16 are read into float32: bfloat16 would
    round them.

    Args:
        config: of the model.
        computed: the dtype that training multiplies in.

    Example:
        >>> training_dtype(PretrainedConfig(dtype="float16"), torch.bfloat16)
        torch.float32
    """
    both = saved_dtype(config) == computed == torch.bfloat16
    return torch.bfloat16 if both else torch.float32


def bfloat16_is_fast(on_cpu: bool) -> bool:
    """Say whether this machine multiplies in bfloat16 by instructions of its own."""
    if on_cpu:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
