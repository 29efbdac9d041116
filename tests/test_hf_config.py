"""Position scaling in a config: the frequencies plain transformers builds from it, and every refusal."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from longspan.errors import InputError
from longspan.hf.config import METHODS, extended, rope_parameters, write_config

SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES = [
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    GemmaConfig,
    Gemma2Config,
]


def llama(**keys):
    return LlamaConfig(**SMALL | keys)


def frequencies(theta, width, method, factor, original):
    """The frequencies as the papers write them, in float64 and by loops."""
    if method == "ntk":
        theta = theta * factor ** (width / (width - 2))
    plain = [theta ** (-2 * d / width) for d in range(width // 2)]
    if method == "linear":
        return [frequency / factor for frequency in plain]
    if method == "ntk":
        return plain
    if method == "llama3":
        return [parted(frequency, factor, original / (2 * math.pi) * frequency) for frequency in plain]

    def dimension(turns):
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = (
        max(math.floor(dimension(32)), 0),
        min(math.ceil(dimension(1)), width - 1),
    )
    result = []
    for d, frequency in enumerate(plain):
        slow = min(max((d - low) / (high - low), 0), 1)
        result.append(frequency * (1 - slow) + frequency / factor * slow)
    return result


def parted(frequency, factor, turns):
    """Llama 3's frequency of a pair that makes so many turns within the trained length."""
    kept = min(max((turns - 1) / (4 - 1), 0), 1)
    return (1 - kept) * frequency / factor + kept * frequency


