"""Law 2: attention over a multiset sum is the merge of attentions, gradients included."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from longspan.kernel.softmax.merge import merge, merge_into

ROWS, KEYS = 9, 13


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, 4, length, 5, generator=generator, dtype=torch.float64)
        for length in (ROWS, KEYS, KEYS)
    ]


def multisets(number: int) -> list[torch.Tensor]:
    """Counts with rows that some parts leave empty, and row 4 that all of them do."""
    generator = torch.Generator().manual_seed(number)
    counts = [torch.randint(0, 3, (4, ROWS, KEYS), generator=generator) for _ in range(number)]
    for place, part in enumerate(counts):
        part[:, [place, 4]] = 0
    return counts


@pytest.mark.parametrize("number", [1, 2, 3])
def test_merge_is_attention_over_the_sum(number: int):
    given, counts = tensors(), multisets(number)
    truth = oracle.dense(*given, sum(counts), scale=0.4)
    merged = merge([oracle.dense(*given, part, scale=0.4) for part in counts])
    for got, right in zip(merged, truth, strict=True):
        oracle.within_budget(got, got, right)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_gradients_flow_through_the_merge_and_its_log_sum_exps(number: int):
    given, counts = tensors(), multisets(number)
    into = torch.randn(2, 4, ROWS, 5, dtype=torch.float64), torch.randn(2, 4, ROWS, dtype=torch.float64)
    truth = oracle.gradients(*given, sum(counts), *into, scale=0.4)
    leaves = [tensor.requires_grad_() for tensor in given]
    output, lse = merge([oracle.dense(*leaves, part, scale=0.4) for part in counts])
    loss = (output * into[0]).sum() + (lse * into[1])[lse.isfinite()].sum()
    for got, right in zip(torch.autograd.grad(loss, leaves), truth, strict=True):
        oracle.within_budget(got, got, right)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_merging_in_place_gives_the_same(number: int):
    given, counts = tensors(), multisets(number)
    parts = [oracle.dense(*given, part, scale=0.4) for part in counts]
    output, lse = torch.zeros(2, 4, ROWS, 5).double(), torch.full((2, 4, ROWS), -math.inf).double()
    for part in parts:
        merge_into(output, lse, *part)
    for got, right in zip((output, lse), merge(parts), strict=True):
        oracle.within_budget(got, got, right)


def test_merging_in_place_writes_only_the_rows_of_a_strided_view():
    given, (first, second) = tensors(), multisets(2)
    second[:, 1::2] = 0
    truth = oracle.dense(*given, first + second, scale=0.4)
    output, lse = oracle.dense(*given, first, scale=0.4)
    part_output, part_lse = oracle.dense(*given, second, scale=0.4)
    merge_into(output[:, :, ::2], lse[:, :, ::2], part_output[:, :, ::2], part_lse[:, :, ::2])
    for got, right in zip((output, lse), truth, strict=True):
        oracle.within_budget(got, got, right)


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_large_log_sum_exps_do_not_overflow(size: float):
    output = torch.ones(1, 1, 2, 3)
    small, large = torch.tensor([[[-size, size]]]), torch.tensor([[[size, size]]])
    merged, lse = merge([(output, small), (3 * output, large)])
    assert merged[0, 0].tolist() == [[3, 3, 3], [2, 2, 2]]
    torch.testing.assert_close(lse, torch.tensor([[[size, size + math.log(2)]]]))
