"""Commands of many processes, one of which is killed, stopped or never comes: the others say so, and all goes on after."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import apart, together
from test_ring_extend import recipe as recipe

from longspan import cli
from longspan.extend import extension, state
from longspan.extend.recipe import Recipe
from longspan.hf import precision
from longspan.hf.sequence import Split
from longspan.ring import RankError
from longspan.ring.transport import reaching
from longspan.ring.watch import Watch, join

PATIENCE = 4.0
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def environment(rank: int) -> None:
    """Let this process look like one of those that torchrun starts."""
    world = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    # Rounding to bfloat16 would hide what is compared here.
    precision.bfloat16_is_fast = lambda on_cpu: False


def extended(rank: int, recipe: Recipe | None, output: Path, victim: int, end: signal.Signals) -> list[float]:
    """Extend a model, or go on with it; the last process meets its end after so many losses."""
    environment(rank)
    losses = []

    def step(done: int, total: int, **loss: float) -> None:
        losses.extend(loss.values())
        if rank == dist.get_world_size() - 1 and len(losses) == victim:
            # So that what it last said is known.
            time.sleep(1)
            os.kill(os.getpid(), end)

    if recipe is None:
        extension.resume(output, timeout=timedelta(seconds=PATIENCE), progress=lambda name, done: step)
    else:
        extension.extend(
            recipe, output, timeout=timedelta(seconds=PATIENCE), progress=lambda name, done: step
        )
    return losses


def told(result: tuple[bool, Any]) -> str:
    """Return what a process has raised, without what only torch.distributed knows."""
    done, text = result
    assert not done, "it came through"
    message = text.partition("\nTraceback")[0]
    # The dead one had sent what it had to, or not.
    return re.sub(r"step 1[12] of", "step N of", re.sub(r"(reason +)\S.*", r"\1...", message))


def test_a_lost_process_ends_the_training_and_its_last_state_is_whole(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda on_cpu: False)
    recipe = replace(recipe, steps=13)
    alone: list[float] = []
    extension.extend(
        recipe,
        tmp_path / "alone",
        progress=lambda name, done: lambda done, total, **loss: alone.extend(loss.values()),
    )
    output = tmp_path / "out"

    def lost(ranks: int, recipe: Recipe | None, victim: int, end: signal.Signals) -> list[str]:
        begin = time.monotonic()
        jobs = apart(
            tmp_path / f"of {ranks}",
            ranks,
            extended,
            recipe,
            output,
            victim,
            end,
            timeout=PATIENCE,
            watched=range(ranks - 1),
        )
        assert time.monotonic() - begin < 60
        assert jobs[-1] == (False, "no answer")
        assert state.last(output / "training") == output / "training" / "checkpoint-10"
        return [told(job) for job in jobs[:-1]]

    def said(rank: int, other: int) -> str:
        return (
            f"RankError: Rank {rank} has lost rank {other} in the training.\n"
            "  where   step N of 13\n"
            f"  silent  rank {other}, last heard of in step N of 13\n"
            "  reason  ...\n"
            "  kept    the state after step 10\n"
            f"  try     longspan extend --resume --output {output}, under torchrun with as many processes or others"
        )

    assert lost(2, recipe, 11, signal.SIGKILL) == [said(0, 1)]
    # Three go on from step 10, and one of them hangs.
    assert lost(3, None, 1, signal.SIGSTOP) == [said(0, 2), said(1, 2)]
    went_on: list[float] = []
    extension.resume(
        output, progress=lambda name, done: lambda done, total, **loss: went_on.extend(loss.values())
    )
    assert went_on == pytest.approx(alone[10:], abs=2e-6)


def evaluated(rank: int, arguments: list[str], victim: int, end: signal.Signals) -> tuple[int, str]:
    """Run `longspan eval`; process 1 meets its end when it reads a text for the so many-th time."""
    environment(rank)
    read, texts = Split.forward, 0

    def forward(self: Split, *given: Any, **named: Any) -> Any:
        nonlocal texts
        texts += 1
        if rank == 1 and texts == victim:
            # So that what it last said is known.
            time.sleep(2)
            os.kill(os.getpid(), end)
        return read(self, *given, **named)

    Split.forward, sys.argv = forward, ["longspan", "eval", *arguments]
    written = io.StringIO()
    with contextlib.redirect_stderr(written), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, written.getvalue()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_evaluation(recipe: Recipe, tmp_path: Path, end: signal.Signals):
    asked = [recipe.model, "--text", recipe.text, "--lengths", "32,64", "--stride", "16"]
    asked += ["--tasks", "perplexity", "--segments", "2", "--device", "cpu"]
    # One batch is read at each length.
    [(done, result), _] = apart(tmp_path, 2, evaluated, asked, 2, end, timeout=PATIENCE, watched=[0])
    assert done, result
    code, written = result
    assert code == 2, written
    assert re.sub(r"(reason +)\S.*", r"\1...", written[written.index("Rank 0") :]) == (
        "Rank 0 has lost rank 1 in the evaluation.\n"
        "  where   tiny, perplexity, after 64 of 192 tokens\n"
        "  silent  rank 1, last heard of in tiny, perplexity, after 64 of 192 tokens\n"
        "  reason  ...\n"
        "  try     the same command again: nothing has been written\n"
    )


def test_speed_is_not_measured_by_several_processes(recipe: Recipe, tmp_path: Path):
    asked = [recipe.model, "--text", recipe.text, "--lengths", "64", "--tasks", "speed", "--device", "cpu"]
    assert (
        together(tmp_path, 2, evaluated, asked, 0, signal.SIGKILL)
        == [
            (
                2,
                "Speed is measured on one device.\n"
                "  asked  --tasks speed on 2 processes\n"
                "  try    longspan eval --tasks speed without torchrun\n",
            )
        ]
        * 2
    )


def watched(rank: int) -> str:
    """Let one process be told to end while the other lives on, and wait in vain for it."""
    try:
        with Watch("the work", fix="begin again") as watch:
            watch.step = "step 2"
            dist.barrier()
            if rank == 0:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(8)
            with reaching(rank, "rank 0", "step 7, forward"):
                dist.recv(torch.zeros(1), src=0)
    except RankError as error:
        return str(error)
    return "nothing"


def test_who_is_told_to_end_says_where_it_was(tmp_path: Path):
    first, second = together(tmp_path, 2, watched, timeout=5.0)
    assert first == (
        "Rank 0 was told to end in the work.\n"
        "  where   step 2\n"
        "  others  rank 1, last heard of in step 2\n"
        "  reason  SIGTERM\n"
        "  try     begin again"
    )
    # It has ended, which is not to be silent.
    assert re.sub(r"(reason  )[^\n]*, in", r"\1..., in", second) == (
        "Rank 1 waited in vain in the work.\n"
        "  where   step 2\n"
        "  others  rank 0, last heard of in step 2\n"
        "  reason  ..., in step 7, forward\n"
        "  try     begin again"
    )


def test_processes_that_do_not_come_together_say_so(monkeypatch: pytest.MonkeyPatch):
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError) as refused:
        join("cpu", timedelta(seconds=1))
    assert re.sub(r"(reason +)Timed out.*", r"\1...", str(refused.value)) == (
        "The processes did not come together.\n"
        "  this one  rank 0 of 2\n"
        "  reason    ...\n"
        "  try       look for the first error of the others; --timeout sets the patience"
    )
