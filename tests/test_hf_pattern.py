"""Patterns on models: which layer reads what, that nothing leaks, and where patterns go with a model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from hf_models import FAMILIES, FULL, VOCABULARY, WINDOW, model_of, tokens
from transformers import AttentionInterface

from longspan.derive.mask import counts
from longspan.hf.attention import reset, set_pattern
from longspan.hf.causality import check_causality
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Chunk,
    Dilated,
    Longformer,
    LongMixed,
    LongNet,
    PerHead,
    Streaming,
    Window,
)

LENGTH = 23
PATTERNS = {
    "window": Window(4),
    "dilated both ways": Dilated(3),
    "LongNet": LongNet((4, 8), (1, 2)),
    "S2": S2(8),
    "SCCA": SCCA(4),
    "SDA": SDA(2),
    "LongMixed": LongMixed(8),
    "Longformer": Longformer(4),
    "Streaming": Streaming(4, sinks=1),
    "per head": PerHead([Causal(), Window(3) + Chunk(5)]),
    "bidirectional S2": S2(8, causal=False),
}
# What each layer reads in the attention below, which holds no code of the kernels.
DENSE = []


def dense_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention as in the definition, with the counts of DENSE and of Causal()."""
    heads, length = query.shape[1:3]
    key, value = (side.repeat_interleave(heads // key.shape[1], dim=1) for side in (key, value))
    often = counts(DENSE[module.layer_idx] & Causal(), length=length, heads=heads)
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling + often.to(query.dtype).log(), dim=-1)
    # A query whose pattern holds no key at all.
    return (weights.nan_to_num() @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense", dense_attention)


@pytest.fixture
def model():
    return model_of(FULL["llama"])


def logits(model):
    with torch.no_grad():
        return model(tokens(2, LENGTH)).logits


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
def test_every_layer_reads_by_the_pattern(family, name):
    model = model_of(FULL[family])
    DENSE[:] = [PATTERNS[name]] * 3
    model.set_attn_implementation("dense")
    wanted = logits(model)
    set_pattern(model, PATTERNS[name])
    torch.testing.assert_close(logits(model), wanted)


def test_each_layer_reads_by_its_own_pattern(model):
    DENSE[:] = [Causal(), PATTERNS["LongMixed"], PATTERNS["window"]]
    model.set_attn_implementation("dense")
    wanted = logits(model)
    set_pattern(model, DENSE)
    torch.testing.assert_close(logits(model), wanted)


@pytest.mark.parametrize("family", ["mistral", "qwen2 with windows"])
def test_the_windows_of_the_model_stay(family):
    model = model_of(FAMILIES[family])
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    assert "sliding_attention" in kinds
    pattern = LongMixed(2 * WINDOW)
    DENSE[:] = [pattern & Window(WINDOW) if kind == "sliding_attention" else pattern for kind in kinds]
    model.set_attn_implementation("dense")
    wanted = logits(model)
    set_pattern(model, pattern)
    torch.testing.assert_close(logits(model), wanted)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_pattern_makes_a_decoder_read_the_future(model, name, mode):
    set_pattern(model.train(mode == "train"), PATTERNS[name])
    found = check_causality(model, length=17)
    assert found, str(found)


def test_positions_past_the_window_are_not_read(model):
    set_pattern(model, Causal() & Window(3))
    embeds = model.get_input_embeddings()(tokens(1, LENGTH)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, -1].sum(), embeds)
    read = gradient[0].abs().amax(-1).nonzero().flatten()
    # Three layers, each two positions back.
    assert read.tolist() == list(range(LENGTH - 1 - 3 * 2, LENGTH))


def test_reset_goes_back_to_the_attention_before(model):
    model.set_attn_implementation("eager")
    set_pattern(model, Causal() & Window(3))
    set_pattern(model, Causal() & Window(4))
    assert model.config._attn_implementation == "longspan"
    reset(model)
    assert model.config._attn_implementation == "eager"
    reset(model)
    assert model.config._attn_implementation == "eager"


def test_reset_leaves_an_attention_that_was_set_in_between(model):
    set_pattern(model, Causal())
    model.set_attn_implementation("eager")
    reset(model)
    assert model.config._attn_implementation == "eager"


def test_a_pattern_survives_another_attention_in_between(model):
    set_pattern(model, PATTERNS["LongMixed"])
    wanted = logits(model)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(logits(model), wanted)
    model.set_attn_implementation("longspan")
    assert torch.equal(logits(model), wanted)
    reset(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_takes_its_pattern_along_and_goes_its_own_way(model, twin):
    set_pattern(model, PATTERNS["LongMixed"])
    wanted = logits(model)
    other = twin(model)
    assert torch.equal(logits(other), wanted)
    set_pattern(other, Causal())
    assert not torch.allclose(logits(other), wanted)
    assert torch.equal(logits(model), wanted)
    reset(other)
    assert torch.equal(logits(model), wanted)


def test_models_in_one_process_read_by_patterns_of_their_own(model):
    other = model_of(FULL["llama"])
    plain = logits(other)
    set_pattern(model, Causal() & Window(2))
    assert torch.equal(logits(other), plain)


# peft asks a model by the name that transformers has just given up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_wrapped_by_peft(model):
    set_pattern(model, PATTERNS["LongMixed"])
    wanted = logits(model)
    reset(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    set_pattern(wrapped, PATTERNS["LongMixed"])
    torch.testing.assert_close(logits(wrapped), wanted)
    assert check_causality(wrapped, length=5)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted)
    reset(merged)
    assert merged.config._attn_implementation == "sdpa"


def test_a_checkpoint_holds_no_trace_of_a_pattern(model, tmp_path):
    set_pattern(model, PATTERNS["LongMixed"])
    model.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert b"longspan" not in file.read_bytes()


def test_logits_of_a_single_token(model):
    ids = torch.tensor([[VOCABULARY - 1]])
    wanted = model(ids).logits
    set_pattern(model, Causal() & Window(3))
    torch.testing.assert_close(model(ids).logits, wanted)


def test_without_transformers_models_are_refused_in_one_message():
    program = """
import sys
sys.modules["transformers"] = None
from longspan.errors import InputError
try:
    import longspan.hf
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (
        done.stdout
        == """Models are read through transformers, which is not installed.
  asked  longspan.hf
  try    pip install "longspan[extend]"
"""
    )
