"""With a PatternCache a model generates what it generates when everything is computed anew at every step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hf_models import FAMILIES, FULL, GEMMA2, WINDOW, model_of, padding, real_logits, tokens
from transformers import DynamicCache

from longspan.errors import LongspanError, PatternError, PlanError, ShapeError
from longspan.hf import segment
from longspan.hf.attention import reset, set_pattern
from longspan.hf.cache import PatternCache, pool_for
from longspan.pattern import Causal, Chunk, LongMixed, PerHead, SlidingWindow, Streaming, Window

LENGTH, NEW = 21, 8
PATTERNS = [
    Causal(),
    Streaming(6, sinks=2),
    LongMixed(8),
    (Causal() & Window(3)) + Chunk(7),
    PerHead([SlidingWindow(5), Causal()]),
]
QUIET = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}


@pytest.fixture(autouse=True)
def recomputed_by_definition(monkeypatch):
    """Recomputing has a new length at every step: plans would cost more than they save, and the definition is one."""
    monkeypatch.setattr(segment, "attend", partial(segment.attend, kernel="reference"))


def generated(model, ids, mask, **options):
    torch.manual_seed(5)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **QUIET | options
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["none", "left"])
def test_greedy_tokens_are_those_of_recomputing(family, kind):
    model = model_of(FAMILIES[family], dtype=torch.float32)
    ids, mask = tokens(3, LENGTH), padding(kind, 3, LENGTH)
    set_pattern(model, [PATTERNS[1], PATTERNS[4], PATTERNS[1]])
    found = generated(model, ids, mask, do_sample=False, past_key_values=PatternCache(model, block=4))
    assert found.equal(generated(model, ids, mask, do_sample=False, use_cache=False))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prefill_chunk_size": 5},
    ],
    ids=["sampled", "beams", "prompt in pieces"],
)
def test_every_way_of_choosing_gives_the_tokens_of_recomputing(pattern, options):
    model = model_of(FULL["llama"], dtype=torch.float32)
    set_pattern(model, [pattern, Streaming(4, sinks=1), pattern])
    ids, mask = tokens(3, LENGTH), padding("none" if "prefill_chunk_size" in options else "left", 3, LENGTH)
    found = generated(model, ids, mask, past_key_values=PatternCache(model, block=3), **options)
    options.pop("prefill_chunk_size", None)
    assert found.equal(generated(model, ids, mask, use_cache=False, **options))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_logits_read_in_pieces_are_those_of_the_whole(pattern, kind):
    model = model_of(FULL["llama"])
    set_pattern(model, pattern)
    ids, mask = tokens(3, LENGTH + 8), padding(kind, 3, LENGTH + 8)
    mask = torch.ones_like(ids) if mask is None else mask
    cache, pieces, begin = PatternCache(model, block=4), [], 0
    with torch.no_grad():
        wanted = real_logits(model, ids, mask, use_cache=False)
        for size in (13, 6, 1, 1, 7, 1):
            piece = slice(begin, begin + size)
            here = mask[:, : piece.stop]
            pieces.append(model(ids[:, piece], attention_mask=here, past_key_values=cache).logits)
            begin += size
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], wanted)


def test_assisted_decoding_takes_guesses_back():
    model = model_of(FULL["llama"], dtype=torch.float32)
    set_pattern(model, Streaming(6, sinks=2))
    ids = tokens(1, LENGTH).repeat(1, 2)
    options = {"do_sample": False, "prompt_lookup_num_tokens": 3}
    found = generated(model, ids, None, past_key_values=PatternCache(model, block=2, undo=5), **options)
    assert found.equal(generated(model, ids, None, do_sample=False, use_cache=False))


def test_a_prompt_is_read_once_for_many_answers():
    model = model_of(FULL["llama"], dtype=torch.float32)
    set_pattern(model, LongMixed(8))
    prompt, cache = tokens(1, LENGTH), PatternCache(model)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    for question in (tokens(1, 7).flip(1), tokens(1, 3)):
        ids = torch.cat([prompt, question], dim=1)
        found = generated(model, ids, None, do_sample=False, past_key_values=copy.deepcopy(cache))
        assert found.equal(generated(model, ids, None, do_sample=False, use_cache=False))
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("pattern", [Causal(), LongMixed(8)], ids=str)
def test_continuations_of_one_prompt_share_its_pages(pattern):
    model = model_of(FULL["llama"], dtype=torch.float32)
    set_pattern(model, pattern)
    pool = pool_for(model, tokens=200, size=4)
    everything, prompt = pool.free, tokens(2, LENGTH)
    cache = PatternCache(model, storage=pool)
    _grown(model, prompt, cache)
    free, taken = pool.free, cache.nbytes
    questions = [tokens(2, size).flip(1) for size in (5, 1, 8)]
    branches = [cache.fork() for _ in questions]
    assert pool.free == free
    for question, branch in zip(questions, branches, strict=True):
        ids = torch.cat([prompt, question], dim=1)
        found = generated(model, ids, None, do_sample=False, past_key_values=branch)
        assert found.equal(generated(model, ids, None, do_sample=False, use_cache=False))
    # Every branch takes what it read itself and a copy of the last pages, and no more.
    assert pool.free > free - len(branches) * taken // pool.page_bytes
    assert cache.get_seq_length() == LENGTH and cache.nbytes == taken
    for branch in branches:
        branch.reset()
    assert pool.free == free
    cache.reset()
    assert pool.free == everything


def test_a_text_longer_than_the_pool_is_refused_and_the_cache_goes_on():
    model = model_of(FULL["llama"])
    set_pattern(model, Causal())
    cache, ids = PatternCache(model, storage=pool_for(model, tokens=24, size=4)), tokens(1, 30)
    _grown(model, ids[:, :10], cache)
    with pytest.raises(ShapeError, match="The pool has no pages left for these tokens"):
        _grown(model, ids[:, 10:], cache)
    found = _grown(model, ids[:, 10:20], cache).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids[:, :20], use_cache=False).logits[:, 10:])


def test_bytes_stay_once_the_window_is_full():
    model = model_of(FAMILIES["mistral"], dtype=torch.float32)
    set_pattern(model, Streaming(6, sinks=2))
    cache, seen = PatternCache(model, block=4), []
    ids = tokens(2, 60)
    with torch.no_grad():
        for token in range(60):
            model(ids[:, token : token + 1], past_key_values=cache)
            seen.append(cache.nbytes)
    # The model's own window lets sinks go too: three layers of two rows, two key heads, keys and values of 8 numbers.
    assert WINDOW > 6
    assert set(seen[20:]) == {3 * 2 * 2 * 2 * 8 * 4 * (5 + 4)}


def _grown(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache)


def _other_model(model, cache):
    other = copy.deepcopy(model)
    return lambda: _grown(other, tokens(2, 1), cache)


def _other_pattern(model, cache):
    set_pattern(model, [Streaming(6, sinks=2), Causal(), Streaming(6, sinks=2)])
    return lambda: _grown(model, tokens(2, 1), cache)


def _other_batch(model, cache):
    return lambda: _grown(model, tokens(3, 1), cache)


def _other_past(model, cache):
    mask = torch.ones(2, LENGTH + 1, dtype=torch.long)
    mask[0, :4] = 0
    return lambda: model(tokens(2, 1), attention_mask=mask, past_key_values=cache)


def _gradient(model, cache):
    return lambda: model(tokens(2, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("misuse", "reason"),
    [
        (_other_model, "made for another model"),
        (_other_pattern, "patterns were set anew"),
        (_other_batch, "do not continue what the cache holds"),
        (_other_past, "do not continue a text of"),
        (_gradient, "carries no gradient"),
    ],
    ids=["another model", "another pattern", "another batch", "another past", "gradient"],
)
def test_misuse_leaves_the_cache_unharmed(misuse, reason):
    model = model_of(FULL["llama"])
    set_pattern(model, Streaming(6, sinks=2))
    settings = [layer.self_attn.longspan for layer in model.model.layers]
    cache, ids = PatternCache(model, block=4), tokens(2, LENGTH + 1)
    _grown(model, ids[:, :LENGTH], cache)
    with torch.set_grad_enabled(misuse is _gradient), pytest.raises(LongspanError, match=reason):
        misuse(model, cache)()
    for layer, setting in zip(model.model.layers, settings, strict=True):
        layer.self_attn.longspan = setting
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(_grown(model, ids[:, LENGTH:], cache).logits, wanted)


def test_a_model_without_patterns_is_refused():
    model = model_of(FULL["llama"])
    with pytest.raises(PatternError) as refused:
        PatternCache(model)
    assert str(refused.value) == (
        "This model has no patterns, so nothing says which keys of a cache are read.\n"
        "  model  LlamaForCausalLM\n"
        "  try    set_pattern(model, SlidingWindow(4096)), or with any other pattern, before the cache is made"
    )
    set_pattern(model, Causal())
    cache = PatternCache(model)
    reset(model)
    _grown(model, tokens(1, 4), cache)
    # Attention that does not find the mark reads only what is new, and must not do so unseen.
    with pytest.raises(PlanError, match="did not look for what is held"):
        _grown(model, tokens(1, 1), cache)


def _changing(kind):
    """Return a model whose angles change where a text grows longer than 16 tokens."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    model = model_of(FULL["llama"], dtype=torch.float32, max_position_embeddings=16, rope_parameters=rope)
    set_pattern(model, Causal())
    return model


