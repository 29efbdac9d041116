"""One look at each kernel on a CUDA device: every family of patterns, forward and backward, as `make gpu` runs it.

On a machine without one the same tests hold a shorter text to its budget by whatever `attend` chooses on cpu.
"""

from __future__ import annotations

import pytest
import torch
from table import families
from test_kernel_matrix import check, tensors

from longspan.kernel.flash import flash
from longspan.pattern import Pattern
from longspan.score import Scores

# By `attend` itself, and by kernels whose programs are compiled once for all patterns.
ALL = [(kernel, number) for kernel in (None, "flash", "triton") for number in range(len(families(64)))]
# Each of these is compiled by itself, which takes long: a part of one list, a whole one, a mixture, a table.
FEW = [("flex", number) for number in (0, 2, 4, 14)]


@pytest.mark.parametrize(("kernel", "number"), [*ALL, *FEW], ids=str)
def test_kernels_keep_to_the_formula(kernel: str | None, number: int, device: torch.device):
    length = 1_100 if device.type == "cuda" else 300
    pattern: Pattern = families(length)[number]
    if device.type == "cpu" and kernel:
        pytest.skip(f"{kernel} has tests of its own on cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    given = tensors(length, length, dtype, device, batch=1, width=64)
    if kernel == "flash" and (why := flash.refusal(given[0], given[2], Scores())):
        pytest.skip(f"flash {why}")
    check(pattern, given, kernel)
