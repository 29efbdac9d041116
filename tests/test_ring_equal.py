"""Ranks together give what one process gives, forward and backward, and send what the plan says, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from ranks import together
from ring_cases import CASES, Case, compare, compare_drawn, compare_on_a_grid
from strategies import lengths, per_head, relations

# Patterns drawn at random; the draw is the same on every run.
DRAWN = 24


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


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random patterns, all atoms and operators, with what one process gives for each."""
    cases: list[Case] = []

    @seed(0)
    @settings(max_examples=DRAWN, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(relations, per_head), lengths)
    def draw(pattern, length):
        cases.append(Case(pattern, length, torch.float64, batch=1))

    draw()
    path = tmp_path_factory.mktemp("drawn") / "drawn.pt"
    torch.save([(case, case.alone()) for case in cases], path)
    return path


@pytest.mark.parametrize("ranks", [2, 3])
def test_random_patterns_equal_one_process(ranks: int, drawn: Path, tmp_path: Path):
    wrong = together(tmp_path, ranks, compare_drawn, drawn)
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(wrong) for line in found]
    assert not lines, "\n".join(lines[:20])
