"""QLoRA on CPU: weights of 4 bits of any size, read as they are, and gradients that go through them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.extend import extension
from longspan.extend.adapter import adapt, causal_model
from longspan.extend.loss import chunked
from longspan.extend.recipe import Recipe
from longspan.hf import precision
from longspan.hf.model import load_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, modules


@pytest.fixture(autouse=True)
def instructions_for_bfloat16(monkeypatch):
    """Where a CPU has them, bitsandbytes would order weights anew; so it is told that this one does."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)


def model(hidden: int) -> LlamaForCausalLM:
    """Return a Llama of two layers of random weights, of a width of which bitsandbytes' blocks of 64 need not be a part."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=hidden,
            intermediate_size=hidden + 16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=None,
        )
    )


def saved(hidden: int, folder: Path) -> str:
    model(hidden).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def whole(quantized: nn.Module, hidden: int) -> LlamaForCausalLM:
    """Return the model whose float32 weights are what the 4 bits stand for."""
    plain = model(hidden)
    for name, module in causal_model(quantized).named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = weight
    return plain


@pytest.mark.parametrize("hidden", [32, 64, 160])
def test_losses_and_gradients_are_those_of_the_weights_that_4_bits_stand_for(hidden, tmp_path):
    quantized = adapt(load_model(saved(hidden, tmp_path), bits=4)[0], rank=2, method="qlora")
    small = {name for name, module in quantized.named_modules() if isinstance(module, Linear4bit)}
    assert len(small) == 2 * 7
    plain = adapt(whole(quantized, hidden), rank=2, method="lora")
    ids = torch.arange(48)[None]
    gradients = []
    for adapted in (quantized, plain):
        adapted.train()
        # It compares losses without gradients first.
        with chunked(causal_model(adapted)):
            loss = adapted(ids, labels=ids).loss
            loss.backward()
        gradients.append(
            {name: each.grad for name, each in adapted.named_parameters() if each.grad is not None}
        )
    found, wanted = gradients
    # The first layer's are there if they came through all of the second.
    assert any("layers.0.self_attn.q_proj" in name for name in found) and found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_of_any_width_is_extended_and_its_own_weights_stay_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda on_cpu: False)
    saved(160, tmp_path / "tiny")
    (tmp_path / "novel.txt").write_text("".join(f"Chapter {n}. Nothing happened.\n" for n in range(200)))
    losses = []
    recipe = Recipe(
        model=str(tmp_path / "tiny"),
        text=str(tmp_path / "novel.txt"),
        length=250,
        steps=4,
        batch=1,
        rank=2,
        passkeys=0.0,
        rate=1e-2,
        method="qlora",
    )
    extension.extend(
        recipe,
        tmp_path / "longer",
        progress=lambda name, done: lambda done, total, **loss: losses.extend(loss.values()),
    )
    assert len(losses) == 4 and losses[-1] < losses[0]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("tiny", "longer"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert changed == {name for name in before if any(part in name for part in projections)}


def test_what_bitsandbytes_says_when_it_is_imported_is_not_passed_on():
    """With peft it comes into every run, whatever the method."""
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
