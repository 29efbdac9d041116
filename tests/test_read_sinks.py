"""The table of StreamingLLM in small: windows with and without sinks against recomputation, ten contexts long."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longspan import SlidingWindow, Streaming
from longspan.evaluate.stream import Stream
from longspan.hf import load_model, reset, set_pattern
from longspan.hf.cache import PatternCache
from longspan.hf.stream import StreamCache
from longspan.text.documents import standard_library
from longspan.text.encoding import encode, opening

CONTEXT = 512
SINKS = 4
# Tokens that a recomputed window predicts: each sees half as many keys as a streaming window holds, or more.
STRIDE = 256


def recomputed(model, ids):
    """Perplexity with the first four tokens and the last 508, each window computed anew, after the first context."""
    ends = range(CONTEXT + STRIDE, len(ids) + 1, STRIDE)
    loss = 0.0
    for end in ends:
        row = torch.from_numpy(np.concatenate([ids[:SINKS], ids[end - CONTEXT + SINKS : end]]))[None]
        with torch.no_grad():
            logits = model(row, use_cache=False).logits[0, -STRIDE - 1 : -1]
        loss += F.cross_entropy(logits, row[0, -STRIDE:], reduction="sum").item()
    return math.exp(loss / (len(ends) * STRIDE))


def streamed(model, ids, cache):
    """Perplexity of the same tokens, read in one go."""
    with cache if isinstance(cache, StreamCache) else torch.no_grad():
        found = Stream(model, cache).read(ids, chunk=CONTEXT, checkpoints=len(ids) // CONTEXT)
    assert {at.cache_bytes for at in found[1:]} == {cache.nbytes}
    first, last = found[0], found[-1]
    # The last token guesses none.
    return math.exp((last.loss * (len(ids) - 1) - first.loss * CONTEXT) / (len(ids) - 1 - CONTEXT))


@pytest.fixture(scope="module")
def perplexities():
    model, tokenizer = load_model()
    texts = [document for document in standard_library() if len(document.text) > 12 * CONTEXT]
    text = encode(texts[:1], tokenizer).ids
    ids = np.concatenate([opening(tokenizer), text])[: 10 * CONTEXT].astype(np.int64)
    found = {"recomputed": recomputed(model, ids)}
    for name, pattern, places in (
        ("window", SlidingWindow(CONTEXT), StreamCache),
        ("four sinks", Streaming(CONTEXT - SINKS, sinks=SINKS), StreamCache),
        ("four sinks, places in the text", Streaming(CONTEXT - SINKS, sinks=SINKS), PatternCache),
    ):
        set_pattern(model, pattern)
        found[name] = streamed(model, ids, places(model))
        reset(model)
    print(found)
    return found


def test_sinks_read_on_as_well_as_recomputation(perplexities):
    assert perplexities["four sinks"] < 1.05 * perplexities["recomputed"]


def test_a_window_without_sinks_fails(perplexities):
    """The default model rests on its first token, as large models do, and loses its hold without it."""
    assert perplexities["window"] > 2 * perplexities["four sinks"]


def test_sinks_alone_do_not_make_a_model_read_further(perplexities):
    """With places in the text the first token is soon further away than any that the model was trained at."""
    assert perplexities["four sinks, places in the text"] > 1.5 * perplexities["four sinks"]
