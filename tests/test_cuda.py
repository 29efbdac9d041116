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

# Of some length, to name them: by `attend` itself, and by kernels that are compiled once for all patterns, if at all.
NAMES = [str(pattern) for pattern in families(1_100)]
ALL = [(kernel, name) for kernel in (None, "flash", "triton") for name in NAMES]
# Each of these is compiled by itself, which takes long.
FEW = [("flex", name) for name in NAMES if name.startswith(("Streaming", "LongNet", "S2", "Documents"))]


@pytest.mark.parametrize(("kernel", "name"), [*ALL, *FEW], ids=str)
def test_kernels_keep_to_the_formula(kernel: str | None, name: str, device: torch.device):
    length = 1_100 if device.type == "cuda" else 300
    pattern: Pattern = families(length)[NAMES.index(name)]
    if device.type == "cpu" and kernel:
        pytest.skip(f"{kernel} has tests of its own on cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    given = tensors(length, length, dtype, device, batch=1, width=64)
    if kernel == "flash" and (why := flash.refusal(given[0], given[2], Scores())):
        pytest.skip(f"flash {why}")
    check(pattern, given, kernel)
