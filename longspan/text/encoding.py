"""Encoding: documents into token ids, with any tokenizer, whatever their size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from longspan.text.corpus import Corpus
from longspan.text.documents import Document

# Some tokenizers slow down with the square of a text's length; in pieces of this many characters none does.
PIECE = 1 << 16


def encode(documents: Iterable[Document], tokenizer: Any) -> Corpus:
    """Encode documents to one corpus.

    Each document is closed by the tokenizer's end token, where it has one. No token is put in front: the
    models that want one find it with `opening`. Long documents are encoded in pieces cut at line ends, so at
    most a token per 65,536 characters differs from encoding the whole.

    Args:
        documents: the texts.
        tokenizer: any transformers tokenizer.

    Returns:
        The corpus, one run of ids per document.

    Example:
        >>> class Letters:
        ...     eos_token_id = 0
        ...     def __call__(self, texts, **options):
        ...         return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}
        >>> encode([Document("one", "abc"), Document("two", "d")], Letters()).ids.tolist()
        [1, 2, 3, 0, 4, 0]
    """
    return Corpus.from_ids(
        (_ids(document.text, tokenizer) for document in documents), separator=tokenizer.eos_token_id
    )


def _ids(text: str, tokenizer: Any) -> np.ndarray:
    """Return the ids of a text, int64; a tokenizer holds far more of a token than its id, so piece by piece."""
    # A warning that a text is longer than the model's context would be true of every text here.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    found = [np.asarray(tokenizer([piece], **options)["input_ids"][0], np.int64) for piece in _pieces(text)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def opening(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts in front of every text, most often one or none.

    A model trained with such a token reads badly without it, so every window of an evaluation begins with it.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for begin in range(len(marked) - len(plain) + 1):
        if marked[begin : begin + len(plain)] == plain:
            return marked[:begin]
    return []


def _pieces(text: str) -> Iterator[str]:
    """Cut a text at the last line end before each multiple of the piece size, or at it if there is none."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end
