"""Caches of a fixed size: `generate` chooses the tokens that it chooses when everything is computed anew at every step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hf_models import FAMILIES, FULL, WINDOW, WINDOWED, model_of, padding, real_logits, tokens
from transformers import CompileConfig, StaticCache

from longspan.errors import ShapeError
from longspan.hf import segment
from longspan.hf.attention import set_pattern
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    BigBird,
    Causal,
    Chunk,
    Dilated,
    Fixed,
    Longformer,
    LongMixed,
    LongNet,
    PerHead,
    SlidingWindow,
    Streaming,
    Strided,
    Window,
)

LENGTH, NEW = 21, 10
STATIC = {"cache_implementation": "static"}
PATTERNS = [
    Causal(),
    SlidingWindow(5),
    Streaming(6, sinks=2),
    Causal() & Dilated(3),
    LongNet((4, 12), (1, 2)),
    S2(8),
    SCCA(7),
    SCCA(5, flow=4),
    SDA(),
    LongMixed(8),
    Strided(4),
    Fixed(5),
    BigBird(4, random=1),
    Longformer(4, dilation=2),
    (Causal() & Window(3)) + Chunk(7),
    PerHead([SlidingWindow(5), Causal()]),
]


@pytest.fixture(autouse=True)
def recomputed_by_definition(monkeypatch):
    """Every step has a new length: plans would cost more than they save, and the definition is one."""
    monkeypatch.setattr(segment, "attend", partial(segment.attend, kernel="reference"))


def generated(model, ids, mask=None, **options):
    torch.manual_seed(5)
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["none", "left"])
# Windows of models are passed by the prompt, or in the middle of what is written.
@pytest.mark.parametrize("length", [LENGTH, WINDOW - 3])
def test_greedy_tokens_are_those_of_recomputing(family, kind, length):
    model = model_of(FAMILIES[family], dtype=torch.float32)
    set_pattern(model, [Streaming(6, sinks=2), LongMixed(8), Causal()])
    ids, mask = tokens(2, length), padding(kind, 2, length)
    wanted = generated(model, ids, mask, use_cache=False)
    assert generated(model, ids, mask, **STATIC).equal(wanted)
    # More room than is ever filled.
    roomy = StaticCache(model.config, max_cache_len=3 * LENGTH)
    assert generated(model, ids, mask, past_key_values=roomy).equal(wanted)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_and_way_of_choosing(pattern):
    model = model_of(FULL["llama"], dtype=torch.float32)
    set_pattern(model, pattern)
    ids, mask = tokens(3, LENGTH), padding("left", 3, LENGTH)
    for options in ({}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}):
        found = generated(model, ids, mask, **STATIC, **options)
        assert found.equal(generated(model, ids, mask, use_cache=False, **options))


@pytest.mark.parametrize("config", [FULL["llama"], WINDOWED["mistral"]], ids=["llama", "mistral"])
def test_a_second_text_in_the_room_of_the_first_and_a_second_turn(config):
    model = model_of(config, dtype=torch.float32)
    set_pattern(model, Streaming(6, sinks=2))
    for ids in (tokens(2, LENGTH), tokens(2, 9).flip(1)):
        # The model keeps its cache, and uses it again.
        assert generated(model, ids, **STATIC).equal(generated(model, ids, use_cache=False))
    cache = StaticCache(model.config, max_cache_len=64)
    text = generated(model, tokens(1, 5), past_key_values=cache)
    text = torch.cat([text, tokens(1, 7)], dim=1)
    assert generated(model, text, past_key_values=cache).equal(generated(model, text, use_cache=False))


@pytest.mark.parametrize(
    ("family", "kind"),
    # A window that rolls by columns is refused beside padding between tokens.
    [
        *((family, kind) for family in ("llama", "gpt2") for kind in ("none", "left", "holes")),
        ("mistral", "none"),
        ("mistral", "left"),
    ],
)
def test_logits_read_in_pieces_are_those_of_the_whole(family, kind):
    model = model_of(FAMILIES[family])
    set_pattern(model, [LongMixed(8), Streaming(6, sinks=2), Causal()])
    length = LENGTH + 8
    ids, mask = tokens(3, length), padding(kind, 3, length)
    mask = torch.ones_like(ids) if mask is None else mask
    cache, pieces, begin = StaticCache(model.config, max_cache_len=length), [], 0
    with torch.no_grad():
        wanted = real_logits(model, ids, mask, use_cache=False)
        for size in (3, 10, 6, 1, 1, 7, 1):
            piece = slice(begin, begin + size)
            here = mask[:, : piece.stop]
            pieces.append(model(ids[:, piece], attention_mask=here, past_key_values=cache).logits)
            begin += size
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], wanted)


@pytest.mark.parametrize("config", [FULL["llama"], WINDOWED["mistral"]], ids=["llama", "mistral"])
def test_generate_compiles_the_model_as_it_does_on_other_devices(config):
    model = model_of(config, dtype=torch.float32)
    set_pattern(model, [Streaming(6, sinks=2), Causal(), SlidingWindow(4)])
    ids, mask = tokens(2, LENGTH), padding("left", 2, LENGTH)
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    found = generated(model, ids, mask, compile_config=compiled, **STATIC)
    assert found.equal(generated(model, ids, mask, use_cache=False))
    torch._dynamo.reset()


def test_more_tokens_than_there_is_room_for():
    model = model_of(FULL["llama"], dtype=torch.float32)
    set_pattern(model, Causal())
    cache = StaticCache(model.config, max_cache_len=6)
    with torch.no_grad():
        model(tokens(1, 4), past_key_values=cache)
        with pytest.raises(ShapeError) as caught:
            model(tokens(1, 3), past_key_values=cache)
    assert (
        str(caught.value)
        == """This batch cannot be read by a pattern.
  model  llama
  why    its cache has room for 6 keys, and there are 7 tokens
  try    a larger cache, or one that grows, past_key_values=DynamicCache()"""
    )
