"""Encoding: the same ids whatever the size of the pieces, and what tokenizers put in front."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from tiny import byte_tokenizer

from longspan.errors import InputError
from longspan.text import encoding
from longspan.text.corpus import Corpus
from longspan.text.documents import Document
from longspan.text.encoding import encode, opening


def test_documents_become_one_run_of_ids_each_closed_by_the_end_token():
    tokenizer = byte_tokenizer()
    corpus = encode([Document("a", "one"), Document("b", "zwölf")], tokenizer)
    assert tokenizer.decode(corpus.ids.tolist()) == "one<|end|>zwölf<|end|>"
    assert corpus.starts.tolist() == [0, 4]


@pytest.mark.parametrize(
    "text", ["a line\n" * 40, "no line end " * 30, "\n" * 100, "end at the piece\n" + "x" * 100]
)
def test_pieces_change_nothing(text, monkeypatch):
    tokenizer = byte_tokenizer()
    whole = encode([Document("a", text)], tokenizer)
    monkeypatch.setattr(encoding, "PIECE", 17)
    assert np.array_equal(encode([Document("a", text)], tokenizer).ids, whole.ids)
    assert "".join(encoding._pieces(text)) == text


def test_texts_longer_than_the_model_are_encoded_without_a_warning():
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        encode([Document("a", "text " * 100)], byte_tokenizer())
    finally:
        logger.removeHandler(handler)
    assert heard == []


def test_a_tokenizer_without_an_end_token_leaves_documents_unclosed():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    corpus = encode([Document("a", "one"), Document("b", "two")], tokenizer)
    assert tokenizer.decode(corpus.ids.tolist()) == "onetwo"


def test_the_opening_is_what_the_tokenizer_puts_in_front():
    assert opening(byte_tokenizer()) == []
    assert opening(byte_tokenizer(opening=True)) == [256]


def test_too_little_text_for_one_window_is_refused():
    corpus = Corpus.from_ids([[1] * 1499], separator=0)
    corpus.require(1500, name="held-out text")
    with pytest.raises(InputError) as refusal:
        corpus.require(4096, name="held-out text")
    assert str(refusal.value) == (
        "There is too little text for one window.\n"
        "  asked  a window of 4,096 tokens of held-out text\n"
        "  found  1,500 tokens\n"
        "  try    a longer text, or a shorter length"
    )
