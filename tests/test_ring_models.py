"""Models whose texts are split among ranks give the loss, the logits and the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_models import FULL, model_of
from model_cases import equal, refusals, trained, written
from ranks import together

from longspan.errors import InputError
from longspan.hf.sequence import require


@pytest.mark.parametrize("ranks", [2, 3])
def test_models_equal_one_process(ranks: int, tmp_path: Path):
    wrong = together(tmp_path, ranks, equal)
    lines = [f"rank {rank}: {line}" for rank, found in enumerate(wrong) for line in found]
    assert not lines, "\n".join(lines[:20])


def test_texts_split_among_ranks_train_beside_others(tmp_path: Path):
    """Two texts at a time, each on two ranks, with weights whole (DDP) and in shards (FSDP2)."""
    assert together(tmp_path, 4, trained) == [[]] * 4


def test_a_cache_split_among_ranks_writes_the_same_tokens(tmp_path: Path):
    assert together(tmp_path, 3, written) == [[]] * 3


def test_what_cannot_be_split_is_refused(tmp_path: Path):
    said = together(tmp_path, 3, refusals)
    assert said[0] == said[1] == said[2]
    assert said[0][0] == (
        "The ranks have been given different things.\n"
        "  different  the batch, of which every rank is given the whole\n"
        "  try        the same on all ranks that share a text; longspan.hf.share_batches(loader, ranks) sees to it"
    )
    assert "  batch   rank 0  2 x 20 tokens\n          rank 1  2 x 21 tokens\n" in said[0][1]
    assert said[0][2] == (
        "A text has to give every rank a token.\n"
        "  text    2 tokens\n"
        "  layout  zigzag, 2 tokens on 3 ranks\n"
        "  try     texts of 6 tokens or more, or fewer ranks"
    )
    assert said[0][3] == (
        "This batch cannot be split among ranks.\n"
        "  model  LlamaForCausalLM\n"
        "  why    attention_mask has shape [2, 1, 41, 41], not [rows, tokens]\n"
        "  try    input_ids, attention_mask, position_ids and labels of whole texts, use_cache=False"
    )
    assert "  why    keys of earlier tokens are given, which lie on one rank\n" in said[0][4]
    assert "  patterns  rank 0  Streaming(8) & Causal()\n            rank 1  Streaming(9)" in said[0][5]


def test_a_model_with_other_ways_between_tokens_is_refused():
    model = model_of(FULL["llama"])
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(InputError) as refused:
        require(model, model)
    assert str(refused.value) == (
        "This model cannot read texts that are split among ranks.\n"
        "  model  LlamaForCausalLM\n"
        "  why    some of its layers are of another kind: linear_attention\n"
        "  try    a decoder of transformers, such as Llama, Mistral, Qwen or Gemma"
    )
