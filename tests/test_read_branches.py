"""Streams that branch: beams, forks, tokens taken back and padded rows, each against all keys turned anew."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from apart import recomputing
from hf_models import FULL, model_of, padding, tokens

from longspan import SlidingWindow, Streaming
from longspan.errors import LongspanError, ShapeError
from longspan.hf import set_pattern, stream
from longspan.hf.stream import StreamCache

LENGTH, NEW = 23, 8
PATTERNS = [Streaming(6, sinks=2), Streaming(3, sinks=9), Streaming(60, sinks=2), SlidingWindow(7)]
QUIET = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def moving_often(monkeypatch):
    """The base of positions moves along every few tokens."""
    monkeypatch.setattr(stream, "_LEAST", 4)


def prepared(pattern, rows=3, kind="none", length=LENGTH):
    """Return a model with a pattern, ids, which of them are tokens, and the model that computes all anew."""
    model, ids = model_of(FULL["llama"]), tokens(rows, length)
    mask = padding(kind, rows, length)
    mask = torch.ones_like(ids) if mask is None else mask
    set_pattern(model, pattern)
    return model, ids, mask, recomputing(model, pattern, mask.bool())


def grown(model, ids, cache, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def anew(whole, ids):
    with torch.no_grad():
        return whole(ids, use_cache=False).logits


def generated(model, ids, mask, **options):
    torch.manual_seed(5)
    return model.generate(ids, attention_mask=mask, **QUIET | options)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampled", "beams"],
)
def test_every_way_of_choosing_gives_the_tokens_of_recomputing(pattern, kind, options):
    model, ids, mask, whole = prepared(pattern, kind=kind)
    with StreamCache(model) as cache:
        found = generated(model, ids, mask, past_key_values=cache, **options)
    assert found.equal(generated(whole, ids, mask, use_cache=False, **options))


def test_assisted_decoding_takes_guesses_back():
    model, ids, mask, whole = prepared(PATTERNS[0], rows=1)
    ids, mask = ids.repeat(1, 2), mask.repeat(1, 2)
    with StreamCache(model, undo=5) as cache:
        options = {"do_sample": False, "prompt_lookup_num_tokens": 3}
        found = generated(model, ids, mask, past_key_values=cache, **options)
    assert found.equal(generated(whole, ids, mask, do_sample=False, use_cache=False))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@pytest.mark.parametrize("undo", [0, 3])
def test_padded_rows_read_what_each_reads_alone(pattern, kind, undo):
    model, ids, mask, whole = prepared(pattern, kind=kind)
    pieces, begin = [], 0
    with StreamCache(model, undo=undo) as cache:
        for size in (9, 6, 1, 1, 5, 1):
            end = begin + size
            pieces.append(grown(model, ids[:, begin:end], cache, mask[:, :end]))
            begin = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], anew(whole, ids)[real], **CLOSE)


@pytest.mark.parametrize("branch", [StreamCache.fork, copy.deepcopy], ids=["fork", "copy"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_branches_share_nothing_that_is_written(pattern, branch):
    model, ids, mask, whole = prepared(pattern, kind="left")
    questions = [tokens(3, 9).flip(1), tokens(3, 9), tokens(3, 9).roll(1, 0)]
    ones = torch.ones(3, 9, dtype=torch.long)
    with StreamCache(model) as cache:
        grown(model, ids, cache, mask)
        branches = [cache, branch(cache), branch(branch(cache))]
        found = [[] for _ in questions]
        # In turns, so that one that wrote into another, or moved its base, would be found out.
        for begin, end in ((0, 1), (1, 2), (2, 8), (8, 9)):
            for question, other, pieces in zip(questions, branches, found, strict=True):
                seen = torch.cat([mask, ones[:, :end]], dim=1)
                pieces.append(grown(model, question[:, begin:end], other, seen))
    for question, pieces in zip(questions, found, strict=True):
        wanted = anew(whole, torch.cat([ids, question], dim=1))[:, LENGTH:]
        torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, **CLOSE)


def test_a_fork_is_read_inside_a_with_of_its_own():
    model, ids, _, whole = prepared(PATTERNS[0])
    with StreamCache(model) as cache:
        grown(model, ids[:, :9], cache)
        with cache.fork() as branch:
            grown(model, ids[:, 9:15], branch)
        # The other one is still open.
        grown(model, ids[:, 9:15], cache)
    assert not model.model._forward_pre_hooks
    with branch:
        found = grown(model, ids[:, 15:], branch)
    torch.testing.assert_close(found, anew(whole, ids)[:, 15:], **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_are_chosen_whatever_their_lengths(pattern):
    model, ids, mask, _ = prepared(pattern, kind="left")
    rows = torch.tensor([2, 0, 0, 1])
    later = tokens(4, 7).flip(0)
    with StreamCache(model) as cache:
        grown(model, ids, cache, mask)
        cache.reorder_cache(rows)
        seen = torch.cat([mask[rows], torch.ones_like(later)], dim=1)
        found = [grown(model, later[:, :3], cache, seen[:, :-4])]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([True, False] * 4))
        found.append(grown(model, later[:, 3:], cache, seen))
    whole = recomputing(model, pattern, mask[rows].bool())
    wanted = anew(whole, torch.cat([ids[rows], later], dim=1))[:, LENGTH:]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize(("undo", "back"), [(0, 1), (3, 1), (3, 3), (3, 4), (40, 8)])
def test_tokens_taken_back_were_never_read(pattern, kind, undo, back):
    model, ids, mask, whole = prepared(pattern, kind=kind)
    wrong = ids.flip(0)
    with StreamCache(model, undo=undo) as cache:
        grown(model, ids[:, :15], cache, mask[:, :15])
        found = []
        for begin, end in ((15, 16), (16, 19), (19, 23)):
            grown(model, wrong[:, :1], cache, torch.cat([mask[:, :begin], mask[:, -1:]], dim=1))
            if back > 1:
                seen = torch.cat([mask[:, :begin], torch.ones(3, back, dtype=torch.long)], dim=1)
                grown(model, wrong[:, 1:back], cache, seen)
            cache.crop(-back)
            found.append(grown(model, ids[:, begin:end], cache, mask[:, :end]))
    assert cache.get_seq_length() == LENGTH
    torch.testing.assert_close(torch.cat(found, dim=1), anew(whole, ids)[:, 15:], **CLOSE)


def test_a_text_that_the_window_holds_is_taken_back_as_far_as_one_likes():
    model, ids, _, whole = prepared(Streaming(60, sinks=2))
    with StreamCache(model) as cache:
        grown(model, ids.flip(1), cache)
        cache.crop(-LENGTH + 2)
        cache.crop(-2)
        torch.testing.assert_close(grown(model, ids, cache), anew(whole, ids), **CLOSE)


def test_keys_that_are_gone_are_not_taken_back():
    model, ids, mask, whole = prepared(Streaming(6, sinks=2), kind="left")
    with StreamCache(model) as cache:
        grown(model, ids[:, :20], cache, mask[:, :20])
        with pytest.raises(ShapeError) as caught:
            cache.crop(-2)
        assert str(caught.value) == (
            "A crop to [15, 11, 18] tokens would read keys that are gone; [16, 12, 19] is possible.\n"
            "  cache  [17, 13, 20] tokens read, a window of 6\n"
            "  try    StreamCache(model, undo=tokens), which holds keys that much longer"
        )
        # Padding is no token that a row could give back.
        with pytest.raises(ShapeError, match="columns at the end hold a token in every row"):
            cache.crop(-19)
        assert cache.get_seq_length() == 20
        found = grown(model, ids[:, 20:], cache, mask)
    torch.testing.assert_close(found, anew(whole, ids)[:, 20:], **CLOSE)
    with pytest.raises(ShapeError, match="nothing less than 0 is undone"):
        StreamCache(model, undo=-1)


def _other_model(model, cache):
    other = copy.deepcopy(model)
    return lambda: other(tokens(3, 1), past_key_values=cache)


def _other_pattern(model, cache):
    set_pattern(model, Streaming(7, sinks=2))
    return lambda: model(tokens(3, 1), past_key_values=cache)


def _other_batch(model, cache):
    return lambda: model(tokens(2, 1), past_key_values=cache)


def _other_past(model, cache):
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    return lambda: model(tokens(3, 1), attention_mask=mask, past_key_values=cache)


def _other_length(model, cache):
    mask = torch.ones(3, LENGTH - 2, dtype=torch.long)
    return lambda: model(tokens(3, 1), attention_mask=mask, past_key_values=cache)


def _no_mask(model, cache):
    """Rows of different lengths are told apart by the mask alone."""
    return lambda: model(tokens(3, 1), past_key_values=cache)


def _outside(model, cache):
    def read():
        cache.places.leave()
        try:
            model(tokens(3, 1), past_key_values=cache)
        finally:
            cache.places.enter()

    return read


def _gradient(model, cache):
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, :7] = 0
    return lambda: model(tokens(3, 1), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("misuse", "reason"),
    [
        (_other_model, "made for another model"),
        (_other_pattern, "patterns were set anew"),
        (_other_batch, "do not continue what the cache holds"),
        (_other_past, re.escape("begin at [18, 22, 22] do not continue a text of [19, 15, 22] tokens")),
        (_other_length, "the mask has shape"),
        (_no_mask, "do not continue a text of"),
        (_outside, "turned to places in the text"),
        (_gradient, "carries no gradient"),
    ],
    ids=["model", "pattern", "batch", "past", "length", "no mask", "outside", "gradient"],
)
def test_misuse_leaves_the_cache_unharmed(misuse, reason):
    model, ids, mask, whole = prepared(PATTERNS[0], kind="left")
    settings = [layer.self_attn.longspan for layer in model.model.layers]
    with StreamCache(model) as cache:
        grown(model, ids[:, :-1], cache, mask[:, :-1])
        with torch.set_grad_enabled(misuse is _gradient), pytest.raises(LongspanError, match=reason):
            misuse(model, cache)()
        for layer, setting in zip(model.model.layers, settings, strict=True):
            layer.self_attn.longspan = setting
        found = grown(model, ids[:, -1:], cache, mask)
    torch.testing.assert_close(found, anew(whole, ids)[:, -1:], **CLOSE)
