"""Loading a model: from a folder and an id, without noise, and the message for everything that is not one."""

from __future__ import annotations

import json
import shutil
from email.message import Message
from urllib.error import HTTPError, URLError

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
)

import longspan.hf.model as loading
from longspan.errors import InputError
from longspan.hf.config import extended
from longspan.hf.model import load_config, load_model


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def config(**keys):
    small = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    return LlamaConfig(**small, num_attention_heads=4, max_position_embeddings=64, **keys)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config()).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refusal(*arguments, **options):
    with pytest.raises(InputError) as caught:
        load_model(*arguments, **options)
    return str(caught.value)


def test_a_folder_gives_a_model_in_eval_mode_and_float32_with_its_tokenizer(folder, capfd):
    model, tokenizer = load_model(folder)
    assert model.dtype is torch.float32
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("a window")) == "a window"
    assert capfd.readouterr() == ("", "")


def test_another_dtype_leaves_the_frequencies_in_float32(folder):
    model, _ = load_model(str(folder), dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32


def test_a_config_in_place_of_its_own_changes_the_frequencies_and_keeps_the_weights(
    folder,
):
    longer = extended(load_config(folder), method="linear", length=256)
    plain, _ = load_model(folder)
    model, _ = load_model(folder, config=longer)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq / 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", [None, "default"])
def test_none_and_default_are_the_packaged_model(name, folder, monkeypatch):
    monkeypatch.setattr(loading, "_PACKAGED", folder)
    assert load_config(name).hidden_size == 32


def test_an_installation_without_the_packaged_model(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_PACKAGED", tmp_path)
    assert (
        refusal()
        == """The default model is not in this installation.
  looked in  longspan/default_model
  try        install Longspan again, or name a folder or a Hugging Face id"""
    )


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "a/b/c", "~/none"])
def test_a_path_that_does_not_exist(path):
    assert (
        refusal(path)
        == f"""There is no model folder at this path.
  asked  {path}
  try    a folder with config.json, a Hugging Face id (owner/name), or "default\""""
    )


def test_a_folder_without_a_model(tmp_path):
    assert (
        refusal(tmp_path)
        == f"""This folder holds no model.
  asked    {tmp_path}
  missing  config.json
  try      a folder with config.json, a Hugging Face id (owner/name), or "default\""""
    )


def test_a_file(folder):
    assert (
        refusal(folder / "config.json")
        == f"""This is a file, where a model's folder is wanted.
  asked  {folder}/config.json
  try    the folder it lies in, {folder}"""
    )


def test_an_id_without_a_network(monkeypatch):
    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(loading, "urlopen", no_network)
    assert (
        refusal("nobody/nothing")
        == """The model's configuration cannot be fetched.
  tried  the folder nobody/nothing: there is none
         Hugging Face id nobody/nothing, copies on this machine
         huggingface.co: it does not answer
  try    check the name and the network, or give the path of a folder"""
    )


def test_an_id_that_the_hub_does_not_know(monkeypatch):
    def forbidden(request, **_):
        raise HTTPError(request.full_url, 403, "Forbidden", Message(), None)

    def unknown(*_, **__):
        raise OSError("nobody/nothing is not a valid model identifier\n")

    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    monkeypatch.setattr(loading, "urlopen", forbidden)
    monkeypatch.setattr(AutoConfig, "from_pretrained", unknown)
    assert (
        refusal("nobody/nothing")
        == """The model's configuration cannot be fetched.
  tried   the folder nobody/nothing: there is none
          Hugging Face id nobody/nothing, copies on this machine
          huggingface.co
  reason  nobody/nothing is not a valid model identifier
  try     check the name and the network, or give the path of a folder"""
    )


NOT_CAUSAL = {
    "encoder": (
        BertConfig(),
        "its tokens read in both directions (is_decoder is false)",
    ),
    "masked": (
        BertConfig(architectures=["BertForMaskedLM"]),
        "it was saved as BertForMaskedLM, not as BertLMHeadModel",
    ),
    "sequence to sequence": (
        T5Config(),
        "transformers has no causal language model of type t5",
    ),
    "with an encoder": (BartConfig(), "it is an encoder with a decoder"),
    "classifier": (
        LlamaConfig(architectures=["LlamaForSequenceClassification"]),
        "it was saved as LlamaForSequenceClassification, not as LlamaForCausalLM",
    ),
    "made bidirectional": (
        LlamaConfig(is_causal=False),
        "its configuration makes every token read in both directions",
    ),
}


@pytest.mark.parametrize("case", NOT_CAUSAL)
def test_a_model_that_is_not_causal_is_refused_by_its_config_alone(case, tmp_path):
    config, reason = NOT_CAUSAL[case]
    config.save_pretrained(tmp_path)
    assert (
        refusal(tmp_path)
        == f"""This model is not a causal language model.
  model  {tmp_path}
  why    {reason}
  try    a decoder such as Llama, Mistral, Qwen or Gemma"""
    )


@pytest.mark.parametrize("config", [GPT2Config(), LlamaConfig(architectures=["LlamaForCausalLM"])])
def test_a_causal_config_passes(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert type(load_config(tmp_path)) is type(config)


def test_a_config_that_is_no_json(copy):
    (copy / "config.json").write_text("{")
    text = refusal(copy)
    assert text.startswith(f"The model's configuration cannot be read.\n  model   {copy}\n  reason  ")
    assert text.endswith("\n  try     a complete checkpoint: config.json, weights and tokenizer")


def test_a_folder_without_a_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    text = refusal(copy)
    assert text.startswith(f"The model's tokenizer cannot be read.\n  model   {copy}\n  reason  ")
    assert text.endswith("\n  try     a complete checkpoint: config.json, weights and tokenizer")


@pytest.mark.parametrize("damage", [None, b"", b"no tensors"], ids=["absent", "empty", "spoiled"])
def test_weights_that_cannot_be_read(damage, copy):
    (copy / "model.safetensors").unlink()
    if damage is not None:
        (copy / "model.safetensors").write_bytes(damage)
    text = refusal(copy)
    assert text.startswith(f"The model's weights cannot be read.\n  model   {copy}\n  reason  ")
    assert text.endswith("\n  try     a complete checkpoint: config.json, weights and tokenizer")


def test_weights_that_do_not_fit_the_config(copy):
    keys = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(keys | {"intermediate_size": 40}))
    assert refusal(copy).startswith("The model's weights cannot be read.")


def test_weights_without_a_head_are_not_filled_in_at_random(copy):
    LlamaForSequenceClassification(config(pad_token_id=0)).save_pretrained(copy)
    keys = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(keys | {"architectures": ["LlamaForCausalLM"]}))
    assert (
        refusal(copy)
        == f"""The weights lack tensors that the model needs.
  model    {copy}
  missing  lm_head.weight
  try      the complete checkpoint of a causal language model"""
    )
