"""Streams: places counted in the cache, against a cache that turns every key anew for every query."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from apart import recomputing
from hf_models import FULL, WINDOW, WINDOWED, model_of, tokens
from transformers import DynamicCache

from longspan import Causal, LongMixed, SlidingWindow, Streaming
from longspan.cache import Cache
from longspan.errors import InputError, PatternError, PlanError
from longspan.evaluate.stream import Stream
from longspan.frequency import Plain
from longspan.hf import set_pattern, stream
from longspan.hf.cache import PatternCache
from longspan.hf.stream import StreamCache
from longspan.rope import rotation

LENGTH = 60
WIDTH = 8


def in_pieces(model, cache, ids, sizes):
    pieces, begin = [], 0
    with torch.no_grad(), cache:
        for size in sizes:
            pieces.append(model(ids[:, begin : begin + size], past_key_values=cache).logits)
            begin += size
    assert begin == ids.shape[1]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(
    "pattern",
    [Streaming(6, sinks=2), Streaming(1, sinks=3), Streaming(3, sinks=13), Streaming(70), SlidingWindow(7)],
)
@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [60], [31, 2, 1, 26], [3, 7, 50]], ids=["ones", "whole", "mixed", "few"]
)
@pytest.mark.parametrize("least", [2, 64])
def test_every_query_reads_at_places_of_its_own(pattern, sizes, least, monkeypatch):
    # The base of positions moves along many times, or never.
    monkeypatch.setattr(stream, "_LEAST", least)
    model, ids = model_of(FULL["llama"]), tokens(2, LENGTH)
    set_pattern(model, pattern)
    found = in_pieces(model, StreamCache(model), ids, sizes)
    with torch.no_grad():
        wanted = recomputing(model, pattern, torch.ones_like(ids).bool())(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_it_is_what_the_cache_below_does_token_by_token():
    """`Cache(places="cache")` holds keys unturned too, and turns all of them for every query."""
    pattern, heads = Streaming(6, sinks=2), 4

    def turn(tensor, places, length):
        return rotation(places, Plain(), width=WIDTH).turn(tensor)

    model, ids = model_of(FULL["llama"], num_hidden_layers=1), tokens(1, LENGTH)
    set_pattern(model, pattern)
    layer = model.model.layers[0]
    below = Cache(pattern, heads=heads, key_heads=2, rotate=turn, places="cache", block=1)
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(ids))
        query, key, value = (
            side(hidden).view(1, LENGTH, -1, WIDTH).transpose(1, 2)
            for side in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        wanted = layer.self_attn.o_proj(below.attend(query, key, value).transpose(1, 2).flatten(2))
    seen = []
    hook = layer.self_attn.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    in_pieces(model, StreamCache(model), ids, [60])
    hook.remove()
    torch.testing.assert_close(seen[-1], wanted, rtol=1e-5, atol=1e-5)


def test_a_window_is_that_of_the_text():
    """Without sinks all distances are those of the text, so the model itself is the reference."""
    for config in (FULL["llama"], FULL["qwen3"], WINDOWED["mistral"]):
        model, ids = model_of(config), tokens(2, LENGTH)
        set_pattern(model, SlidingWindow(9))
        found = in_pieces(model, StreamCache(model), ids, [20, 1, 39])
        with torch.no_grad():
            torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=2e-5, atol=2e-5)


def test_a_window_of_the_model_s_own_takes_the_sinks_away():
    model = model_of(WINDOWED["mistral"])
    set_pattern(model, Streaming(20, sinks=2))
    cache = StreamCache(model)
    in_pieces(model, cache, tokens(1, LENGTH), [LENGTH])
    assert {(layer.kept.window, layer.kept.sinks) for layer in cache.layers} == {(WINDOW, 0)}
    set_pattern(model, Streaming(4, sinks=2))
    with pytest.raises(PatternError, match="Places in the cache"):
        StreamCache(model)


def test_bytes_are_constant_once_the_window_is_full():
    model, ids = model_of(FULL["llama"], dtype=torch.float32), tokens(1, 200)[0].numpy()
    set_pattern(model, Streaming(20, sinks=4))
    cache = StreamCache(model)
    with cache:
        found = Stream(model, cache).read(ids, chunk=9, checkpoints=10)
    # Three layers, two key heads, keys and values of eight float32 numbers, the sinks' keys twice more.
    assert {at.cache_bytes for at in found} == {3 * 2 * 2 * WIDTH * 4 * (20 + 4 + 4)}
    assert found[-1].tokens == 200


@pytest.mark.parametrize("chunk", [7, 1000])
def test_losses_do_not_depend_on_pieces(chunk):
    model, ids = model_of(FULL["llama"]), tokens(1, 100)
    set_pattern(model, LongMixed(8))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0]
    each = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    reader = Stream(model, PatternCache(model))
    found = reader.read(ids[0].numpy(), chunk=chunk, checkpoints=4)
    begin = 0
    for at in found:
        end = min(at.tokens, 99)
        assert at.loss == pytest.approx(float(each[:end].mean()), rel=1e-5)
        assert at.recent == pytest.approx(float(each[begin:end].mean()), rel=1e-5)
        assert at.perplexity == math.exp(at.loss)
        begin = end
    assert reader.write([], budget=1) == [int(logits[-1].argmax())]


def test_what_is_written_is_what_generate_writes():
    model, ids = model_of(FULL["llama"], dtype=torch.float32), tokens(1, LENGTH)
    set_pattern(model, Streaming(6, sinks=2))
    options = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids)}
    with StreamCache(model) as cache:
        wanted = model.generate(ids, past_key_values=cache, **options)[0, LENGTH:].tolist()
    with StreamCache(model) as cache:
        reader = Stream(model, cache)
        reader.read(ids[0, :50].numpy(), chunk=9)
        written = reader.write(ids[0, 50:].tolist(), budget=12)
        assert written == wanted
    with StreamCache(model) as cache:
        reader = Stream(model, cache)
        reader.read(ids[0].numpy())
        assert reader.write([], budget=12, ends=[wanted[3]]) == wanted[: wanted.index(wanted[3])]


def test_misuse_is_refused():
    model, ids = model_of(FULL["llama"]), tokens(2, 9)
    with pytest.raises(PatternError, match="no patterns"):
        StreamCache(model)
    set_pattern(model, LongMixed(8))
    with pytest.raises(PatternError, match="Places in the cache are counted for a window"):
        StreamCache(model)
    set_pattern(model, Streaming(6, sinks=2))
    cache = StreamCache(model)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with pytest.raises(PlanError, match="turned to places in the text"):
            model(ids, past_key_values=cache)
        cache.reset()
        with cache:
            for other in (None, DynamicCache(config=model.config), PatternCache(model)):
                with pytest.raises(PlanError, match="reads through its StreamCache alone"):
                    model(ids, past_key_values=other)
        # Afterwards the model is as it was.
        assert model(ids, use_cache=False).logits.equal(wanted)


def test_positions_of_another_kind_are_refused():
    model = model_of(FULL["gpt2"])
    set_pattern(model, Streaming(6, sinks=2))
    with pytest.raises(InputError):
        StreamCache(model)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = model_of(FULL["llama"], rope_parameters=rope)
    set_pattern(model, Streaming(6, sinks=2))
    with pytest.raises(InputError, match="vary with the length"):
        StreamCache(model)


def test_neighbours_turned_in_pairs_are_found_out(monkeypatch):
    """A model that pairs numbers otherwise is told by what it computes."""
    import transformers.models.llama.modeling_llama as llama

    def rotate_half(tensor):
        return torch.stack((-tensor[..., 1::2], tensor[..., ::2]), dim=-1).flatten(-2)

    monkeypatch.setattr(llama, "rotate_half", rotate_half)
    model = model_of(FULL["llama"])
    set_pattern(model, Streaming(16, sinks=2))
    with pytest.raises(InputError, match="logits that differ"):
        StreamCache(model)


@pytest.mark.parametrize(("length", "options"), [(1, {}), (9, {"chunk": 0}), (9, {"checkpoints": 0})])
def test_bad_sizes_are_refused(length, options):
    model = model_of(FULL["llama"])
    set_pattern(model, Causal())
    with pytest.raises(InputError, match="read in pieces"):
        Stream(model, PatternCache(model)).read(np.ones(length, dtype=np.int64), **options)
    with pytest.raises(InputError, match="nothing to write after"):
        Stream(model, PatternCache(model)).write([], budget=3)
