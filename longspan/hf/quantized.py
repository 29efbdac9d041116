"""Weights of 4 bits: how transformers is told to make them as it reads, and what they cannot be made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from longspan.errors import InputError, message

BITS = 4
# Numbers that share a scale.
BLOCK = 64


def as_read(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the options of `from_pretrained` that make every matrix but embeddings and head NF4, where it shall be.

    References:
        Dettmers et al., QLoRA (arXiv 2305.14314), section 3.
    """
    compute = torch.bfloat16 if device.type == "cuda" else dtype
    small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": small, "device_map": {"": device}}


def needed(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights when they have been read so; the model may be an empty one."""
    parts = {
        id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    whole = sum(weight.numel() for weight in parts.values())
    return whole * model.dtype.itemsize + (model.num_parameters() - whole) * BITS // 8


def check(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse what bitsandbytes could make, and would fail to multiply with.

    Raises:
        InputError: on the CPU, a matrix whose rows are no whole blocks.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if (
            device.type == "cpu"
            and isinstance(module, nn.Linear)
            and module is not head
            and module.in_features % BLOCK
        ):
            raise InputError(
                message(
                    "The weights of this model cannot be held in 4 bits on the CPU.",
                    {
                        "asked": "method qlora",
                        "why": f"rows of {name} have {module.in_features} numbers, which are no whole blocks of {BLOCK}",
                    },
                    fix="--method lora, or a CUDA device",
                )
            )
