"""The loss in chunks: the number and the gradients of the model's own, without its logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import llama
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from longspan.errors import InputError
from longspan.extend import loss as losses
from longspan.extend.adapter import adapt, causal_model

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}


def tied():
    model = llama(vocabulary=61)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def capped():
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, final_logit_softcapping=1.5, attn_implementation="eager")
    return Gemma2ForCausalLM(config)


MODELS = {
    "plain": lambda: llama(vocabulary=61),
    "tied": tied,
    "capped": capped,
    "lora": lambda: adapt(llama(vocabulary=61), rank=2, method="lora"),
    "lora+ tied": lambda: adapt(tied(), rank=2),
}


def gradients(model):
    taken = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [2, 31, 97])
def test_it_is_the_loss_of_the_model(kind, length, monkeypatch):
    model = MODELS[kind]().double().train()
    # Seven tokens at a time, which divide none of the lengths.
    monkeypatch.setattr(
        losses.chunked_loss, "__kwdefaults__", losses.chunked_loss.__kwdefaults__ | {"logits": 7 * 61}
    )
    ids = torch.randint(61, (2, length))
    labels = ids.clone()
    labels[1, : length // 2] = -100
    # The model's own loss turns its logits into float32 first.
    logits = model(input_ids=ids).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    wanted.backward()
    expected = gradients(model)
    with losses.chunked(causal_model(model)):
        answer = model(input_ids=ids, labels=labels)
        assert answer.logits is None
        answer.loss.backward()
    torch.testing.assert_close(answer.loss, wanted, rtol=1e-12, atol=0)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
    assert model(input_ids=ids, labels=labels).logits.shape == (2, length, 61)


def test_the_sum_is_divided_by_what_is_asked():
    head, hidden = torch.nn.Linear(8, 5), torch.randn(2, 7, 8)
    labels = torch.randint(5, (2, 7))
    mean = losses.chunked_loss(hidden, labels, head, logits=10)
    torch.testing.assert_close(losses.chunked_loss(hidden, labels, head, items=24, logits=10), mean / 2)


def test_logits_are_never_there_at_once():
    """What is kept for the way back is the states, not a number for every token and word."""
    head, hidden = torch.nn.Linear(16, 512), torch.randn(1, 257, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda held: kept.append(held.numel()) or held, lambda held: held
    ):
        losses.chunked_loss(hidden, torch.randint(512, (1, 257)), head, logits=32 * 512)
    assert max(kept) < 32 * 512


def test_a_loss_of_another_kind_is_refused():
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25, bos_token_id=1, eos_token_id=2))
    with pytest.raises(InputError) as refused, losses.chunked(model):
        pass
    lines = str(refused.value).splitlines()
    assert lines[0] == "The loss of this model cannot be computed in chunks."
    assert lines[1] == "  model      CohereForCausalLM" and lines[-1] == "  try        --loss whole"
    assert model(torch.arange(4)[None]).logits is not None


def test_a_loss_that_is_no_number_is_said_to_be_none():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError) as refused, losses.chunked(model):
        pass
    lines = str(refused.value).splitlines()
    assert lines[0] == "This model's loss is no number."
    assert lines[2] == "  its loss  nan on 16 tokens, before any training"


def test_weights_of_two_precisions_are_compared_as_they_are_trained():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).bfloat16()
    model.get_input_embeddings().float()
    with losses.chunked(model), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss)
