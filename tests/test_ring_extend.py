"""Several processes train the model that one does: by windows read together, after an interruption, or by windows each."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import together
from safetensors.torch import load_file
from tiny import byte_tokenizer, llama

from longspan.errors import InputError
from longspan.extend import extension
from longspan.extend.recipe import Recipe
from longspan.hf import precision

STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("ring")
    model = llama(positions=64)
    model.save_pretrained(folder / "tiny")
    byte_tokenizer(opening=True).save_pretrained(folder / "tiny")
    text = "".join(f"Chapter {n}. It was the {n}th of May, and nothing happened.\n" for n in range(60))
    (folder / "novel.txt").write_text(text)
    return Recipe(
        model=str(folder / "tiny"),
        text=str(folder / "novel.txt"),
        length=250,
        documents="packed",
        pattern="Streaming(32, sinks=4)",
        steps=STEPS,
        batch=1,
        accumulate=2,
        rank=2,
        sequence_ranks=0,
    )


def process(rank: int, recipe: Recipe | None, output: Path, stop: int) -> list[float] | str:
    """Extend a model, or go on with it, as one process of those that torchrun starts; stop after so many steps."""
    world = str(torch.distributed.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    # Rounding to bfloat16 would hide what is compared here.
    precision.bfloat16_is_fast = lambda on_cpu: False
    losses = []

    def progress(name: str, done: int) -> Any:
        def report(done: int, total: int, **loss: float) -> None:
            losses.extend(loss.values())
            if len(losses) == stop and rank == 0:
                os.kill(os.getpid(), signal.SIGINT)

        return report

    try:
        if recipe is None:
            extension.resume(output, progress=progress)
        else:
            extension.extend(recipe, output, progress=progress)
    except extension.Interrupted as interrupted:
        return f"stopped after {interrupted.step}"
    return losses


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_any_number_of_processes_trains_the_same_model(recipe: Recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda on_cpu: False)
    alone: list[float] = []
    extension.extend(
        recipe,
        tmp_path / "alone",
        progress=lambda name, done: lambda done, total, **loss: alone.extend(loss.values()),
    )
    # Two of them begin, three go on.
    output = tmp_path / "together"
    # A loss is told after the step that it belongs to, so the stop is one step later.
    stopped = together(tmp_path / "two", 2, process, recipe, output, 1)
    assert stopped == ["stopped after 2"] * 2
    assert (output / "training" / "checkpoint-2" / "whole.json").exists()
    went_on = together(tmp_path / "three", 3, process, None, output, 0)
    assert went_on[0] == went_on[1] == went_on[2]
    assert went_on[0] == pytest.approx(alone[2:], abs=2e-6)
    whole, shared = (load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", output))
    assert whole.keys() == shared.keys()
    for name in whole:
        torch.testing.assert_close(shared[name], whole[name], rtol=0, atol=1e-5)


def trained(rank: int, recipe: Recipe, output: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Extend a model as one process of several, and return its losses and what it has trained."""
    found = {}
    own = extension.train

    def train(model: Any, *given: Any, **options: Any) -> int:
        steps = own(model, *given, **options)
        found.update(
            {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
        )
        return steps

    extension.train = train
    return process(rank, recipe, output, 0), found


def test_processes_with_windows_of_their_own_train_as_one_does_with_all_of_them(
    recipe: Recipe, tmp_path: Path
):
    """Data parallel, as torchrun and accelerate start it: each reads its share of a step, and all end with one model."""
    own = replace(recipe, sequence_ranks=1)
    two = together(tmp_path / "two", 2, trained, own, tmp_path / "shared")
    [(losses, alone)] = together(tmp_path / "one", 1, trained, replace(own, batch=2), tmp_path / "alone")
    [(first, weights), (second, others)] = two
    assert first == second == pytest.approx(losses, abs=2e-6) and len(first) == STEPS
    assert weights.keys() == others.keys() == alone.keys()
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=0, atol=0)
        torch.testing.assert_close(weights[name], alone[name], rtol=0, atol=1e-5)
    whole, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "shared"))
    for name in whole:
        torch.testing.assert_close(shared[name], whole[name], rtol=0, atol=1e-5)


def test_processes_that_cannot_be_divided_are_refused(recipe: Recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError) as refused:
        extension.together(Recipe(length=250, sequence_ranks=3))
    assert str(refused.value) == (
        "The processes cannot be divided among the windows.\n"
        "  asked      3 processes for each window of 250 tokens\n"
        "  there are  4 processes\n"
        "  try        torchrun --nproc-per-node with a multiple of --sequence-ranks, and two tokens for each"
    )
