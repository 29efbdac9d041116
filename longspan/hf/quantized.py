"""Weights of 4 bits: how transformers is told to make them as it reads, and what they take."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

BITS = 4


def as_read(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the options of `from_pretrained` that make every matrix but embeddings and head NF4, where it shall be.

    References:
        Dettmers et al., QLoRA (arXiv 2305.14314), section 3.
    """
    compute = torch.bfloat16 if device.type == "cuda" else dtype
    small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": small, "device_map": {"": device}}


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose weights of 4 bits stay as they were read.

    Read once without gradients, they would be ordered anew for bfloat16 instructions of a CPU: rounded again, of some
    sizes only, and from then on without a gradient for what comes before them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def needed(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights when they have been read so; the model may be an empty one."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    whole = sum(weight.numel() for weight in {id(end.weight): end.weight for end in ends}.values())
    return whole * model.dtype.itemsize + (model.num_parameters() - whole) * BITS // 8
