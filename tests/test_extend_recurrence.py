"""Segments that carry keys and values: equal to one pass with a pattern, and no gradient crosses a border."""

from __future__ import annotations

from operator import mul

import pytest
import torch
import torch.nn.functional as F
from hf_models import FULL, model_of, recompute, tokens

from longspan import Causal, LongMixed, SlidingWindow
from longspan.errors import InputError, PatternError, PlanError
from longspan.evaluate.stream import Stream
from longspan.extend.recurrence import Carried, recurrence, recurrent_losses
from longspan.hf import PatternCache, set_pattern
from longspan.pattern.expression import parse


def pairs(pattern, length):
    places = torch.arange(length)
    return pattern.at_head(0, 1).contains(places[:, None], places[None])


@pytest.mark.parametrize(("segment", "memory"), [(1, 1), (2, 2), (5, 5), (7, 21), (4, 0)])
def test_the_pattern_is_that_of_the_paper(segment, memory):
    """Each query reads its own segment up to itself, and the `memory` tokens before that segment."""
    found = pairs(recurrence(segment, memory=memory), 31)
    for q in range(31):
        begin = q - q % segment
        assert found[q].nonzero().flatten().tolist() == list(range(max(0, begin - memory), q + 1))


def losses(model, ids, segment, memory):
    with torch.no_grad():
        return [float(loss) for loss in recurrent_losses(model, ids, segment=segment, memory=memory)]


def whole_losses(model, ids, segment):
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return [float(part.mean()) for part in each.split(segment, dim=1)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("pattern", "segment", "memory", "whole"),
    [
        (Causal(), 8, 8, recurrence(8, memory=8)),
        (Causal(), 7, 14, recurrence(7, memory=14)),
        (Causal(), 9, 0, recurrence(9, memory=0)),
        (SlidingWindow(11), 6, 10, SlidingWindow(11)),
        (SlidingWindow(11), 31, 10, SlidingWindow(11)),
        (LongMixed(8), 8, 8, LongMixed(8) & recurrence(8, memory=8)),
    ],
    ids=["xl", "longer memory", "no memory", "window", "long segments", "longmixed"],
)
def test_segments_are_one_pass_with_a_pattern(family, pattern, segment, memory, whole):
    model, ids = model_of(FULL[family]), tokens(2, 60)
    set_pattern(model, pattern)
    found = losses(model, ids, segment, memory)
    set_pattern(model, whole)
    torch.testing.assert_close(found, whole_losses(model, ids, segment), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [5, 16, 60])
def test_reading_by_the_pattern_evaluates_segments(chunk):
    """What `longspan read --pattern` does: the loss of segments, in pieces of any size and bounded memory."""
    model, ids = model_of(FULL["llama"]), tokens(1, 200)
    set_pattern(model, Causal())
    found = losses(model, ids, 8, 8)
    sizes = [8] * 24 + [7]
    set_pattern(model, parse("Causal() & (Chunk(8) | Chunk(8, shift=8))"))
    cache = PatternCache(model, block=8)
    at = Stream(model, cache).read(ids[0].numpy(), chunk=chunk, checkpoints=1)[-1]
    assert at.loss == pytest.approx(sum(map(mul, found, sizes)) / 199, rel=1e-6)
    # Three layers, keys and values of two heads; the segment, the one before it, and a block.
    assert cache.nbytes <= 3 * 2 * 2 * 8 * 8 * (8 + 8 + 8)


def test_too_little_memory_for_a_window_is_seen():
    model, ids = model_of(FULL["llama"]), tokens(1, 60)
    set_pattern(model, SlidingWindow(11))
    assert losses(model, ids, 6, 9)[5] != pytest.approx(whole_losses(model, ids, 6)[5], rel=1e-6)


