"""With Causal() a model computes what it computed before: padded, packed, cached, trained and in low precision."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hf_models import FAMILIES, FULL, GEMMA2, SDPA, WINDOW, model_of, padding, real_logits, recompute, tokens
from transformers import DynamicCache

from longspan.hf.attention import reset, set_pattern
from longspan.hf.batch import Batch
from longspan.hf.segment import whole
from longspan.kernel.heads import head_groups
from longspan.kernel.lattice import step
from longspan.pattern import Causal, Chunk, LongMixed, Sink, Streaming, Window

LENGTH = 29
PADDINGS = ["none", "left", "right"]
SPARSE = [
    LongMixed(8),
    Streaming(6, sinks=2),
    Causal() & (Chunk(5) | Sink(1)),
    (Causal() & Window(3)) + Chunk(7),
]


def gradients(model, ids, mask):
    """Gradients of the mean log probability of the real tokens, by parameter."""
    model.train()
    model.zero_grad()
    real_logits(model, ids, mask, use_cache=False).log_softmax(-1).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# In WINDOWED models transformers' windows count padding too, a pattern's only tokens: without holes it is the same.
@pytest.mark.parametrize(
    ("family", "kind"), [*product(SDPA, PADDINGS), *((family, "holes") for family in FULL)]
)
def test_logits_equal_those_of_sdpa(family, kind):
    model = model_of(SDPA[family])
    ids, mask = tokens(3, LENGTH), padding(kind, 3, LENGTH)
    wanted = real_logits(model, ids, mask)
    set_pattern(model, Causal())
    torch.testing.assert_close(real_logits(model, ids, mask), wanted)


@pytest.mark.parametrize("kind", PADDINGS)
def test_logits_of_gemma_2_without_its_cap_equal_those_of_eager(kind):
    model = model_of(GEMMA2, dtype=torch.float32)
    ids, mask = tokens(3, LENGTH), padding(kind, 3, LENGTH)
    wanted = real_logits(model, ids, mask)
    set_pattern(model, Causal())
    torch.testing.assert_close(real_logits(model, ids, mask), wanted)


@pytest.mark.parametrize("family", SDPA)
@pytest.mark.parametrize("kind", PADDINGS)
def test_gradients_equal_those_of_sdpa(family, kind):
    model = model_of(SDPA[family], attention_dropout=0.0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    ids, mask = tokens(3, LENGTH), padding(kind, 3, LENGTH)
    wanted = gradients(model, ids, mask)
    set_pattern(model, Causal())
    torch.testing.assert_close(gradients(model, ids, mask), wanted)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_in_float32_the_error_is_no_larger_than_that_of_sdpa(family):
    ids, mask = tokens(3, LENGTH), padding("left", 3, LENGTH)
    exact = real_logits(model_of(FAMILIES[family]), ids, mask)
    model = model_of(FAMILIES[family], dtype=torch.float32)
    allowed = (real_logits(model, ids, mask) - exact).abs().max()
    set_pattern(model, Causal())
    assert (real_logits(model, ids, mask) - exact).abs().max() <= 2 * allowed


@pytest.mark.parametrize("kind", ["left", "holes"])
@pytest.mark.parametrize("pattern", SPARSE, ids=str)
def test_a_padded_row_reads_as_if_it_were_alone(pattern, kind):
    model = model_of(FULL["gpt2"])
    set_pattern(model, pattern)
    ids, mask = tokens(4, LENGTH), padding(kind, 4, LENGTH)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(4):
        alone = model(ids[row : row + 1, mask[row].bool()]).logits[0]
        torch.testing.assert_close(together[row, mask[row].bool()], alone)


def test_windows_of_the_model_count_tokens_and_not_padding():
    model = model_of(FAMILIES["mistral"])
    set_pattern(model, Causal())
    ids, mask = tokens(3, LENGTH), padding("holes", 3, LENGTH)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    alone = model(ids[:1, mask[0].bool()]).logits[0]
    torch.testing.assert_close(together[0, mask[0].bool()], alone)


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_rows_of_padding_leave_attention_as_zero(kind):
    model = model_of(FULL["llama"])
    set_pattern(model, Causal())
    seen = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    mask = padding(kind, 3, LENGTH)
    model(tokens(3, LENGTH), attention_mask=mask)
    assert (seen[0][mask == 0] == 0).all()
    assert (seen[0][mask == 1] != 0).any(-1).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("pattern", [Causal(), *SPARSE[::3]], ids=str)
def test_a_cache_changes_nothing(family, kind, pattern):
    """Read in pieces of any size, also past the window where the cache of a windowed layer drops keys."""
    model = model_of(FAMILIES[family])
    set_pattern(model, pattern)
    ids, mask = tokens(3, LENGTH), padding(kind, 3, LENGTH)
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        wanted = real_logits(model, ids, mask, use_cache=False)
        cache, pieces, begin = DynamicCache(config=model.config), [], 0
        for size in (13, 6, 1, 1, 7, 1):
            piece = slice(begin, begin + size)
            pieces.append(
                model(ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=cache).logits
            )
            begin += size
    assert begin == LENGTH > 3 * WINDOW
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], wanted)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2 with windows"])
@pytest.mark.parametrize("pattern", [Causal(), LongMixed(8), Causal() & (Chunk(5) | Sink(1))], ids=str)
def test_generating_with_a_cache_is_generating_without(family, pattern):
    model = model_of(FAMILIES[family])
    ids, mask = tokens(3, 11), padding("left", 3, 11)
    set_pattern(model, pattern)
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    cached = model.generate(ids, **asked)
    assert torch.equal(cached, model.generate(ids, **asked, use_cache=False))
    if pattern == Causal():
        reset(model)
        assert torch.equal(cached, model.generate(ids, **asked))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_documents_attend_alone(family):
    model = model_of(FAMILIES[family])
    ids = tokens(2, LENGTH)
    lengths = [[11, 4, 14], [1, 28]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    wanted = model(ids, position_ids=positions, use_cache=False).logits
    set_pattern(model, Causal())
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, wanted)
    set_pattern(model, SPARSE[2])
    together = model(ids, position_ids=positions, use_cache=False).logits
    for row, documents in enumerate(lengths):
        alone = [model(part[None]).logits[0] for part in ids[row].split(documents)]
        torch.testing.assert_close(together[row], torch.cat(alone))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(reentrant):
    model = model_of(FULL["llama"])
    ids, mask = tokens(3, LENGTH), padding("left", 3, LENGTH)
    set_pattern(model, [SPARSE[0], SPARSE[2], Causal()])
    wanted = gradients(model, ids, mask)
    recompute(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model, ids, mask), wanted)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_under_autocast_the_error_is_no_larger_than_that_of_sdpa(kind, use_cache):
    ids, mask = tokens(3, LENGTH), padding(kind, 3, LENGTH)
    exact = real_logits(model_of(FULL["llama"]), ids, mask)
    model = model_of(FULL["llama"], dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        allowed = (real_logits(model, ids, mask, use_cache=use_cache) - exact).abs().max()
        set_pattern(model, Causal())
        found = real_logits(model, ids, mask, use_cache=use_cache)
    assert found.dtype is torch.bfloat16
    assert (found - exact).abs().max() <= 2 * allowed
    found.float().sum().backward()


def test_a_bfloat16_model_whose_norms_are_trained_in_float32():
    model = model_of(FULL["qwen3"], dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
    set_pattern(model, Causal())
    ids = tokens(2, LENGTH)
    assert model(ids).logits.dtype is torch.bfloat16


def test_a_step_is_planned_once_for_all_layers(monkeypatch):
    """And the formula is read once for many steps."""
    model, read, runs = model_of(FULL["llama"], dtype=torch.float32), [], step._runs
    set_pattern(model, Causal() & Window(9))
    monkeypatch.setattr(step, "_runs", lambda *given: read.append(given) or runs(*given))
    step._found.cache_clear()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 70), past_key_values=cache)
        before = head_groups.cache_info().misses
        for _ in range(20):
            model(tokens(1, 1), past_key_values=cache)
    assert len(read) == 1
    assert head_groups.cache_info().misses - before == 20


def test_positions_that_are_written_to_are_looked_at_again():
    """As where a loop keeps one tensor for all its texts."""
    batch, positions = Batch(whole(1, 6, 6), (1, 6), 6, None, masked=False), torch.arange(6)[None]
    assert not batch.restarts(positions)
    positions[0, 3:] -= 3
    assert batch.restarts(positions)
    with torch.inference_mode():
        assert not batch.restarts(torch.arange(6)[None])
