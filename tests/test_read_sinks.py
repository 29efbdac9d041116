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
from longspan.text.encoding import encode

CONTEXT = 512
# Tokens that a recomputed window predicts: each sees half as many keys as a streaming window holds, or more.
STRIDE = 256


def recomputed(model, ids):
    """Perplexity with windows of 512 tokens, each computed anew, of all tokens after the first context."""
    ends = range(CONTEXT + STRIDE, len(ids) + 1, STRIDE)
    loss = 0.0
    for end in ends:
        row = torch.from_numpy(ids[end - CONTEXT : end])[None]
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
    ids = encode(texts[:1], tokenizer).ids[: 10 * CONTEXT].astype(np.int64)
    found = {"recomputed": recomputed(model, ids)}
    for name, pattern, places in (
        ("window", SlidingWindow(CONTEXT), StreamCache),
        ("four sinks", Streaming(CONTEXT - 4, sinks=4), StreamCache),
        ("four sinks, places in the text", Streaming(CONTEXT - 4, sinks=4), PatternCache),
    ):
        set_pattern(model, pattern)
        found[name] = streamed(model, ids, places(model))
        reset(model)
    print(found)
    return found


def test_sinks_read_on_as_well_as_recomputation(perplexities):
    assert perplexities["four sinks"] < 1.05 * perplexities["recomputed"]


def test_sinks_do_no_harm_to_a_model_that_does_not_rest_on_them(perplexities):
    """Where a model rests on its first token, a window without it is a thousand times worse; this one does not."""
    assert perplexities["four sinks"] < 1.02 * perplexities["window"]
