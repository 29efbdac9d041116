"""A stand-in for PyTorch's flash attention on CUDA: the same operators, on cpu, by the definition.

It refuses what the operators refuse, or would read past: other widths, other dtypes on the two sides, rows that do
not lie in one piece, windows below 0. What is not read is multiplied by 0, as in a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def flash_on_cpu() -> Iterator[list[dict[str, Any]]]:
    """Put the stand-in behind PyTorch's operators, and record what they are called with."""
    calls: list[dict[str, Any]] = []

    def forward(query: Tensor, key: Tensor, value: Tensor, *facts: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.append(_call("forward", query, key, value, facts, options))
        weights, lse = _weights(query, key, value, facts, options)
        output = _joined(weights, value.transpose(1, 2)).transpose(1, 2)
        unused = torch.zeros(2, dtype=torch.uint64)
        # The operator's results lie so.
        return output.contiguous(), lse.contiguous(), unused, unused, query.new_zeros(0)

    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        *facts: Any,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        assert grad.is_contiguous() and output.is_contiguous() and lse.is_contiguous()
        assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
        calls.append(_call("backward", query, key, value, facts, options))
        scores, read = _scores(query, key, facts, options)
        weights = torch.exp(scores - lse[..., None]).masked_fill(~read, 0.0)
        grad, output = (side.transpose(1, 2) for side in (grad, output))
        share = query.shape[2] // key.shape[2]
        keys, values = (side.transpose(1, 2).repeat_interleave(share, 1) for side in (key, value))
        steep = weights * (grad @ values.mT - (grad * output).sum(-1, keepdim=True)) * options["scale"]
        into_query = (steep @ keys).transpose(1, 2)
        shared = (steep.mT @ query.transpose(1, 2), weights.mT @ grad)
        into_key, into_value = (side.unflatten(1, (-1, share)).sum(2).transpose(1, 2) for side in shared)
        return into_query.contiguous(), into_key.contiguous(), into_value.contiguous()

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def _call(name: str, query: Tensor, key: Tensor, value: Tensor, facts: Any, options: Any) -> dict[str, Any]:
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    assert key.shape == value.shape and key.shape[0] == query.shape[0] and query.shape[2] % key.shape[2] == 0
    assert all(side.stride(-1) == 1 for side in (query, key, value))
    assert facts[0] is facts[1] is None and facts[2:4] == (query.shape[1], key.shape[1])
    assert min(options["window_size_left"], options["window_size_right"]) >= -1
    window = (options["window_size_left"], options["window_size_right"])
    return {"name": name, "query": query, "key": key, "value": value, "window": window}


def _scores(query: Tensor, key: Tensor, facts: Any, options: Any) -> tuple[Tensor, Tensor]:
    rows, columns = query.shape[1], key.shape[1]
    left, right = options["window_size_left"], options["window_size_right"]
    assert not facts[5] or (left, right) == (-1, 0)
    away = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
    read = torch.ones_like(away, dtype=torch.bool)
    if left >= 0:
        read &= away >= -left
    if right >= 0:
        read &= away <= right
    share = query.shape[2] // key.shape[2]
    keys = key.transpose(1, 2).repeat_interleave(share, 1)
    return query.transpose(1, 2) @ keys.mT * options["scale"], read


def _weights(query: Tensor, key: Tensor, value: Tensor, facts: Any, options: Any) -> tuple[Tensor, Tensor]:
    scores, read = _scores(query, key, facts, options)
    # Of a row without a key the operator says something else than longspan does.
    assert False not in read.any(-1).tolist()
    scores = scores.masked_fill(~read, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - lse[..., None]), lse


def _joined(weights: Tensor, value: Tensor) -> Tensor:
    return weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
