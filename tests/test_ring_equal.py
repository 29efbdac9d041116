"""Ranks together give what one process gives, forward and backward, and send what the plan says, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import together
from ring_cases import CASES, compare, compare_on_a_grid


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of what one process gives for every case."""
    path = tmp_path_factory.mktemp("ring") / "truths.pt"
    torch.save([case.alone() for case in CASES], path)
    return path


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_equal_one_process(ranks: int, truths: Path, tmp_path: Path):
    wrong = together(tmp_path, ranks, compare, truths)
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(wrong) for line in found]
    assert not lines, "\n".join(lines[:20])


def test_rows_and_columns_of_ranks_equal_one_process(truths: Path, tmp_path: Path):
    wrong = together(tmp_path, 4, compare_on_a_grid, truths)
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(wrong) for line in found]
    assert not lines, "\n".join(lines[:20])
