"""Perplexity by context length: against a plain loop over tokens, and where the segments lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import Oracle, byte_tokenizer, llama
from transformers import GPT2Config, GPT2LMHeadModel

from longspan.errors import InputError
from longspan.evaluate.perplexity import _ends, perplexity
from longspan.text.corpus import Corpus


def corpus(*lengths: int) -> Corpus:
    """Return documents of random bytes, of these many tokens with their end token."""
    rng = np.random.default_rng(0)
    return Corpus.from_ids([rng.integers(0, 256, length - 1).tolist() for length in lengths], separator=256)


def loss_by_loop(model, ids, length, stride, ends):
    """Return the mean loss of the last tokens of windows, one token at a time from one whole forward each."""
    losses = []
    for end in ends:
        window = ids[end - length : end]
        with torch.no_grad():
            logits = model(torch.tensor([window.tolist()])).logits[0].double()
        for place in range(length - stride, length):
            chances = logits[place - 1].softmax(-1)
            losses.append(-math.log(chances[window[place]]))
    return sum(losses) / len(losses)


def test_losses_equal_a_plain_loop():
    model, tokenizer, text = llama(), byte_tokenizer(), corpus(700, 150, 400)
    found = perplexity(model, tokenizer, text, lengths=[128, 31, 64], stride=24, segments=7)
    ends, crossing = _ends(text, 128, 24, 7)
    assert not crossing
    assert (found.lengths, found.stride, found.segments, found.tokens) == ((31, 64, 128), 24, 7, 168)
    for length, loss in zip(found.lengths, found.losses, strict=True):
        assert loss == pytest.approx(loss_by_loop(model, text.ids, length, 24, ends), rel=1e-5)
    assert found.values == pytest.approx([math.exp(loss) for loss in found.losses])
    # A token is a byte here, but random bytes are not UTF-8: each that is not is decoded to a mark of three.
    assert found.text_bytes >= found.tokens


def test_bits_per_byte_count_the_bytes_of_the_predicted_text():
    tokenizer = byte_tokenizer()
    text = Corpus.from_ids([tokenizer("plain letters only, " * 40)["input_ids"]], separator=256)
    found = perplexity(llama(), tokenizer, text, lengths=[64], stride=32, segments=4)
    assert found.text_bytes == found.tokens == 128
    assert found.bits_per_byte == pytest.approx([math.log2(value) for value in found.values])


def test_how_windows_share_a_forward_pass_changes_nothing(monkeypatch):
    model, tokenizer, text = llama(), byte_tokenizer(), corpus(900)
    together = perplexity(model, tokenizer, text, lengths=[64, 200], stride=32, segments=9)
    monkeypatch.setattr("longspan.evaluate.forward.TOKENS", 1)
    alone = perplexity(model, tokenizer, text, lengths=[64, 200], stride=32, segments=9)
    assert alone.losses == pytest.approx(together.losses, rel=1e-5)


def test_a_model_that_knows_every_next_token_and_one_that_knows_none():
    tokenizer, text = byte_tokenizer(), corpus(900)
    knows = perplexity(
        Oracle(lambda ids: ids.roll(-1, 1)), tokenizer, text, lengths=[64], stride=32, segments=3
    )
    fails = perplexity(
        Oracle(lambda ids: ids.roll(-1, 1) ^ 1), tokenizer, text, lengths=[64], stride=32, segments=3
    )
    # A score of 1 among 256 of 0, on the right token or on a wrong one.
    assert knows.losses == pytest.approx([math.log(math.e + 256) - 1])
    assert fails.losses == pytest.approx([math.log(math.e + 256)])


def test_segments_do_not_overlap_and_are_spread_over_long_documents():
    text = corpus(100, 1000, 250, 3000)
    ends, crossing = _ends(text, 200, 50, 12)
    assert not crossing
    assert (np.diff(ends) >= 50).all()
    borders = [*text.starts.tolist(), len(text)]
    for end in ends:
        begin = max(border for border in borders if border < end)
        assert end - 200 >= begin
    # 17, 2 and 57 places in the second, third and fourth document.
    assert [int((ends <= border).sum()) for border in borders[1:]] == [0, 3, 3, 12]


def test_without_long_documents_windows_cross_their_borders():
    text = corpus(*[90] * 20)
    ends, crossing = _ends(text, 200, 50, 12)
    assert crossing
    assert len(ends) == 12 and ends[0] >= 200 and ends[-1] <= 1800
    assert perplexity(llama(), byte_tokenizer(), text, lengths=[200], stride=50, segments=12).crossing


def test_a_short_text_gives_fewer_segments():
    ends, crossing = _ends(corpus(260), 200, 50, 12)
    assert ends.tolist() == [200, 250] and crossing


def test_windows_begin_with_what_the_tokenizer_puts_in_front():
    model = Oracle(lambda ids: ids)
    text = corpus(500)
    perplexity(model, byte_tokenizer(opening=True), text, lengths=[64], stride=32, segments=3)
    (seen,) = model.seen
    ends, _ = _ends(text, 64, 32, 3)
    assert seen[:, 0].tolist() == [256, 256, 256]
    assert np.array_equal(seen[:, 1:], np.stack([text.ids[end - 63 : end] for end in ends]))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_progress_reaches_the_end(training):
    model = llama().train(training)
    heard = []
    perplexity(
        model,
        byte_tokenizer(),
        corpus(500),
        lengths=[64, 100],
        stride=32,
        segments=3,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert model.training is training
    assert heard == [(64, 492), (128, 492), (192, 492), (292, 492), (392, 492), (492, 492)]


def test_a_length_within_the_stride_is_refused():
    with pytest.raises(InputError) as refusal:
        perplexity(llama(), byte_tokenizer(), corpus(5000), lengths=[4096, 256])
    assert str(refusal.value) == (
        "A context must be longer than the tokens it predicts.\n"
        "  asked   perplexity at 256 tokens\n"
        "  stride  the last 256 are predicted\n"
        "  try     lengths above 256, or a smaller stride"
    )


def test_a_text_shorter_than_the_longest_window_is_refused():
    with pytest.raises(InputError, match=r"a window of 4,096 tokens of held-out text\n  found  500 tokens"):
        perplexity(llama(), byte_tokenizer(), corpus(500), lengths=[512, 4096])


def test_a_length_beyond_a_table_of_positions_is_refused():
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256
        )
    )
    perplexity(model, byte_tokenizer(), corpus(500), lengths=[64], stride=32, segments=2)
    with pytest.raises(InputError) as refusal:
        perplexity(model, byte_tokenizer(), corpus(500), lengths=[65], stride=32, segments=2)
    assert str(refusal.value) == (
        "This model cannot read that many tokens.\n"
        "  asked  a window of 65 tokens\n"
        "  model  GPT2LMHeadModel has 64 positions in a table\n"
        "  try    lengths up to 64"
    )
