"""Attention with places in the cache as StreamingLLM's paper says it: query by query, everything turned anew."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


class Apart(torch.nn.Module):
    """Attention of one Llama layer, query by query, over keys at places 0, 1, 2 ...

    Args:
        layer: the layer whose weights are taken.
        pattern: what is read.
        real: bool `[rows, columns]`, false on padding; rows may repeat, as beams do, and later columns are tokens.
    """

    def __init__(self, layer, pattern, real):
        super().__init__()
        self.layer, self.pattern, self.real = layer, pattern, real

    def forward(self, hidden_states, **options):
        layer, width = self.layer, self.layer.head_dim
        rows, columns = hidden_states.shape[:2]
        sides = [
            side(hidden_states).view(rows, columns, -1, width).transpose(1, 2)
            for side in (layer.q_proj, layer.k_proj, layer.v_proj)
        ]
        real = F.pad(self.real, (0, columns), value=True)[:, :columns]
        real = real.repeat_interleave(rows // len(real), dim=0)
        output = torch.zeros_like(sides[0])
        for kind in real.unique(dim=0):
            same, there = (real == kind).all(dim=1).nonzero().flatten(), kind.nonzero().flatten()
            if len(there):
                found = self._read(*(side[same][:, :, there] for side in sides))
                output[same[:, None], :, there] = found.transpose(1, 2)
        return layer.o_proj(output.transpose(1, 2).flatten(2)), None

    def _read(self, query, key, value):
        tokens = torch.arange(query.shape[2])
        read = self.pattern.at_head(0, 1).contains(tokens[:, None], tokens)
        places = (read.cumsum(1) - 1).clamp(min=0)
        shared = query.shape[1] // key.shape[1]
        # A query and a key of its own for every pair.
        query = _turned(query, read.sum(1) - 1)[:, :, :, None]
        key = _turned(key[:, :, None], places).repeat_interleave(shared, 1)
        scores = (query * key).sum(-1) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~read, -torch.inf).softmax(-1)
        return weights @ value.repeat_interleave(shared, 1)


def _turned(side, places):
    half = side.shape[-1] // 2
    angles = places[..., None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().to(side.dtype), angles.sin().to(side.dtype)
    one, other = side[..., :half], side[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def recomputing(model, pattern, real):
    """Return a copy of a Llama that computes every query of every text anew."""
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        layer.self_attn = Apart(layer.self_attn, pattern, real)
    return other
