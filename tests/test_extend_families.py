"""Every family of decoders end to end: extended, measured, and read again by plain transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from longspan.errors import InputError
from longspan.extend import extension
from longspan.extend.recipe import Recipe
from longspan.hf.model import load_model
from longspan.hf.rope import from_config

CONTEXT, LENGTH = 64, 256
SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
SHARED = SHAPE | {"num_key_value_heads": 2}
WINDOWS = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}
FAMILIES = {
    "llama, shared keys": LlamaConfig(**SHARED),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral, windows": MistralConfig(**SHARED, sliding_window=48),
    "qwen2, windows on half of the layers": Qwen2Config(**SHARED, **WINDOWS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHARED, head_dim=16),
    "gemma, wide heads, tied": GemmaConfig(**SHARED, head_dim=16),
    "gemma2, capped": Gemma2Config(**SHARED, head_dim=8, sliding_window=48),
    "phi, half of each head turned": PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**SHARED),
    "gpt-neox, a quarter turned": GPTNeoXConfig(**SHAPE, rotary_pct=0.25),
}
ROPE = {"phi3": "ntk"}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "novel.txt"
    file.write_text("It was the best of times, it was the worst of times.\n" * 100)
    return str(file)


def saved(config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def plain(folder):
    """A model as anybody reads it, and the logits of a long text."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("The age of wisdom. " * 13, return_tensors="pt").input_ids
    assert CONTEXT < ids.shape[1] <= LENGTH
    with torch.no_grad():
        return model, ids, model(ids).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_extended_measured_and_read_again(name, text, run, tmp_path):
    source = saved(FAMILIES[name], tmp_path / "source")
    recipe = {"length": LENGTH, "steps": 2, "rank": 2, "rope": ROPE.get(name, "yarn"), "rate": 1e-2}
    folder = extension.extend(Recipe(model=source, text=text, **recipe), tmp_path / "out")
    model, ids, logits = plain(folder)
    assert torch.isfinite(logits).all()
    assert model.config.max_position_embeddings == LENGTH
    # The same tensors under the same names, some of them changed, and no trace of how.
    before, after = (load_file(f"{place}/model.safetensors") for place in (source, folder))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(before[key].shape == after[key].shape for key in before)
    assert model.config.tie_word_embeddings == FAMILIES[name].tie_word_embeddings
    assert "longspan" not in json.dumps(model.config.to_dict())
    # Angles and their share of a head are those that the configuration says.
    width = getattr(model.config, "head_dim", None) or 8
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    frequency = from_config(model.config)
    assert frequency.share == from_config(FAMILIES[name]).share
    torch.testing.assert_close(rotary.inv_freq, frequency.angles_per_token(width), rtol=0, atol=0)
    torch.testing.assert_close(load_model(folder)[0](ids).logits, logits)
    asked = [
        "--text",
        text,
        "--lengths",
        f"128,{LENGTH}",
        "--stride",
        "32",
        "--segments",
        "1",
        "--trials",
        "1",
    ]
    code, out, err = run("eval", source, folder, *asked, "--depths", "0.5")
    assert code == 0, err
    assert "source" in out and "out" in out


def test_passkeys_stand_where_the_windows_of_a_model_reach(text, tmp_path):
    source = saved(FAMILIES["qwen2, windows on half of the layers"], tmp_path / "source")
    recipe = Recipe(model=source, text=text, length=LENGTH, steps=2)
    assert extension._Prepared(recipe, "cpu").windows.own == (None, 48)


def test_what_was_extended_is_extended_further(text, tmp_path):
    """By YaRN, twice: once is not known to the second, whose result counts from the length first trained."""
    source = saved(FAMILIES["llama, shared keys"], tmp_path / "source")
    shared = {"text": text, "steps": 1, "rank": 2, "margin": 1.0}
    once = extension.extend(Recipe(model=source, length=128, **shared), tmp_path / "once")
    twice = extension.extend(Recipe(model=str(once), length=LENGTH, **shared), tmp_path / "twice")
    model, _, logits = plain(twice)
    assert torch.isfinite(logits).all()
    found = from_config(model.config)
    assert (found.original, found.factor) == (CONTEXT, 4.0)


def test_experts_are_extended_with_their_own_loss(text, tmp_path):
    """A config without a width of heads, experts whose grouped products know bfloat16 alone where memory is reckoned."""
    source = saved(
        MixtralConfig(**SHARED, num_local_experts=4, output_router_logits=True), tmp_path / "source"
    )
    asked = Recipe(model=source, text=text, length=LENGTH, steps=2, rank=2, rate=1e-2)
    with pytest.raises(InputError, match="cannot be computed in chunks"):
        extension.extend(asked, tmp_path / "out")
    folder = extension.extend(replace(asked, loss="whole"), tmp_path / "out")
    model, _, logits = plain(folder)
    assert torch.isfinite(logits).all() and model.config.head_dim == 8
