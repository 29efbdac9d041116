"""Passkey retrieval: models that always, never or sometimes know the key, and what greedy decoding writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import Oracle, byte_tokenizer, llama

from longspan.errors import InputError
from longspan.evaluate.passkey import passkey
from longspan.text.corpus import Corpus
from longspan.text.passkey import passkey_prompt, shortest

TOKENIZER = byte_tokenizer()
TEXT = Corpus.from_ids([TOKENIZER("some text to hide keys in, " * 200)["input_ids"]], separator=256)


def knows(ids):
    return ids.roll(-1, 1)


def test_a_model_that_always_knows_the_key_and_one_that_never_does():
    options = {"lengths": [400, 256], "depths": [1, 0, 0.5], "trials": 3}
    always = passkey(Oracle(knows), TOKENIZER, TEXT, **options)
    assert (always.lengths, always.depths) == ((256, 400), (0, 0.5, 1))
    assert always.shares == ((1.0,) * 3,) * 2
    assert always.by_length == (1.0, 1.0)
    never = passkey(Oracle(lambda ids: knows(ids) ^ 1), TOKENIZER, TEXT, **options)
    assert never.shares == ((0.0,) * 3,) * 2


@pytest.mark.parametrize("digit", range(5))
def test_one_wrong_digit_is_a_wrong_answer(digit):
    def slips(ids):
        guess = knows(ids)
        guess[:, digit - 6] ^= 1
        return guess

    assert passkey(Oracle(slips), TOKENIZER, TEXT, lengths=[256], depths=[0.5], trials=4).shares == ((0.0,),)


def test_what_comes_before_the_answer_does_not_count():
    def only_the_answer(ids):
        guess = torch.zeros_like(ids)
        guess[:, -7:-1] = ids[:, -6:]
        return guess

    assert passkey(Oracle(only_the_answer), TOKENIZER, TEXT, lengths=[256], depths=[0.5]).shares == ((1.0,),)


def test_shares_belong_to_their_length_and_depth():
    """A model that finds the key only within 200 tokens of the end."""

    def near(ids):
        guess = knows(ids)
        for row, tokens in enumerate(ids.tolist()):
            if "The pass key is" not in TOKENIZER.decode(tokens[-200:-60]):
                guess[row] = 0
        return guess

    found = passkey(Oracle(near), TOKENIZER, TEXT, lengths=[512, 200], depths=[0, 1], trials=2)
    assert found.shares == ((1.0, 1.0), (0.0, 1.0))
    assert found.by_length == (1.0, 0.5)


def test_the_judgement_equals_greedy_decoding():
    """A model whose next digit depends on what it has read, right or wrong: decoded token by token."""
    rng = np.random.default_rng(0)
    luck = torch.from_numpy(rng.random((257, 257)) < 0.75)

    def sometimes(ids):
        guess = knows(ids)
        return torch.where(luck[ids, guess], guess, guess ^ 1)

    model = Oracle(sometimes)
    found = passkey(model, TOKENIZER, TEXT, lengths=[256], depths=[0, 1], trials=20)
    right = []
    for row in torch.cat(model.seen):
        written = row[:-6]
        for token in row[-6:]:
            # The oracle reads the answer off the row, so it is shown the true next token after what was written.
            written = torch.cat([written, sometimes(torch.cat([written, token[None]])[None])[0, -2:-1]])
        right.append(bool((written == row).all()))
    assert 0 < sum(right) < 40
    assert found.by_length[0] == pytest.approx(sum(right) / 40)


def test_prompts_do_not_depend_on_the_other_lengths_and_follow_the_seed():
    def seen(**options):
        model = Oracle(knows)
        passkey(model, TOKENIZER, TEXT, depths=[0.5], trials=2, **options)
        return model.seen

    assert torch.equal(seen(lengths=[300])[0], seen(lengths=[256, 300])[1])
    assert torch.equal(seen(lengths=[300])[0], seen(lengths=[300], seed=0)[0])
    assert not torch.equal(seen(lengths=[300])[0], seen(lengths=[300], seed=1)[0])


def test_prompts_begin_with_what_the_tokenizer_puts_in_front():
    model = Oracle(knows)
    passkey(model, byte_tokenizer(opening=True), TEXT, lengths=[300], depths=[0.5], trials=2)
    assert model.seen[0].shape == (2, 300)
    assert model.seen[0][:, 0].tolist() == [256, 256]


def test_progress_reaches_the_end_and_the_model_is_left_in_its_mode():
    model = llama(positions=512).train()
    heard = []
    passkey(
        model,
        TOKENIZER,
        TEXT,
        lengths=[200, 300],
        depths=[0],
        trials=2,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert model.training
    assert heard == [(200, 1000), (400, 1000), (700, 1000), (1000, 1000)]


def test_the_shortest_prompt_has_room_for_key_and_question():
    least = shortest(TOKENIZER)
    assert (
        len(passkey_prompt(TOKENIZER, TEXT, length=least, depth=0, rng=np.random.default_rng(0)).ids) == least
    )
    with pytest.raises(InputError) as refusal:
        passkey(Oracle(knows), TOKENIZER, TEXT, lengths=[64, 512])
    assert str(refusal.value) == (
        "A length is too short for a passkey prompt.\n"
        "  asked  a prompt of 64 tokens\n"
        f"  needs  {least} tokens for key and question\n"
        f"  try    lengths of {least} or more"
    )


def test_a_text_shorter_than_the_longest_prompt_is_refused():
    with pytest.raises(InputError, match=r"There is too little text for one window\."):
        passkey(Oracle(knows), TOKENIZER, TEXT, lengths=[8192])
