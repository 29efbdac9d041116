"""The search for factors: never worse than the methods it starts from, bounded, repeatable, and true of a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import llama
from transformers import LlamaForCausalLM

from longspan.errors import InputError
from longspan.extend import search as module
from longspan.extend.search import Budget, search
from longspan.frequency import Linear, LongRoPE, factors
from longspan.hf.config import extended, with_frequency

BUDGET = Budget(population=6, parents=3, mutations=3, crossovers=2, rounds=4)
LENGTH = 160


@pytest.fixture(scope="module")
def model():
    return llama(positions=32)


@pytest.fixture(scope="module")
def windows():
    return list(np.random.default_rng(1).integers(0, 257, (2, LENGTH)))


def run(model, windows, **options):
    return search(model, windows, scored=100, budget=BUDGET, **options)


@pytest.fixture(scope="module")
def found(model, windows):
    return run(model, windows)


def loss_of(model, windows):
    rows = torch.from_numpy(np.stack(windows))
    with torch.no_grad():
        logits = model.eval()(rows).logits[:, -101:-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, -100:].flatten()).item()


def test_it_ends_no_worse_than_it_begins(found):
    assert set(found.known) == {"linear", "ntk", "yarn"}
    assert found.loss <= min(found.known.values())
    assert len(set(found.known.values())) == 3


def test_it_keeps_within_its_budget(found):
    assert BUDGET.evaluations == 26
    assert 10 <= found.evaluations <= BUDGET.evaluations


def test_factors_never_fall_and_stay_in_range(found):
    assert found.frequency.short == found.frequency.long
    assert list(found.frequency.long) == sorted(found.frequency.long)
    assert found.frequency.long[0] >= 1
    assert found.frequency.long[-1] <= 1.25 * LENGTH / 32
    assert (found.frequency.original, found.frequency.factor) == (32, 5.0)


def test_the_same_seed_finds_the_same_and_tells_how_far_it_is(model, windows, found):
    told = []
    again = run(model, windows, progress=lambda done, most: told.append((done, most)))
    assert again == found
    assert told == [(done, 26) for done in range(1, found.evaluations + 1)]
    assert run(model, windows, seed=1).frequency != found.frequency


def test_a_checkpoint_with_the_factors_has_the_loss_that_was_found(model, windows, found):
    longer = LlamaForCausalLM(with_frequency(model.config, found.frequency, length=LENGTH))
    longer.load_state_dict(model.state_dict())
    assert loss_of(longer, windows) == pytest.approx(found.loss, rel=1e-6)
    linear = factors(Linear(5.0), 8)
    same = with_frequency(model.config, LongRoPE(linear, linear, original=32, factor=5.0), length=LENGTH)
    known = LlamaForCausalLM(same)
    known.load_state_dict(model.state_dict())
    assert loss_of(known, windows) == pytest.approx(found.known["linear"], rel=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(model, windows, training, monkeypatch):
    model.train(training)
    rotary = model.model.rotary_emb
    before = rotary.inv_freq
    copy = before.clone()

    def fail(*_):
        raise KeyboardInterrupt

    search(model, windows, scored=100, budget=Budget(population=3, parents=2, rounds=0))
    monkeypatch.setattr(module, "_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, windows)
    assert rotary.inv_freq is before and torch.equal(before, copy)
    assert "inv_freq" in dict(rotary.named_buffers())
    assert rotary.attention_scaling == 1.0
    assert model.training is training
    model.eval()


def test_it_finds_what_is_hidden(model, windows, monkeypatch):
    wanted = torch.tensor([1.0, 1.5, 4.5, 4.8])
    plain = model.model.rotary_emb.inv_freq

    def distance(model, rows, scored):
        return (plain / model.model.rotary_emb.inv_freq / wanted).log().abs().sum().item()

    monkeypatch.setattr(module, "_loss", distance)
    found = search(model, windows, scored=100, budget=Budget(rounds=30))
    assert found.loss < 0.2 * min(found.known.values())


def test_a_loss_that_is_no_number_never_wins(model, windows, monkeypatch):
    broken = llama(positions=32)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    assert run(broken, windows).loss == np.inf


REFUSALS = {
    "scaled": (
        lambda model, windows: run(
            LlamaForCausalLM(extended(model.config, method="yarn", length=64)), windows
        ),
        """Factors are searched for a model whose positions are not scaled yet.
  model  turns by YaRN
  try    the checkpoint before it was scaled""",
    ),
    "lengths": (
        lambda model, windows: run(model, [windows[0], windows[1][:150]]),
        """These windows do not fit the search.
  windows  2 of 150 and 160 tokens
  model    trained at 32 tokens
  scored   the last 100 tokens of each
  try      windows of one length over 100, with 1 or more tokens scored""",
    ),
    "no windows": (
        lambda model, windows: run(model, []),
        """These windows do not fit the search.
  windows  0 of no tokens
  model    trained at 32 tokens
  scored   the last 100 tokens of each
  try      windows of one length over 100, with 1 or more tokens scored""",
    ),
    "short": (
        lambda model, windows: run(model, windows, original=160),
        """These windows do not fit the search.
  windows  2 of 160 tokens
  model    trained at 160 tokens
  scored   the last 100 tokens of each
  try      windows of one length over 160, with 1 or more tokens scored""",
    ),
    "population": (
        lambda model, windows: Budget(population=2),
        """A search cannot have this budget.
  got  population=2
  try  3 or more""",
    ),
    "parents": (
        lambda model, windows: Budget(parents=17),
        """A search cannot have this budget.
  got  parents=17
  try  at most the population, which is 16""",
    ),
    "changed": (
        lambda model, windows: Budget(changed=0),
        """A search cannot have this budget.
  got  changed=0
  try  a chance over 0 and at most 1""",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case, model, windows):
    ask, text = REFUSALS[case]
    with pytest.raises(InputError) as caught:
        ask(model, windows)
    assert str(caught.value) == text


def test_a_model_that_hides_its_frequencies_is_refused(model, windows):
    hidden = llama(positions=32)
    del hidden.model.rotary_emb.attention_scaling
    with pytest.raises(InputError) as caught:
        run(hidden, windows)
    assert (
        str(caught.value)
        == """The place where this model keeps its frequencies is not known.
  model   LlamaForCausalLM
  wanted  modules with inv_freq [4] and attention_scaling
  try     a decoder of transformers, such as Llama, Mistral, Qwen or Gemma"""
    )