MESSAGES = {
    "dynamic": (
        "This cache ends where its model's angles change.\n"
        "  asked  to read on to 17 tokens\n"
        "  why    beyond 16 tokens dynamic NTK turns all keys by other angles, which change with every token\n"
        "         later layers hold keys computed from what the old angles let earlier ones read\n"
        "  try    yarn, linear or llama3 positions, which do not change; or use_cache=False for what dynamic NTK computes"
    ),
    "longrope": (
        "This cache ends where its model's angles change.\n"
        "  asked  to read on to 17 tokens\n"
        "  why    beyond 16 tokens LongRoPE turns all keys by other angles, which change once\n"
        "         later layers hold keys computed from what the old angles let earlier ones read\n"
        "  try    cache.reset() and all 17 tokens in one forward, after which the cache goes on; or short_factor equal "
        "to long_factor, which is what a text of that length is read with"
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_positions_that_turn_cached_keys_anew_are_refused(kind):
    model = _changing(kind)
    cache, ids = PatternCache(model), tokens(1, 17)
    _grown(model, ids[:, :16], cache)
    with pytest.raises(PlanError) as caught:
        _grown(model, ids[:, 16:], cache)
    assert str(caught.value) == MESSAGES[kind]
    assert cache.get_seq_length() == 16


def test_a_text_read_anew_where_longrope_changes_goes_on_as_recomputed():
    model = _changing("longrope")
    ids = tokens(2, 12)
    wanted = generated(model, ids, None, do_sample=False, use_cache=False, max_new_tokens=14)
    cache = PatternCache(model)
    # The token after 16 is still chosen by the short factors.
    for new in (5, 9):
        cache.reset()
        ids = generated(model, ids, None, do_sample=False, past_key_values=cache, max_new_tokens=new)
    assert ids.equal(wanted)


def test_capped_scores_are_those_of_recomputing():
    model = model_of(GEMMA2, dtype=torch.float32, attn_logit_softcapping=2.0)
    set_pattern(model, Streaming(6, sinks=2))
    ids, mask = tokens(3, LENGTH), padding("left", 3, LENGTH)
    found = generated(model, ids, mask, do_sample=False, past_key_values=PatternCache(model, block=4))
    assert found.equal(generated(model, ids, mask, do_sample=False, use_cache=False))


def test_eight_bits_choose_nearly_the_same():
    model = model_of(FULL["llama"])
    set_pattern(model, Causal())
    ids = tokens(2, LENGTH)
    cache, exact = PatternCache(model, storage="int8"), DynamicCache(config=model.config)
    rounded, wanted = _grown(model, ids, cache).logits, _grown(model, ids, exact).logits
    error = (rounded - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < 0.05
