"""Ranks that differ, die or hang: the others say which rank and which step, within the timeout."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import apart, together
from torch.distributed.device_mesh import init_device_mesh

from longspan import Causal, PerHead, SlidingWindow, attend, ring
from longspan.errors import PlanError, ShapeError
from longspan.layout import contiguous, zigzag
from longspan.ring import agreement

LENGTH = 24


def tensors(rank: int, *, places: int = 8, heads: int = 2) -> list[torch.Tensor]:
    return [torch.randn(1, heads, places, 8, generator=torch.Generator().manual_seed(rank)) for _ in range(3)]


def refusals(rank: int) -> list[str]:
    """Do, one after the other, what ranks must not do, and return what was said."""
    layout = zigzag(LENGTH, 3)
    said = []

    def refused(*arguments: Any, **options: Any) -> None:
        try:
            ring.attend(*arguments, **options)
            said.append("nothing")
        except ring.RankError as error:
            said.append(str(error))

    refused(*tensors(rank), SlidingWindow(8 + (rank == 1)), layout=layout)
    refused(*tensors(rank, places=8 - (rank == 2)), Causal(), layout=layout)
    refused(*tensors(rank, heads=2 + 2 * (rank == 0)), Causal(), layout=layout)
    refused(*tensors(rank), Causal(), layout=zigzag(LENGTH, 4))
    refused(*tensors(rank), PerHead([Causal()] * 3), layout=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "version", lambda name: f"0.{int(rank == 2)}")
        refused(*tensors(rank), Causal(), layout=layout)
    # After all that, ranks that agree go on.
    ring.attend(*tensors(rank), Causal(), layout=layout)
    return said


def test_ranks_that_differ_are_found_before_they_exchange_anything(tmp_path: Path):
    said = together(tmp_path, 3, refusals)
    assert said[0] == said[1] == said[2]
    assert said[0][0] == (
        "The ranks are about to do different things.\n"
        "  pattern  rank 0  SlidingWindow(8)\n"
        "           rank 1  SlidingWindow(9)\n"
        "           rank 2  SlidingWindow(8)\n"
        "  try      the same pattern, layout, shapes, options and versions on every rank"
    )
    assert said[0][1] == (
        "Some ranks cannot attend to what they were given.\n"
        "  found  rank 2  holds 8 of 24 tokens by its layout, got 7 in query, 7 in key, 7 in value\n"
        "  try    on every rank, the shard that layout.positions(rank) cuts from the whole tensors"
    )
    assert "query  rank 0  [1, 4, 8] torch.float32" in said[0][2]
    assert "rank 1  the layout is for 4 ranks, and there are 3" in said[0][3]
    assert "rank 0  The heads cannot be divided equally among the parts of this pattern." in said[0][4]
    assert "longspan  rank 0  0.0" in said[0][5] and "rank 2  0.1" in said[0][5]


def lost(rank: int, strategy: str, way: str, end: str) -> str:
    """Take rank 1 away in the middle of a pass, after all ranks have agreed."""
    layout = contiguous(LENGTH, 3)
    given = [side.requires_grad_() for side in tensors(rank)]
    ring.attend(*given, SlidingWindow(24), layout=layout, strategy=strategy)

    def leave(*arguments: Any, **options: Any) -> None:
        os._exit(1) if end == "dies" else time.sleep(30)

    if rank == 1 and way == "forward":
        dist.batch_isend_irecv = dist.broadcast = leave
    output = ring.attend(*given, SlidingWindow(24), layout=layout, strategy=strategy)
    if rank == 1:
        dist.batch_isend_irecv = leave
    output.sum().backward()
    return "came through"


@pytest.mark.parametrize(
    ("strategy", "way", "end"),
    [
        ("exchange", "forward", "dies"),
        ("ring", "forward", "hangs"),
        ("exchange", "backward", "hangs"),
        ("ulysses", "forward", "dies"),
        ("gather", "forward", "dies"),
    ],
)
def test_a_lost_rank_ends_the_job_with_rank_and_step(strategy: str, way: str, end: str, tmp_path: Path):
    begin = time.monotonic()
    results = apart(tmp_path, 3, lost, strategy, way, end, timeout=4.0, watched=[0, 2])
    assert time.monotonic() - begin < 25
    assert results[1] == (False, "no answer")
    said = [text for done, text in (results[0], results[2]) if not done]
    assert said, "no rank noticed"
    text = "\n".join(said)
    assert text.startswith("LostRankError: Rank ")
    where = {"ulysses": "swapping tokens for heads", "gather": "1 of 2"}.get(strategy, "of 2")
    assert f"{where}, {way}" in text
    # A broadcast has no one to name but those who should hear it.
    assert ("the other ranks" if strategy == "gather" else "waited for rank 1 in vain") in text


def test_without_a_group_nothing_is_attended():
    with pytest.raises(ring.RankError) as refused:
        ring.attend(*tensors(0), Causal(), layout=zigzag(8, 1))
    assert str(refused.value) == (
        "There is no process group.\n"
        "  asked  attention across ranks\n"
        "  try    torch.distributed.init_process_group() in a program that torchrun starts"
    )


def on_a_mesh(rank: int) -> float:
    """Attend in two groups of two ranks, each over its own text."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    place, text = mesh.get_local_rank("context"), mesh.get_local_rank("data")
    whole = tensors(text, places=LENGTH)
    layout = zigzag(LENGTH, 2)
    at = torch.from_numpy(layout.positions(place))
    output = ring.attend(
        *(side[:, :, at] for side in whole),
        SlidingWindow(9),
        layout=layout,
        group=mesh["context"],
        strategy="ring",
    )
    return (output - attend(*whole, SlidingWindow(9))[:, :, at]).abs().max().item()


def test_a_mesh_may_hold_several_groups(tmp_path: Path):
    assert max(together(tmp_path, 4, on_a_mesh)) < 1e-6


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"strategy": "star"}, PlanError, "There is no strategy called star."),
        ({"dtype": "int8"}, ShapeError, "There is no such dtype here."),
        ({"heads": 4, "key_heads": 3}, ShapeError, "4 query heads cannot share 3 key heads equally."),
    ],
)
def test_plans_that_cannot_be_are_refused(given: dict[str, Any], kind: type[Exception], said: str):
    with pytest.raises(kind) as refused:
        ring.plan(Causal(), zigzag(32, 2), **given)
    assert str(refused.value).startswith(said)
