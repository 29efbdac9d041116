"""Leaks of the future: found in the layer where they were put, and nowhere else."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hf_models import recompute
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from longspan.errors import InputError
from longspan.hf.causality import Leak, check_causality

LENGTH = 12
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}


def model_of(config, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def llama(attention="sdpa", **keys):
    return model_of(LlamaConfig(**GATED | keys), attention)


def attention_that_leaks(*, layer, shift, mode=None):
    """Causal attention whose keys and values are rolled to the left in one layer: i reads up to i + shift."""

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        if module.layer_idx == layer and mode in (None, module.training):
            key, value = key.roll(-shift, dims=2), value.roll(-shift, dims=2)
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    return attention


AttentionInterface.register("leaks_in_layer_2", attention_that_leaks(layer=2, shift=1))
AttentionInterface.register("leaks_in_layer_0_by_3", attention_that_leaks(layer=0, shift=3))
AttentionInterface.register("leaks_in_training", attention_that_leaks(layer=1, shift=1, mode=True))


def rolled(layer, shift):
    """What attention with rolled keys reads of the future: column j of the mask holds key j + shift."""
    reads = [{(j + shift) % LENGTH for j in range(i + 1)} for i in range(LENGTH)]
    return Leak(layer, tuple((i, j) for i in range(LENGTH) for j in sorted(reads[i]) if j > i))


CLEAN = {
    "llama": LlamaConfig(**GATED),
    "mistral": MistralConfig(**GATED, sliding_window=4),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED),
    "gemma": GemmaConfig(**GATED, head_dim=8),
    "gemma2": Gemma2Config(**GATED, head_dim=8, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4),
    "falcon": FalconConfig(**SMALL),
    "phi": PhiConfig(**SMALL, intermediate_size=48),
}


# transformers has no sdpa for these two.
WITH_SDPA = [family for family in CLEAN if family not in ("gemma2", "bloom")]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("family", "attention"), [*product(CLEAN, ["eager"]), *product(WITH_SDPA, ["sdpa"])])
def test_public_models_do_not_leak(family, attention, mode):
    model = model_of(CLEAN[family], attention).train(mode == "train")
    found = check_causality(model, length=LENGTH)
    assert found
    assert len(found.layers) == 3
    assert found.mode == mode


def test_a_leak_is_found_in_its_layer_with_its_pairs():
    found = check_causality(llama("leaks_in_layer_2"), length=LENGTH)
    assert not found
    assert found.leaks == (rolled("model.layers.2", 1), rolled("logits", 1))
    assert (
        str(found)
        == """Not causal: 1 of 3 layers read later positions (12 positions, 3 layers, eval mode).
  model.layers.2  0 reads 1, 1 reads 2, 2 reads 3, 3 reads 4, ... (11 pairs)
  logits          0 reads 1, 1 reads 2, 2 reads 3, 3 reads 4, ... (11 pairs)"""
    )


def test_a_leak_over_several_positions_in_the_first_layer_spreads_to_the_logits_only():
    found = check_causality(llama("leaks_in_layer_0_by_3"), length=LENGTH)
    assert [leak.part for leak in found.leaks] == ["model.layers.0", "logits"]
    assert found.leaks[0] == rolled("model.layers.0", 3)
    assert set(rolled("logits", 3).pairs) <= set(found.leaks[1].pairs)


def test_a_leak_in_training_only_is_seen_in_training_only():
    model = llama("leaks_in_training")
    assert check_causality(model, length=LENGTH)
    found = check_causality(model.train(), length=LENGTH)
    assert found.leaks[0].part == "model.layers.1"


def test_a_leak_outside_the_layers_is_said_to_be_there():
    model = llama()
    model.model.norm.register_forward_hook(lambda module, arguments, output: output.roll(-1, dims=1))
    found = check_causality(model, length=3)
    assert (
        str(found)
        == """Not causal: 0 of 3 layers read later positions (3 positions, 3 layers, eval mode).
  logits  0 reads 1, 1 reads 2
  The layers are causal by themselves: the leak is before, between or after them."""
    )


def test_a_clean_model_in_print():
    text = "Causal: no position reads a later one (12 positions, 3 layers, train mode)."
    assert str(check_causality(llama().train(), length=LENGTH)) == text


def hooks(model):
    """Every hook by the place it hangs at; transformers leaves some of its own at a model's first step."""
    return [(name, key) for name, module in model.named_modules() for key in module._forward_hooks]


def test_nothing_of_the_model_is_changed():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    recompute(model)
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    switches = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    model(torch.zeros(1, 2, dtype=torch.long))
    before = hooks(model)
    random = torch.get_rng_state()
    assert check_causality(model, length=LENGTH)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [getattr(module, "gradient_checkpointing", None) for module in model.modules()] == switches
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert hooks(model) == before


def test_a_frozen_model_without_gradients_is_tested_all_the_same():
    model = llama("leaks_in_layer_2").requires_grad_(False)
    with torch.no_grad():
        assert not check_causality(model, length=LENGTH)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_tested_one_by_one(reentrant):
    model = llama("leaks_in_layer_2").train()
    recompute(model, use_reentrant=reentrant)
    assert check_causality(model, length=LENGTH).leaks == (
        rolled("model.layers.2", 1),
        rolled("logits", 1),
    )


@pytest.mark.parametrize("length", [1, 65])
def test_lengths_that_cannot_be_tested(length):
    with pytest.raises(InputError) as caught:
        check_causality(llama(), length=length)
    assert (
        str(caught.value)
        == f"""Causality cannot be tested at this length.
  asked  {length} positions
  model  reads up to 64 positions
  try    a length of at least 2 that the model can read"""
    )


def test_a_model_with_broken_weights():
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(InputError) as caught:
        check_causality(model, length=4)
    assert (
        str(caught.value)
        == """The model's logits are not finite, so their gradients tell nothing.
  found  256 of 256 values
  try    weights that were loaded completely, or float32 in place of float16"""
    )


def test_a_model_without_gradients_in_its_forward():
    model = llama()
    layer = model.model.layers[1]
    layer.forward = torch.no_grad()(layer.forward)
    with pytest.raises(InputError) as caught:
        check_causality(model, length=4)
    assert (
        str(caught.value)
        == """No gradient flows through the model, so a leak could not be seen.
  cut at  model.layers.1
  try     a model that can be trained, without torch.no_grad in its forward"""
    )
