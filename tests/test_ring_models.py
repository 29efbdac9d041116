"""Models whose texts are split among ranks give the loss, the logits and the gradients of one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from hf_models import FULL, model_of
from model_cases import equal, looped, refusals, trained, written
from ranks import together
from torch.utils.data import BatchSampler

from longspan.errors import InputError, PlanError
from longspan.hf import set_pattern, share_batches
from longspan.hf.held import HeldCache
from longspan.hf.sequence import require
from longspan.pattern import Causal


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


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_follow_the_length_are_refused(kind: str):
    model = model_of(FULL["llama"])
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0}
    with pytest.raises(InputError) as refused:
        require(model, model)
    assert str(refused.value) == (
        "This model cannot read texts that are split among ranks.\n"
        "  model  LlamaForCausalLM\n"
        "  why    its rotary positions follow the length, of which each rank sees a part\n"
        "  try    a decoder of transformers, such as Llama, Mistral, Qwen or Gemma"
    )


def test_batches_that_cannot_be_shared_are_refused():
    batches = BatchSampler(range(8), 2, drop_last=False)
    loader = SimpleNamespace(batch_sampler=BatchSamplerShard(batches, num_processes=4, process_index=2))
    said = []
    for given in (loader, SimpleNamespace(batch_sampler=batches)):
        with pytest.raises(InputError) as refused:
            share_batches(given, 3)
        said.append(str(refused.value))
    assert said == [
        "These processes cannot be given the same batches.\n"
        "  asked  share_batches(loader, 3)\n"
        "  why    there are 4 processes\n"
        "  try    a number that divides that of the processes",
        "These processes cannot be given the same batches.\n"
        "  asked  share_batches(loader, 3)\n"
        "  why    BatchSampler does not deal out whole batches to processes\n"
        "  try    a map-style dataset",
    ]


def test_a_held_cache_takes_nothing_back():
    model = model_of(FULL["llama"])
    set_pattern(model, Causal())
    with pytest.raises(PlanError) as refused:
        HeldCache(model, None).layers[0].check_crop(1)
    assert str(refused.value) == (
        "This cache cannot be read here.\n"
        "  why  tokens are taken back, whose neighbours lie on other ranks\n"
        "  try  decoding without assistance"
    )


def test_plain_training_loops_equal_one_process(tmp_path: Path):
    assert together(tmp_path, 2, looped, tmp_path) == [[]] * 2
