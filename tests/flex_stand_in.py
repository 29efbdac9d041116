"""A stand-in for FlexAttention on cpu: what lists of blocks and a mask function say and nothing else, with gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxOutput


def listed(number: torch.Tensor, which: torch.Tensor, columns: int) -> torch.Tensor:
    """Return which blocks stand in lists, bool, as kernels read them: as many of each list as its number says."""
    meant = torch.arange(which.shape[-1]) < number[..., None]
    found = torch.zeros(*number.shape, columns, dtype=torch.int64)
    found.scatter_add_(3, which.long(), meant.long())
    assert not (found > 1).any()
    return found > 0


def blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    return_aux: Any,
    kernel_options: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention over what the lists say: all of a full block, and of a partial one what the mask function keeps."""
    size, axis = block_mask.BLOCK_SIZE[0], [*query.shape[:3], key.shape[2]]
    rows, columns = (-(-length // size) for length in axis[2:])
    partly = listed(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    fully = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    assert not (partly & fully).any()
    # The kernels of PyTorch 2.11 find the full blocks by the strides of the partial ones.
    assert block_mask.kv_indices.stride() == block_mask.full_kv_indices.stride()
    assert block_mask.q_indices.stride() == block_mask.full_q_indices.stride()
    # What backward reads is the same, column by column.
    assert torch.equal(partly.mT, listed(block_mask.q_num_blocks, block_mask.q_indices, rows))
    assert torch.equal(fully.mT, listed(block_mask.full_q_num_blocks, block_mask.full_q_indices, rows))
    assert enable_gqa and return_aux.lse and kernel_options is None

    def places(blocks: torch.Tensor) -> torch.Tensor:
        wide = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)
        return wide[:, :, : axis[2], : axis[3]]

    b, h, q, k = (
        torch.arange(length, dtype=torch.int32).view([-1 if at == number else 1 for at in range(4)])
        for number, length in enumerate(axis)
    )
    read = places(fully) | (places(partly) & block_mask.mask_mod(b, h, q, k))
    key, value = (side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value))
    scores = query @ key.mT * scale
    if score_mod is not None:
        scores = score_mod(scores, b, h, q, k)
    scores = scores.masked_fill(~read, -math.inf)
    silent = ~read.any(-1).expand(scores.shape[:-1])
    lse = torch.logsumexp(scores.masked_fill(silent[..., None], 0.0), dim=-1)
    # As in a kernel, what is not read is multiplied by 0.
    weights = torch.exp(scores - lse[..., None]).masked_fill(silent[..., None], 0.0)
    return weights @ value, AuxOutput(lse=lse.masked_fill(silent, -math.inf), max_scores=None)
