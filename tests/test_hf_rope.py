"""Frequencies read from and written as config keys: what they say is what transformers builds, in every style."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
)

from longspan.errors import InputError, ShapeError
from longspan.frequency import (
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKByParts,
    Plain,
    YaRN,
    factors,
)
from longspan.hf.config import with_frequency, write_config
from longspan.hf.rope import from_config, to_config

WIDTH = 16
SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SHORT = [1.0 + 0.1 * pair for pair in range(WIDTH // 2)]
LONG = [1.0 + 0.9 * pair for pair in range(WIDTH // 2)]
SAID = {
    "plain": Plain(theta=5e5),
    "linear": Linear(8.0),
    "yarn": YaRN(8.0, original=512, theta=5e5),
    "yarn unrounded": YaRN(8.0, original=512, ramp="unrounded", fast=16.0, slow=2.0),
    "yarn with a scale": YaRN(8.0, original=512, attention_factor=1.1),
    "yarn with mscale": YaRN(8.0, original=512, mscale=0.7, mscale_all_dim=1.2),
    "longrope": LongRoPE(SHORT, LONG, original=512, factor=8.0),
    "longrope with a scale": LongRoPE(LONG, LONG, original=512, factor=8.0, attention_factor=1.2),
    "llama3": Llama3(8.0, original=512, low=1.5, high=6.0),
}
# Frequencies that are written as another one with the same angles and scale.
SAID_OTHERWISE = {
    "ntk": (NTK(8.0), Plain(theta=10000.0 * 8 ** (WIDTH / (WIDTH - 2)))),
    "by parts": (
        NTKByParts(8.0, original=512, ramp="rounded"),
        YaRN(8.0, original=512, attention_factor=1.0),
    ),
}
ALL = {name: (said, said) for name, said in SAID.items()} | SAID_OTHERWISE


def rotary(model):
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def loaded(config, folder):
    """What plain transformers loads from a checkpoint with our config.json."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    config.architectures = json.loads((folder / "config.json").read_text())["architectures"]
    write_config(config, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("case", ALL)
def test_a_checkpoint_turns_by_what_was_written_and_reads_as_it(case, tmp_path):
    given, read = ALL[case]
    model = loaded(with_frequency(LlamaConfig(**SMALL), given, length=4096), tmp_path)
    assert torch.equal(rotary(model).inv_freq, given.angles_per_token(WIDTH))
    assert rotary(model).attention_scaling == given.scale()
    assert model.config.max_position_embeddings == 4096
    assert from_config(model.config) == read


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("style", ["both", "old", "new"])
def test_every_style_of_keys_reads_back(case, style):
    given, read = ALL[case]
    keys = json.loads(json.dumps(to_config(given, length=4096, width=WIDTH)))
    left_out = {"both": (), "old": ("rope_parameters",), "new": ("rope_theta", "rope_scaling")}[style]
    assert from_config({key: value for key, value in keys.items() if key not in left_out}) == read


def test_dynamic_keeps_the_trained_length_in_the_config(tmp_path):
    frequency = DynamicNTK(512, 2.0)
    model = loaded(with_frequency(LlamaConfig(**SMALL), frequency, length=4096), tmp_path)
    assert model.config.max_position_embeddings == 512
    assert from_config(model.config) == frequency
    assert from_config(to_config(frequency, length=4096, width=WIDTH)) == frequency
    module = rotary(model)
    for length in (100, 700):
        cos, _ = module(torch.zeros(1), torch.arange(length)[None])
        angles = torch.arange(length)[:, None] * frequency.angles_per_token(WIDTH, length)
        # Transformers counts the length in a float32 tensor while a text grows.
        torch.testing.assert_close(cos[0, :, : WIDTH // 2], angles.cos(), rtol=0, atol=1e-4)


def test_longrope_switches_where_transformers_does(tmp_path):
    frequency = SAID["longrope"]
    module = rotary(loaded(with_frequency(LlamaConfig(**SMALL), frequency, length=4096), tmp_path))
    for length in (512, 513):
        cos, _ = module(torch.zeros(1), torch.arange(length)[None])
        angles = torch.arange(length)[:, None] * frequency.angles_per_token(WIDTH, length)
        assert torch.equal(cos[0, :, : WIDTH // 2], angles.cos() * frequency.scale())


def test_the_papers_ramp_goes_into_a_checkpoint_as_factors(tmp_path):
    paper = YaRN(8.0, original=512, ramp="turns")
    said = factors(paper, WIDTH)
    frequency = LongRoPE(said, said, original=512, factor=8.0, attention_factor=paper.scale())
    module = rotary(loaded(with_frequency(LlamaConfig(**SMALL), frequency, length=4096), tmp_path))
    torch.testing.assert_close(module.inv_freq, paper.angles_per_token(WIDTH), rtol=1e-6, atol=0)
    assert module.attention_scaling == paper.scale()


def test_phi3_takes_longrope_and_keeps_the_trained_length_outside(tmp_path):
    config = Phi3Config(**SMALL | {"pad_token_id": 0, "original_max_position_embeddings": 512})
    frequency = LongRoPE(LONG, LONG, original=256, factor=16.0)
    model = loaded(with_frequency(config, frequency, length=4096), tmp_path)
    assert torch.equal(rotary(model).inv_freq, frequency.angles_per_token(WIDTH))
    assert rotary(model).attention_scaling == frequency.scale()
    assert json.loads((tmp_path / "config.json").read_text())["original_max_position_embeddings"] == 256
    assert from_config(model.config) == frequency


def test_a_share_is_read_and_written_in_the_spelling_of_the_model():
    config = GPTNeoXConfig(**SMALL, rope_parameters={"rope_theta": 5000.0, "partial_rotary_factor": 0.5})
    assert from_config(config) == Plain(theta=5000.0, share=0.5)
    keys = to_config(Linear(2.0, theta=5000.0, share=0.5), length=1024, width=WIDTH, model_type="gpt_neox")
    assert (keys["rotary_emb_base"], keys["rotary_pct"]) == (5000.0, 0.5)
    old = {key: value for key, value in keys.items() if key != "rope_parameters"}
    assert from_config(old | {"model_type": "gpt_neox"}) == Linear(2.0, theta=5000.0, share=0.5)
    longer = with_frequency(config, Linear(2.0, theta=5000.0, share=0.5), length=1024)
    assert from_config(longer) == Linear(2.0, theta=5000.0, share=0.5)


def test_defaults_are_those_of_transformers():
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    around = {"max_position_embeddings": 2048, "rope_theta": 1e4}
    assert from_config(around | {"rope_scaling": scaling}) == YaRN(4.0, original=512, theta=1e4)
    scaling = {"rope_type": "yarn", "factor": 4.0}
    assert from_config(around | {"rope_scaling": scaling}) == YaRN(4.0, original=2048, theta=1e4)
    scaling = {"type": "su", "short_factor": SHORT, "long_factor": LONG}
    outside = {"original_max_position_embeddings": 512, "rope_scaling": scaling}
    assert from_config(around | outside) == LongRoPE(SHORT, LONG, original=512, factor=4.0, theta=1e4)


REFUSALS = {
    "no rope": (
        lambda: from_config(GPT2Config()),
        """This model has no RoPE to scale.
  model  gpt2
  why    its configuration has no rope_parameters: positions enter it in another way
  try    a model with rotary positions, such as Llama, Mistral, Qwen or Gemma""",
    ),
    "one per kind of layer": (
        lambda: with_frequency(Gemma3TextConfig(**SMALL), Plain(), length=1024),
        """This model has one RoPE per kind of layer, which is not scaled yet.
  model  gemma3_text
  found  full_attention, sliding_attention
  try    a model whose layers share one RoPE, such as Llama, Mistral, Qwen or Gemma 2""",
    ),
    "unknown type": (
        lambda: from_config({"rope_theta": 1e4, "rope_scaling": {"type": "mrope"}}),
        """This type of RoPE is not known.
  found  rope_type mrope
  try    a model with default, linear, dynamic, yarn, longrope, llama3""",
    ),
    "missing": (
        lambda: from_config({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        """This config does not say all that its RoPE needs.
  found    rope_type yarn
  missing  max_position_embeddings, rope_theta
  try      longspan.hf.load_config, if the model's class has a default for it""",
    ),
    "contradiction": (
        lambda: from_config(
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            }
        ),
        """This config says two different things about its RoPE.
  old keys  factor 4.0
  new keys  factor 8.0
  why       readers of the old keys and readers of rope_parameters would build two models
  try       the values it was trained with in both, or only one style""",
    ),
    "ramp": (
        lambda: to_config(NTKByParts(8, original=512), length=4096, width=WIDTH),
        """No key of a config says the ramp of the YaRN paper.
  asked  NTKByParts with ramp 'turns'
  try    ramp="rounded", or LongRoPE with the factors of longspan.frequency.factors""",
    ),
    "class": (
        lambda: with_frequency(Phi3Config(**SMALL | {"pad_token_id": 0}), Linear(8.0), length=4096),
        """This model's class does not take this RoPE scaling.
  asked  linear
  model  phi3
  why    `rope_parameters`'s type field must be one of ['longrope'], got linear
  try    ntk, which changes theta alone""",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    ask, text = REFUSALS[case]
    with pytest.raises(InputError) as caught:
        ask()
    assert str(caught.value) == text


def test_a_head_that_cannot_be_turned_is_refused():
    with pytest.raises(ShapeError, match="as many factors as a head has pairs"):
        to_config(SAID["longrope"], length=4096, width=8)