def saved_and_loaded(config, folder):
    """A checkpoint written by plain transformers, given our config.json, and loaded by plain transformers."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    config.architectures = saved["architectures"]
    write_config(config, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def rotary(model):
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("method", METHODS)
def test_a_written_checkpoint_loads_in_plain_transformers_with_the_right_frequencies(
    family, method, tmp_path
):
    config = family(**SMALL)
    model = saved_and_loaded(extended(config, method=method, length=4096), tmp_path)
    theta = config.rope_parameters["rope_theta"]
    width = getattr(config, "head_dim", None) or 16
    wanted = torch.tensor(frequencies(theta, width, method, 8, 512))
    torch.testing.assert_close(rotary(model).inv_freq, wanted, rtol=1e-6, atol=0)
    assert model.config.max_position_embeddings == 4096
    temperature = 0.1 * math.log(8) + 1 if method == "yarn" else 1.0
    assert rotary(model).attention_scaling == pytest.approx(temperature)


@pytest.mark.parametrize("method", METHODS)
def test_both_styles_of_keys_alone_give_bit_equal_frequencies(method, tmp_path):
    config = extended(llama(), method=method, length=2048)
    both = rotary(saved_and_loaded(config, tmp_path)).inv_freq
    path = tmp_path / "config.json"
    keys = json.loads(path.read_text())
    for absent in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        path.write_text(json.dumps({key: value for key, value in keys.items() if key not in absent}))
        alone = rotary(AutoModelForCausalLM.from_pretrained(tmp_path)).inv_freq
        assert torch.equal(alone, both)


def test_a_written_config_says_the_same_in_both_styles_and_nothing_of_longspan(
    tmp_path,
):
    config = extended(llama(), method="yarn", length=4096)
    text = write_config(config, tmp_path / "new").read_text()
    keys = json.loads(text)
    assert keys["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    }
    assert keys["rope_theta"] == 10000.0
    assert keys["rope_scaling"] == {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    }
    assert keys["max_position_embeddings"] == 4096
    assert "longspan" not in text
    assert "attention_factor" not in text


def test_ntk_is_a_larger_theta_and_no_scaling_key(tmp_path):
    keys = json.loads(write_config(extended(llama(), method="ntk", length=4096), tmp_path).read_text())
    theta = 10000.0 * 8 ** (16 / 14)
    assert keys["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert keys["rope_theta"] == theta
    assert "rope_scaling" not in keys


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_rotates_a_share_of_each_head_keeps_the_share(method, tmp_path):
    small = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    config = GPTNeoXConfig(**small, rope_parameters={"rope_theta": 5000.0, "partial_rotary_factor": 0.5})
    model = saved_and_loaded(extended(config, method=method, length=4096), tmp_path)
    wanted = torch.tensor(frequencies(5000.0, 8, method, 8, 512))
    torch.testing.assert_close(rotary(model).inv_freq, wanted, rtol=1e-6, atol=0)
    keys = json.loads((tmp_path / "config.json").read_text())
    assert keys["rotary_emb_base"] == keys["rope_parameters"]["rope_theta"]
    assert keys["rotary_pct"] == 0.5


def test_the_config_given_is_left_alone():
    config = llama()
    before = config.to_json_string()
    extended(config, method="yarn", length=4096)
    assert config.to_json_string() == before


def test_yarn_on_yarn_counts_from_the_trained_length():
    once = extended(llama(), method="yarn", length=2048)
    twice = extended(once, method="yarn", length=4096)
    assert twice.rope_parameters == extended(llama(), method="yarn", length=4096).rope_parameters


def test_llama3_on_llama3_counts_from_the_trained_length():
    once = extended(llama(), method="llama3", length=2048)
    twice = extended(once, method="llama3", length=4096)
    assert twice.rope_parameters == extended(llama(), method="llama3", length=4096).rope_parameters


def test_llama3_keeps_what_it_stretched_more_than_its_length():
    # As Llama 3.2: its length is 4 times the trained one, its slow pairs turn 16 times slower.
    parameters = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 16.0}
    parameters |= {
        "original_max_position_embeddings": 512,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = llama(max_position_embeddings=2048, rope_parameters=dict(parameters))
    longer = extended(config, method="llama3", length=8192)
    assert longer.rope_parameters == parameters | {"factor": 64.0}
    assert longer.max_position_embeddings == 8192


def test_ntk_on_ntk_is_ntk_at_once():
    twice = extended(extended(llama(), method="ntk", length=2048), method="ntk", length=4096)
    at_once = rope_parameters(llama(), method="ntk", length=4096)
    assert twice.rope_parameters["rope_theta"] == pytest.approx(at_once["rope_theta"])


def test_yarn_whose_length_was_never_raised_reads_its_factor_times_the_trained_length():
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    with pytest.raises(InputError, match="reads 2048 tokens already"):
        rope_parameters(llama(rope_parameters=parameters), method="yarn", length=1024)


def scaled(rope_type, **keys):
    return llama(
        max_position_embeddings=2048,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0} | keys,
    )


REFUSALS = {
    "unknown": (
        llama(),
        "yarm",
        4096,
        """No RoPE scaling has this name.
  asked  yarm
  try    linear, ntk, yarn, llama3""",
    ),
    "dynamic": (
        llama(),
        "dynamic",
        4096,
        """Dynamic NTK cannot be written into a checkpoint.
  asked  dynamic
  why    its frequencies change with the length of the text, so keys already in a cache keep
         frequencies that no longer hold; it also turns itself off when max_position_embeddings
         says the new length
  try    linear, ntk, yarn, llama3""",
    ),
    "shorter": (
        llama(),
        "yarn",
        256,
        """The new length is not longer than the model's own.
  asked  256 tokens
  model  reads 512 tokens already
  try    a length of more than 512""",
    ),
    "no rope": (
        GPT2Config(),
        "yarn",
        4096,
        """This model has no RoPE to scale.
  model  gpt2
  why    its configuration has no rope_parameters: positions enter it in another way
  try    a model with rotary positions, such as Llama, Mistral, Qwen or Gemma""",
    ),
    "nested": (
        Gemma3TextConfig(**SMALL),
        "yarn",
        4096,
        """This model has one RoPE per kind of layer, which is not scaled yet.
  model  gemma3_text
  found  full_attention, sliding_attention
  try    a model whose layers share one RoPE, such as Llama, Mistral, Qwen or Gemma 2""",
    ),
    "linear on linear": (
        scaled("linear"),
        "linear",
        4096,
        """This model's positions are scaled already, and cannot be scaled again in this way.
  asked  linear
  model  linear with factor 4.0
  why    how far it was stretched, and from which length, is not certain
  try    start from the checkpoint before it was scaled, and go to the full length at once""",
    ),
    "ntk on yarn": (
        scaled("yarn", original_max_position_embeddings=512),
        "ntk",
        4096,
        """This model's positions are scaled already, and cannot be scaled again in this way.
  asked  ntk
  model  yarn with factor 4.0
  why    two kinds of scaling do not add up to one that a config can say
  try    yarn, which goes on from there""",
    ),
    "yarn on llama3": (
        scaled("llama3", original_max_position_embeddings=512, low_freq_factor=1.0, high_freq_factor=4.0),
        "yarn",
        4096,
        """This model's positions are scaled already, and cannot be scaled again in this way.
  asked  yarn
  model  llama3 with factor 4.0
  why    two kinds of scaling do not add up to one that a config can say
  try    llama3, which goes on from there""",
    ),
    "yarn with a temperature": (
        scaled("yarn", original_max_position_embeddings=512, attention_factor=1.1),
        "yarn",
        4096,
        """This model's positions are scaled already, and cannot be scaled again in this way.
  asked  yarn
  model  yarn with factor 4.0
  why    its attention_factor was chosen for that factor alone
  try    start from the checkpoint before it was scaled, and go to the full length at once""",
    ),
    "refused by the class": (
        Phi3Config(**SMALL | {"pad_token_id": 0}),
        "linear",
        4096,
        """This model's class does not take this RoPE scaling.
  asked  linear
  model  phi3
  why    `rope_parameters`'s type field must be one of ['longrope'], got linear
  try    ntk, which changes theta alone""",
    ),
    "changed by the class": (
        Phi3Config(**SMALL | {"pad_token_id": 0}),
        "yarn",
        4096,
        """This model's class does not take this RoPE scaling.
  asked  yarn
  model  phi3
  why    its configuration takes it for another kind of scaling, which needs more keys
  try    ntk, which changes theta alone""",
    ),
    "ntk with one pair": (
        llama(head_dim=2),
        "ntk",
        4096,
        """NTK scaling needs heads with more than one pair of turned numbers.
  head  2 numbers wide, 2 of them turned
  try   linear scaling, which presses positions together""",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    config, method, length, text = REFUSALS[case]
    with pytest.raises(InputError) as caught:
        extended(config, method=method, length=length)
    assert str(caught.value) == text


def test_a_config_without_a_length_is_refused():
    config = BloomConfig(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.raises(InputError) as caught:
        rope_parameters(config, method="yarn", length=4096)
    assert (
        str(caught.value)
        == """This model does not say how many tokens it reads.
  model  bloom
  found  max_position_embeddings = None
  try    set max_position_embeddings in its config.json to the length it was trained at"""
    )
