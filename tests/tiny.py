"""Tiny models and tokenizers, built in a moment without any file."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer(*, opening: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, with an end token, which may be put in front of texts too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|end|>"
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, end])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if opening:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, vocabulary[end])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, model_max_length=64
    )


def llama(*, vocabulary: int = 257, positions: int = 256) -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=None,
        )
    )


class Oracle:
    """A model that answers every position with a token that it is told how to choose from the whole row.

    Args:
        choose: ids `[rows, length]` to the next token after every position, `[rows, length]`.
    """

    def __init__(self, choose) -> None:
        self.choose = choose
        self.training = True
        self.device = torch.device("cpu")
        self.seen: list[torch.Tensor] = []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def __call__(self, ids: torch.Tensor, *, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert not self.training
        self.seen.append(ids)
        logits = torch.nn.functional.one_hot(self.choose(ids), 257).float()
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])
