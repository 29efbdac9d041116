"""What a pattern cannot stand for in a model is refused, in words."""

from __future__ import annotations

import pytest
import torch
from hf_models import FULL, WINDOWED, model_of, tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
)
from transformers.masking_utils import create_causal_mask

from longspan.errors import InputError, PatternError, PlanError, ShapeError
from longspan.hf.attention import reset, set_pattern
from longspan.pattern import Causal, Window

SHAPE = {
    key: value
    for key, value in FULL["qwen3"].to_dict().items()
    if key.split("_")[0] in ("vocab", "hidden", "intermediate", "num", "head", "pad", "bos", "eos")
    and key != "hidden_act"
}


@pytest.fixture
def llama():
    return with_pattern(FULL["llama"])


def with_pattern(config, **changes):
    model = model_of(config, dtype=torch.float32, **changes)
    set_pattern(model, Causal())
    return model


def built(config):
    """A model of a kind that transformers gives no sdpa attention."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    set_pattern(model, Causal())
    return model


def refused(error, call, *arguments, **options):
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("given", ["Causal()", None, [Causal(), "Causal()", Causal()]], ids=str)
def test_what_is_not_a_pattern(given):
    text = refused(PatternError, set_pattern, model_of(FULL["llama"]), given)
    assert (
        text
        == f"""A model reads by a pattern, or by a sequence of patterns.
  got  {given!r}
  try  Causal() & Window(512), or a list with one pattern for each layer"""
    )


def test_a_sequence_that_is_not_one_per_layer():
    text = refused(PatternError, set_pattern, model_of(FULL["llama"]), [Causal(), Window(4)])
    assert (
        text
        == """A sequence of patterns needs one for each attention layer.
  got    2 patterns
  model  3 attention layers
  try    a sequence of 3, or one pattern for all of them"""
    )


def test_a_refused_pattern_changes_nothing():
    model = model_of(FULL["llama"])
    refused(PatternError, set_pattern, model, [Causal()])
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "longspan") for module in model.modules())


def test_a_model_without_causal_attention():
    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    both_ways = GemmaConfig(**SHAPE, use_bidirectional_attention=True)
    for model, name in [
        (bert, "BertModel"),
        (nn.Linear(2, 2), "Linear"),
        (model_of(both_ways), "GemmaForCausalLM"),
    ]:
        text = refused(InputError, set_pattern, model, Causal())
        assert text.startswith(
            f"This model has no causal attention that a pattern could be set on.\n  model  {name}\n  found  "
        )
        assert text.endswith("\n  try    a decoder of transformers, such as Llama, Mistral, Qwen or Gemma")


def test_a_model_with_an_attention_of_its_own():
    model = model_of(FULL["llama"])
    type(model.model)._can_set_attn_implementation_cached_value = False
    type(model)._can_set_attn_implementation_cached_value = False
    try:
        text = refused(InputError, set_pattern, model, Causal())
    finally:
        del type(model.model)._can_set_attn_implementation_cached_value
        del type(model)._can_set_attn_implementation_cached_value
    assert (
        text
        == """This model does not look its attention up in transformers' registry.
  model  LlamaForCausalLM
  why    its forward holds an attention of its own
  try    a decoder of transformers, such as Llama, Mistral, Qwen or Gemma"""
    )


def test_the_name_without_a_pattern():
    model = model_of(FULL["llama"])
    model.set_attn_implementation("longspan")
    assert (
        refused(PlanError, model, tokens(1, 4))
        == """This layer has no pattern to read by.
  layer  0, LlamaAttention
  why    attn_implementation="longspan" was set without a pattern
  try    set_pattern(model, Causal())"""
    )


def test_a_name_set_by_hand_is_no_attention_to_go_back_to():
    model = model_of(FULL["llama"])
    model.set_attn_implementation("longspan")
    set_pattern(model, Causal())
    reset(model)
    assert model.config._attn_implementation == "sdpa"


def layer_refusal(layer, *reasons, fix):
    lines = "\n         ".join(reasons)
    return f"A pattern cannot stand for this layer.\n  layer  0, {layer}\n  why    {lines}\n  try    {fix}"


BACK = "reset(model), which goes back to the attention that the model had before"


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SHAPE, attn_logit_softcapping=2.0, sliding_window=4),
        GptOssConfig(**SHAPE, num_local_experts=4, sliding_window=4),
    ],
    ids=["capped scores", "learned sinks"],
)
def test_scores_that_models_change_are_taken_on(config):
    """What used to be refused: output and gradients are those of transformers' own attention."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, sinks in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(sinks)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0

    def graded():
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        wanted = [weight for weight in model.parameters() if weight.requires_grad]
        return logits, *torch.autograd.grad(logits.square().mean(), wanted, allow_unused=True)

    before = graded()
    set_pattern(model, Causal())
    for one, other in zip(graded(), before, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_in_training_only():
    model = with_pattern(FULL["llama"], attention_dropout=0.1)
    model(tokens(1, 4))
    assert refused(PlanError, model.train(), tokens(1, 4)) == layer_refusal(
        "LlamaAttention",
        "its weights are dropped at random (attention dropout 0.1), which is not supported",
        fix="load the model with attention_dropout=0.0, or model.eval()",
    )


def test_attention_weights(llama):
    assert refused(PlanError, llama, tokens(1, 4), output_attentions=True) == layer_refusal(
        "LlamaAttention",
        "attention weights are asked for, and are never held as a whole",
        fix="output_attentions=False",
    )


def batch_refusal(reason, *, fix, model="llama"):
    return f"This batch cannot be read by a pattern.\n  model  {model}\n  why    {reason}\n  try    {fix}"


GROWING = "past_key_values=DynamicCache()"


def test_a_mask_of_four_dimensions(llama):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert refused(ShapeError, llama, tokens(1, 4), attention_mask=mask) == batch_refusal(
        "a mask of its own came with it (Tensor [1, 1, 4, 4]), whose holes a pattern cannot see",
        fix="a mask [batch, tokens] for padding; what else shall not be read belongs into the pattern",
    )


def test_a_mask_that_does_not_cover_the_tokens(llama):
    cache = llama(tokens(2, 5)).past_key_values
    mask = torch.ones(2, 3, dtype=torch.long)
    assert refused(
        ShapeError, llama, tokens(2, 3), attention_mask=mask, past_key_values=cache
    ) == batch_refusal(
        "the mask has shape [2, 3], and there are 2 rows of 8 tokens",
        fix="a mask [batch, tokens] that covers the tokens in the cache and the new ones",
    )


def test_a_mask_with_a_rule_of_its_own(llama):
    def nowhere(batch, head, q, k):
        return q < k

    options = {"config": llama.config, "inputs_embeds": torch.zeros(1, 4, 32), "attention_mask": None}
    assert refused(
        ShapeError, create_causal_mask, **options, past_key_values=None, and_mask_function=nowhere
    ) == batch_refusal("it joins a rule of its own to the causal mask", fix="input that is text alone")


def test_blocks_that_read_forward(llama):
    options = {"config": llama.config, "inputs_embeds": torch.zeros(1, 4, 32), "attention_mask": None}
    blocks = torch.tensor([[-1, 0, 0, -1]])
    assert refused(
        ShapeError, create_causal_mask, **options, past_key_values=None, block_sequence_ids=blocks
    ) == batch_refusal("some of its tokens read later ones", fix="input that is text alone")


def test_a_model_made_bidirectional_by_its_config():
    model = with_pattern(FULL["llama"], is_causal=False)
    assert refused(ShapeError, model, tokens(1, 4)) == batch_refusal(
        "its attention is not causal", fix="a causal decoder"
    )


def test_attention_in_chunks():
    config = Llama4TextConfig(**SHAPE, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=8)
    assert refused(ShapeError, built(config), tokens(1, 6)) == batch_refusal(
        "its layers read in chunks of 4 tokens, which are not supported yet",
        fix="a model with full attention or a sliding window",
        model="llama4_text",
    )


def test_a_cache_that_drops_keys_of_a_model_without_windows():
    model = with_pattern(LlamaConfig(**FULL["llama"].to_dict() | {"sliding_window": 4}))
    cache = model(tokens(1, 9)).past_key_values
    assert refused(ShapeError, model, tokens(1, 1), past_key_values=cache) == batch_refusal(
        "its cache dropped the first 6 keys, and no window says that they are not read",
        fix=f"a cache that keeps them, {GROWING}",
    )
    model(tokens(1, 10), past_key_values=DynamicCache())


def test_a_cache_that_drops_keys_beside_padding_between_tokens():
    model = with_pattern(WINDOWED["mistral"])
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, 17] = 0
    cache = model(tokens(2, 20), attention_mask=mask[:, :20]).past_key_values
    assert refused(
        ShapeError, model, tokens(2, 1), attention_mask=mask, past_key_values=cache
    ) == batch_refusal(
        "row 1 has padding between its tokens, and its cache has dropped keys that the window still reads",
        fix=f"padding on the left, or a cache that keeps all keys, {GROWING}",
        model="mistral",
    )


def test_a_cache_that_hands_over_more_than_it_announced():
    # transformers' sliding layers keep everything at a window of 1, and announce that they keep nothing.
    model = with_pattern(WINDOWED["mistral"], sliding_window=1)
    cache = model(tokens(1, 5)).past_key_values
    assert refused(ShapeError, model, tokens(1, 1), past_key_values=cache) == batch_refusal(
        "its cache announced 1 keys and handed over 6",
        fix=f"a cache that keeps all keys, {GROWING}",
        model="mistral",
    )


def test_packed_documents_behind_a_cache(llama):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert refused(ShapeError, llama, tokens(1, 5), position_ids=positions, use_cache=True) == batch_refusal(
        "its positions restart, as in packed documents, while a cache hides where they end",
        fix="use_cache=False, which lets every document attend alone; or an attention_mask of ones",
    )
    skipped = torch.tensor([[0, 1, 2, 70, 71]])
    llama(tokens(1, 5), position_ids=skipped, attention_mask=torch.ones(1, 5), use_cache=True)
