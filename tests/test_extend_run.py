"""Extension end to end on a tiny model: a plain checkpoint comes out, whatever happened on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
)

from longspan.errors import InputError
from longspan.extend import adapter, extension
from longspan.extend.adapter import adapt, merge
from longspan.extend.recipe import Recipe
from longspan.extend.training import train
from longspan.extend.windows import TrainingWindows
from longspan.hf import precision
from longspan.pattern import Causal, parse
from longspan.text.corpus import Corpus

LENGTH = 512


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = llama(positions=64)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    byte_tokenizer(opening=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "novel.txt"
    file.write_text(
        "".join(f"Chapter {n}. It was the {n}th of May, and nothing happened.\n" for n in range(200))
    )
    return str(file)


def recipe(source: str, text: str, **options) -> Recipe:
    return Recipe(
        **{
            "model": source,
            "text": text,
            "length": LENGTH,
            "pattern": "LongMixed(64)",
            "steps": 6,
            "batch": 1,
            "rank": 2,
        }
        | options
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_checkpoint_is_plain(source, text, tmp_path):
    losses = []

    def progress(name, done):
        return lambda done, total, *, loss: losses.append((done, total, loss))

    folder = extension.extend(recipe(source, text), tmp_path / "out", progress=progress)
    held = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= held
    assert "training" not in held and not any(name.startswith("adapter") for name in held)
    assert "longspan" not in (folder / "config.json").read_text().lower()
    before, after = (load_file(Path(place) / "model.safetensors") for place in (source, folder))
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    trained = ("q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "norm")
    assert changed and all(any(part in name for part in trained) for name in changed)
    assert any("embed_tokens" in name for name in changed) and any("q_proj" in name for name in changed)
    assert [done for done, _, _ in losses] == [LENGTH * step for step in range(1, 7)]
    assert all(total == 6 * LENGTH and np.isfinite(loss) for _, total, loss in losses)

    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == LENGTH
    assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == LENGTH / round(64 / 1.5)
    assert "attention_factor" not in config["rope_parameters"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(folder).model_max_length == LENGTH


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_checkpoint_needs_no_longspan(source, text, tmp_path):
    folder = extension.extend(recipe(source, text, steps=2), tmp_path / "out")
    program = (
        "import sys; sys.modules['longspan'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, attn_implementation='sdpa')\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "ids = tokenizer('Chapter 7. ' * 40, return_tensors='pt').input_ids\n"
        "print(ids.shape[1], bool(torch.isfinite(model(ids).logits).all()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(1 + 11 * 40), "True"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_interrupted_run_goes_on_to_the_same_weights(source, text, tmp_path):
    whole = extension.extend(recipe(source, text), tmp_path / "whole")

    def interrupting(name, done):
        def step(done, total, *, loss):
            if done == 3 * LENGTH:
                os.kill(os.getpid(), signal.SIGINT)

        return step

    with pytest.raises(extension.Interrupted) as stop:
        extension.extend(recipe(source, text), tmp_path / "parts", progress=interrupting)
    assert (stop.value.step, stop.value.steps) == (4, 6)
    assert not (tmp_path / "parts" / "config.json").exists()

    started = []

    def continuing(name, done):
        started.append(done)
        return lambda done, total, *, loss: started.append(done)

    parts = extension.resume(tmp_path / "parts", progress=continuing)
    assert started == [LENGTH * step for step in (4, 5, 6)]
    for name, weights in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(load_file(parts / "model.safetensors")[name], weights, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="This run is finished"):
        extension.resume(parts)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_leaves_the_model_as_it_computes(tmp_path):
    """The Trainer wraps the forward in autocast; what is measured after must not be."""
    model = llama(positions=64)
    adapted = adapt(model, rank=2)
    corpus = Corpus.from_ids([list(range(1, 200)) * 10], separator=256)
    small = Recipe(length=320, steps=1, batch=1)
    train(adapted, TrainingWindows(corpus, byte_tokenizer(), small, heads=4), small, folder=tmp_path)
    assert merge(adapted)(torch.arange(16)[None]).logits.dtype == torch.float32


def test_windows_depend_on_their_number_alone():
    corpus = Corpus.from_ids([list(range(1, 200)) * 10], separator=256)
    small = Recipe(length=400, steps=20, batch=1, repeats=0.4, passkeys=0.3)
    first = TrainingWindows(corpus, byte_tokenizer(opening=True), small, heads=4)
    again = TrainingWindows(corpus, byte_tokenizer(opening=True), small, heads=4)
    order = np.random.default_rng(0).permutation(20)
    for number in order:
        window = again[int(number)]
        assert torch.equal(window["input_ids"], first[int(number)]["input_ids"])
        assert window["input_ids"].shape == (400,) and window["input_ids"][0] == 256
    assert len({tuple(first[n]["input_ids"].tolist()) for n in range(20)}) == 20
    tokenizer = byte_tokenizer()
    asked = sum("What is the pass key?" in tokenizer.decode(first[n]["input_ids"]) for n in range(20))
    assert 2 <= asked <= 12


TRAINED = {
    "full": ("",),
    "lora": ("lora_",),
    "lora+": ("lora_", "embed_tokens", "norm"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", TRAINED)
def test_what_is_trained(method):
    model = adapt(llama(), rank=2, method=method)
    whole = {name for name, weights in llama().named_parameters()}
    trained = {name for name, weights in model.named_parameters() if weights.requires_grad}
    assert all(any(part in name for name in trained) for part in TRAINED[method])
    assert all(any(part in name for part in TRAINED[method]) for name in trained)
    assert trained == whole if method == "full" else not any("mlp" in name for name in trained)
    assert {name for name, weights in merge(model).named_parameters()} == whole


def test_a_loss_of_another_kind_is_refused_before_anything_is_written(text, tmp_path):
    torch.manual_seed(0)
    keys = llama(positions=64).config.to_dict()
    model = GraniteForCausalLM(GraniteConfig(**keys | {"logits_scaling": 8.0}))
    model.save_pretrained(tmp_path / "granite")
    byte_tokenizer().save_pretrained(tmp_path / "granite")
    with pytest.raises(InputError, match="cannot be computed in chunks"):
        extension.extend(recipe(str(tmp_path / "granite"), text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("method", ["full", "lora+"])
def test_a_checkpoint_is_written_in_the_precision_it_came_in(
    source, text, tmp_path, monkeypatch, fast, method
):
    """Trained weights are float32 while they are trained, others in bfloat16 where that is multiplied."""
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda on_cpu: fast)
    place = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(place)
    AutoTokenizer.from_pretrained(source).save_pretrained(place)
    held = {}

    def seen(adapted, *rest, **options):
        held["trained"] = {weight.dtype for weight in adapted.parameters() if weight.requires_grad}
        held["rest"] = {weight.dtype for weight in adapted.parameters() if not weight.requires_grad}
        return train(adapted, *rest, **options)

    monkeypatch.setattr(extension, "train", seen)
    asked = recipe(str(place), text, steps=2, method=method, rate=1e-2)
    folder = extension.extend(asked, tmp_path / "out")
    before, after = (load_file(Path(each) / "model.safetensors") for each in (place, folder))
    assert {weights.dtype for weights in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert held["trained"] == {torch.float32}
    low = torch.bfloat16 if fast else torch.float32
    assert held["rest"] == (set() if method == "full" else {low})


def test_adapters_begin_by_the_seed():
    """Else a run killed before its first state would not go on to the same end."""
    first, again, other = (
        {name: weights.detach() for name, weights in adapt(llama(), rank=2, seed=seed).named_parameters()}
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_qlora_is_refused_without_its_package(monkeypatch):
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    with pytest.raises(InputError) as refused:
        adapter.check_method("qlora")
    assert str(refused.value).splitlines() == [
        "QLoRA cannot be done here.",
        "  asked  method qlora",
        "  why    weights of 4 bits come from bitsandbytes, which is not installed",
        "  try    pip install bitsandbytes, or --method lora",
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_activations_that_are_recomputed_or_moved_change_nothing(tmp_path, monkeypatch):
    """Nor do windows that accumulate: two at once, or one after the other."""
    # In lower precision sums in another order differ by more.
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda on_cpu: False)
    corpus = Corpus.from_ids([list(range(1, 200)) * 10], separator=256)
    ends = []
    for number, options in enumerate(
        (
            {"batch": 2},
            {"batch": 2, "activations": "recomputed"},
            {"batch": 2, "activations": "offloaded"},
            {"accumulate": 2},
            {"loss": "whole", "batch": 2},
        )
    ):
        model = adapt(llama(), rank=2)
        small = Recipe(length=96, steps=2, passkeys=0.0, rate=1e-3, **options)
        train(
            model,
            TrainingWindows(corpus, byte_tokenizer(), small, heads=4),
            small,
            folder=tmp_path / str(number),
        )
        ends.append({name: weights.detach() for name, weights in model.named_parameters()})
    for other in ends[1:]:
        for name, weights in ends[0].items():
            torch.testing.assert_close(other[name], weights, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"stages": 2}, [("Streaming(16, sinks=8)",) * 2] * 2 + [("Streaming(32, sinks=16)",) * 2] * 2),
        ({"window": 32}, [("Streaming(8)",) * 2] * 4),
        ({"documents": "packed", "pattern": "Causal()"}, [("Causal()",) * 2] * 4),
        ({"pattern": "Window(8); LongMixed({1/4})"}, [("Window(8)", "LongMixed(32)")] * 4),
    ],
    ids=["stages", "positions that skip", "packed documents", "a pattern for each layer"],
)
def test_every_layer_reads_as_asked(tmp_path, options, read):
    model, corpus = llama(), Corpus.from_ids([list(range(1, 200))] * 10, separator=256)
    small = Recipe(**{"length": 128, "steps": 4, "passkeys": 0.0, "method": "full"} | options)
    seen = []

    def look(done, total, *, loss):
        assert np.isfinite(loss)
        seen.append([layer.self_attn.longspan.pattern for layer in model.model.layers])

    windows = TrainingWindows(corpus, byte_tokenizer(), small, heads=4)
    train(model, windows, small, folder=tmp_path, progress=look)
    assert seen == [[parse(text) & Causal() for text in layers] for layers in read]