def test_gradients_stop_at_the_border():
    """The second segment's gradient is that of attention in which the keys of the first are constants."""
    model, ids = model_of(FULL["llama"]), tokens(1, 16)
    set_pattern(model, Causal())
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    carried = Carried(model, memory=8)
    model(inputs_embeds=embedded[:, :8], past_key_values=carried, use_cache=True)
    model(inputs_embeds=embedded[:, 8:], past_key_values=carried, use_cache=True).logits.sum().backward()
    assert embedded.grad[:, :8].abs().max() == 0
    assert embedded.grad[:, 8:].abs().min(dim=-1).values.max() > 0


def test_gradients_are_those_of_constants_before_the_border():
    """Weights: by finite differences, where the carried keys are computed once with the old weights."""
    model, ids = model_of(FULL["llama"]), tokens(2, 24)
    set_pattern(model, Causal())

    def second(carried):
        logits = model(ids[:, 8:16], past_key_values=carried, use_cache=True).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 9:17].flatten())

    first = Carried(model, memory=8)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=first, use_cache=True)
    weights = model.model.layers[0].self_attn.k_proj.weight
    states = [(layer.key, layer.value, layer.columns) for layer in first.layers]

    def again():
        for layer, (key, value, columns) in zip(first.layers, states, strict=True):
            layer.key, layer.value, layer.columns = key, value, columns
        return second(first)

    again().backward()
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1), dtype=weights.dtype)
    # Norms are taken in float32, whose rounding smaller steps would show.
    step = 1e-3
    with torch.no_grad():
        weights += step * direction
        above = again()
        weights -= 2 * step * direction
        below = again()
        weights += step * direction
    slope = float((weights.grad * direction).detach().sum())
    measured = float(above - below) / (2 * step)
    assert slope == pytest.approx(measured, rel=1e-3)
    # A gradient through the border would be another one.
    model.zero_grad()
    set_pattern(model, recurrence(8, memory=8))
    logits = model(ids[:, :16], use_cache=False).logits[:, 8:]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 9:17].flatten()).backward()
    assert float((weights.grad * direction).detach().sum()) != pytest.approx(measured, rel=1e-2)
    # The same as what the training loop sees.
    set_pattern(model, Causal())
    model.zero_grad()
    parts = recurrent_losses(model, ids, segment=8, memory=8)
    next(parts)
    next(parts).backward()
    assert float((weights.grad * direction).detach().sum()) == pytest.approx(slope, rel=1e-6)


def test_training_learns_and_memory_stays():
    model = model_of(FULL["llama"], dtype=torch.float32).train()
    set_pattern(model, Causal())
    ids = tokens(1, 12).repeat(2, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for loss in recurrent_losses(model, ids, segment=12, memory=12):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0] / 2
    carried = Carried(model, memory=10)
    with torch.no_grad():
        for _ in range(5):
            model(ids[:, :7], past_key_values=carried)
    assert {layer.key.shape[2] for layer in carried.layers} == {10}


@pytest.mark.parametrize(("shape", "segment", "memory"), [((1, 1), 4, 4), ((1, 9), 0, 4), ((1, 9), 4, -1)])
def test_bad_sizes_are_refused(shape, segment, memory):
    model = model_of(FULL["llama"])
    set_pattern(model, Causal())
    with pytest.raises(InputError, match="Segments of a token or more"):
        next(recurrent_losses(model, tokens(*shape), segment=segment, memory=memory))


def test_what_cannot_be_carried_is_refused():
    model, ids = model_of(FULL["llama"]), tokens(2, 8)
    with pytest.raises(PatternError, match="no patterns"):
        Carried(model, memory=4)
    set_pattern(model, Causal())
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(PlanError, match="padded texts"):
        model(ids, attention_mask=mask, past_key_values=Carried(model, memory=4))
    with pytest.raises(InputError, match="whole segments"):
        recurrence(4, memory=6)
    recompute(model.train())
    with pytest.raises(InputError, match="computed anew"):
        next(recurrent_losses(model, ids, segment=4, memory=4))
