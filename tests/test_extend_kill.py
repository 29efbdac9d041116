"""Nothing is lost: runs that are really killed, states that are half written, disks that are full, losses that are none."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, llama

from longspan.errors import InputError
from longspan.extend import extension, folder, state, training
from longspan.extend.adapter import adapt
from longspan.extend.recipe import Recipe
from longspan.extend.windows import TrainingWindows
from longspan.text.corpus import Corpus

LENGTH, STEPS, SAVED = 96, 13, 10
CORPUS = Corpus.from_ids([list(range(1, 200)) * 10], separator=256)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # The child runs one thread only, see below.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    place = tmp_path_factory.mktemp("kill")
    llama(positions=64).save_pretrained(place / "tiny")
    byte_tokenizer().save_pretrained(place / "tiny")
    (place / "novel.txt").write_text("".join(f"It was the {n}th of May. " for n in range(200)))
    return Recipe(
        model=str(place / "tiny"),
        text=str(place / "novel.txt"),
        length=LENGTH,
        pattern="LongMixed(16)",
        steps=STEPS,
        accumulate=2,
        rank=2,
    )


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> tuple[Path, list[float]]:
    losses: list[float] = []
    output = extension.extend(recipe, tmp_path_factory.mktemp("whole") / "out", progress=listener(losses))
    return output, losses


def listener(losses):
    return lambda name, done: lambda done, total, **loss: losses.extend(loss.values())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(number):
    def moment():
        def step(done, total, **loss):
            if done == number * 2 * LENGTH:
                die()

        return lambda name, done: step

    return moment


def in_state(number):
    """When the files of a state are written, and nobody has said yet that they are whole."""

    def moment():
        seal = state.seal
        state.seal = lambda place: die() if state.step(place) == number else seal(place)

    return moment


def in_result(place):
    """While the result is written, or when it lies in its place and the states are still there."""

    def moment():
        flush = state.flush
        state.flush = lambda path: die() if path.name == place else flush(path)

    return moment


MOMENTS = {
    "before the first state": (in_step(4), 0),
    "between two states": (in_step(12), SAVED),
    "in the last state": (in_state(STEPS), SAVED),
    "in the result": (in_result("model.safetensors"), STEPS),
    "after the result": (in_result("out"), STEPS),
}


def child(recipe, output, moment):
    # A forked process must not use the threads of its parent.
    torch.set_num_threads(1)
    extension.extend(recipe, output, progress=moment())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_end(recipe, undisturbed, tmp_path, moment):
    kill, saved = MOMENTS[moment]
    output = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=child, args=(recipe, output, kill))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (output / "training").is_dir()
    assert len(list((output / "training").glob("checkpoint-*"))) >= (saved > 0)

    losses: list[float] = []
    extension.resume(output, progress=listener(losses))
    whole, expected = undisturbed
    assert losses == pytest.approx(expected[saved:], abs=1e-6)
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    for name, weights in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(load_file(output / "model.safetensors")[name], weights, rtol=0, atol=1e-6)


def test_half_a_state_is_not_taken_for_whole(tmp_path):
    states = [tmp_path / f"checkpoint-{step}" for step in (10, 20, 30, 40)]
    for place in states:
        (place / "deep").mkdir(parents=True)
        (place / "deep" / "weights").write_bytes(b"0123456789")
    for place in states[:3]:
        state.seal(place)
    assert state.last(tmp_path) == states[2]
    (states[2] / "deep" / "weights").write_bytes(b"01234")
    assert state.last(tmp_path) == states[1]
    (states[1] / "deep" / "weights").unlink()
    assert state.last(tmp_path) == states[0]
    (states[0] / state.SEAL).write_text('{"deep/wei')
    assert state.last(tmp_path) is None
    state.sweep(tmp_path)
    assert not list(tmp_path.iterdir())
    assert state.last(tmp_path / "none") is None


def trained(tmp_path, disturb):
    """Train a tiny model while something happens to it, and return the error and where the states lie."""
    adapted = adapt(llama(), rank=2)
    small = Recipe(length=LENGTH, steps=STEPS, passkeys=0.0, rate=1e-3)
    windows = TrainingWindows(CORPUS, byte_tokenizer(), small, heads=4)
    count = iter(range(1, STEPS + 1))
    with pytest.raises(InputError) as stopped:
        training.train(
            adapted,
            windows,
            small,
            folder=tmp_path / "training",
            progress=lambda done, total, **loss: disturb(adapted, next(count)),
        )
    return stopped.value, adapted


@torch.no_grad()
def spoil_weights(model, step):
    if step == 11:
        next(weight for weight in model.parameters() if weight.requires_grad).fill_(torch.nan)


def spoil_gradients(model, step):
    if step == 11:
        weight = next(weight for weight in model.parameters() if weight.requires_grad)
        weight.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(
    ("disturb", "found"),
    [(spoil_weights, "the loss is nan"), (spoil_gradients, "the norm of the gradient is ")],
)
def test_a_loss_that_is_no_number_stops_the_training(tmp_path, disturb, found):
    error, model = trained(tmp_path, disturb)
    lines = str(error).splitlines()
    assert lines[0] == "The training has diverged, and was stopped before this step changed a weight."
    assert lines[1].startswith(f"  found  {found}")
    assert lines[2] == "  step   12 of 13"
    assert lines[3].startswith("  batch  windows ") and int(lines[3].split()[2]) < STEPS
    assert lines[4] == f"  kept   the state after step 10, {tmp_path}/training/checkpoint-10"
    assert lines[5] == "  try    a rate below 0.001, in a new output folder"
    kept = state.last(tmp_path / "training")
    for weights in load_file(kept / "adapter_model.safetensors").values():
        assert torch.isfinite(weights).all()
    if disturb is spoil_gradients:
        assert all(torch.isfinite(weights).all() for weights in model.parameters())


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_fills_up_keeps_the_last_state(tmp_path, monkeypatch):
    def fill(model, step):
        if step == 11:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 1000))

    error, _ = trained(tmp_path, fill)
    lines = str(error).splitlines()
    assert lines[0] == "The state of the training cannot be saved."
    assert lines[3:] == [
        "  kept     the state after step 10",
        f"  try      make room, then longspan extend --resume --output {tmp_path}",
    ]
    assert state.last(tmp_path / "training").name == "checkpoint-10"


def test_a_full_disk_is_found_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 10_000))
    with pytest.raises(InputError, match="The disk has too little room for this run"):
        extension.extend(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(extension, "load_model", None)
    with pytest.raises(InputError, match="The output folder cannot be written"):
        extension.extend(Recipe(), tmp_path / "file" / "out")


def test_an_unwritable_result_keeps_the_state(tmp_path):
    model = llama()
    place = folder.OutputFolder(tmp_path)
    place.training.mkdir()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="The output folder cannot be written"):
        place.finish(model, byte_tokenizer())
    assert place.training.exists() and not (tmp_path / "config.json").exists()
