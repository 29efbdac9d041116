"""CUDA graphs of models with patterns: nothing waits for the device, and what would have to be looked at is refused.

No graph is captured here. Models run as they would on CUDA while one is: on the meta device, whose tensors hold no numbers
that could be looked at, and on cpu with a stand-in for CUDA's flash attention, for the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_stand_in import flash_on_cpu
from hf_models import FULL, GEMMA2, WINDOWED, model_of, padding, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import longspan.attention
from longspan.cache import Cache
from longspan.cache import layer as cache_layer
from longspan.errors import PlanError, ShapeError
from longspan.hf import attention, batch, sequence, traced
from longspan.hf.attention import set_pattern
from longspan.hf.cache import PatternCache
from longspan.hf.stream import StreamCache
from longspan.kernel.flash import flash
from longspan.kernel.operation import compiled
from longspan.pattern import LongMixed, SlidingWindow, Streaming
from longspan.score import Scores

LENGTH = 20
KINDS = {"llama": FULL["llama"], "mistral": WINDOWED["mistral"], "gemma2": GEMMA2, "gpt2": FULL["gpt2"]}
# What waits for the device on CUDA.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention run what it would on CUDA."""
    monkeypatch.setattr(longspan.attention, "at_once", lambda *given, **asked: None)
    monkeypatch.setattr(longspan.attention, "chosen", lambda *given, **asked: "flash")
    monkeypatch.setattr(traced, "at_once", lambda *given, **asked: None)
    monkeypatch.setattr(compiled, "chosen", lambda *given, **asked: "flash")


@pytest.fixture
def capture(as_on_cuda, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that says from then on that a graph is being captured."""

    def begin() -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for place in (attention, batch, cache_layer, flash, sequence, traced):
            monkeypatch.setattr(place, "capturing", lambda where: True)

    return begin


class NotWaiting(TorchDispatchMode):
    """Refuses every operation that would wait for a device, or copies tensors from one to another."""

    def __torch_dispatch__(self, function, types, given=(), named=None):
        assert function.overloadpacket.__name__ not in WAITING, f"{function} waits for the device"
        sides = [side for side in tree_leaves((given, named)) if isinstance(side, torch.Tensor)]
        assert len({side.device for side in sides}) < 2, f"{function} takes tensors of several devices"
        return function(*given, **(named or {}))


def model_with(kind: str, pattern=None):
    model = model_of(KINDS[kind], dtype=torch.float32)
    set_pattern(model, pattern or LongMixed(9))
    return model


def trained(model, ids, **given) -> list[torch.Tensor]:
    """Logits and gradients."""
    logits = model(ids, use_cache=False, **given).logits
    return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]


def step(model, ids) -> torch.Tensor:
    """Logits of a text that is read into a cache, and then of one token more."""
    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=kept)
        return model(ids[:, :1], past_key_values=kept).logits


def masks(model, ids, mask, positions=None) -> Any:
    """The masks of a model, made as it makes them."""
    given = {
        "config": model.config,
        "inputs_embeds": model.get_input_embeddings()(ids),
        "attention_mask": mask,
        "past_key_values": None,
        "position_ids": positions,
    }
    if model.config.model_type == "mistral":
        return create_sliding_window_causal_mask(**given)
    return create_causal_mask(**given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [trained, step])
def test_no_number_on_the_device_is_looked_at(act, kind: str, capture, monkeypatch):
    """Tensors of the meta device have none, and do not mix with those of another one, as those of CUDA do not."""
    # Which knows nothing of autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    model = model_with(kind).to("meta")
    capture()
    with NotWaiting():
        act(model, torch.zeros(2, LENGTH, dtype=torch.long, device="meta"))


@pytest.fixture
def stand_in() -> Iterator[None]:
    with flash_on_cpu():
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [trained, step])
def test_the_numbers_are_those_without_a_capture(act, kind: str, capture, stand_in):
    model, ids = model_with(kind), tokens(2, LENGTH)
    wanted = act(model, ids)
    capture()
    with NotWaiting():
        found = act(model, ids)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("filled", ["left", "right", "holes", "packed"])
def test_padding_and_documents_that_were_known_before(filled: str, kind: str, capture, stand_in):
    """A mask that was made before is kept: what it was made of may change afterwards."""
    model, ids = model_with(kind), tokens(3, LENGTH)
    given: dict[str, Any] = {}
    if filled == "packed":
        positions = torch.arange(LENGTH).expand(3, LENGTH)
        given["position_ids"] = torch.where(positions < 8, positions, positions - 8)
    else:
        given["attention_mask"] = padding(filled, 3, LENGTH)
    wanted = trained(model, ids, **given)
    mask = masks(model, ids, given.pop("attention_mask", None), given.get("position_ids"))
    capture()
    with NotWaiting():
        found = trained(model, ids, attention_mask=mask, **given)
    torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_captures_a_padded_model():
    """Replayed on other tokens, a captured forward gives what is given without one."""
    model = model_with("llama").to("cuda", torch.bfloat16).requires_grad_(False)
    ids, mask = tokens(3, LENGTH).to("cuda"), padding("left", 3, LENGTH).to("cuda")
    known = masks(model, ids, mask)
    for _ in range(3):
        model(ids, attention_mask=known, use_cache=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(ids, attention_mask=known, use_cache=False).logits
    ids.copy_(ids.flip(0).roll(1, dims=1))
    graph.replay()
    wanted = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask.bool()], wanted[mask.bool()])


def test_a_mask_is_refused(capture):
    model, ids = model_with("llama"), tokens(2, LENGTH)
    capture()
    with pytest.raises(ShapeError) as caught:
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert (
        str(caught.value)
        == """This batch cannot be read while a CUDA graph is captured.
  given  attention_mask [2, 20]
  why    which tokens are padding decides what is computed, and is on the device
  try    no attention_mask where nothing is padded; or one from transformers' create_causal_mask, made before the \
capture, whose padding the graph then keeps"""
    )


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "with a cache"])
def test_documents_stop_a_graph_that_was_captured_without(cached: bool, capture, stand_in):
    """On cpu the check is made at once, and on CUDA each time the graph runs."""
    model, ids = model_with("llama"), tokens(2, LENGTH)
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    capture()
    given = {"past_key_values": DynamicCache(config=model.config)} if cached else {"use_cache": False}
    with pytest.raises(RuntimeError, match=r"^longspan: positions restart, as in packed documents"):
        model(ids, position_ids=torch.where(positions < 8, positions, positions - 8), **given)
    # Positions that skip the first tokens are those of one text.
    model(ids, position_ids=positions + 3, use_cache=False)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        # Not every model tells its layers of positions.
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "positions restart"),
        ({"block_sequence_ids": torch.tensor([[-1, 0, 0, 0, -1, -1]])}, "some tokens read later ones"),
    ],
)
def test_what_is_seen_where_masks_are_made_stops_it_too(given, problem: str, capture):
    asked = {"inputs_embeds": torch.zeros(1, 6, 32), "attention_mask": None, "past_key_values": None}
    config = model_with("llama").config
    capture()
    with pytest.raises(RuntimeError, match=f"^longspan: {problem}"):
        create_causal_mask(config=config, **asked, **given)


@pytest.mark.parametrize("read", [0, 8])
def test_a_cache_of_fixed_size_is_refused(read: int, capture, stand_in):
    model, ids = model_with("llama"), tokens(1, 8)
    kept = StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        if read:
            model(ids, past_key_values=kept)
        capture()
        with pytest.raises(ShapeError) as caught:
            model(ids[:, : 8 - read or 1], past_key_values=kept)
    assert (
        str(caught.value)
        == """This batch cannot be read while a CUDA graph is captured.
  given  a cache of fixed size, with room for 32 tokens
  why    how much of it is filled decides what is computed, and is on the device
  try    a cache that grows, past_key_values=DynamicCache(), for a graph of one step; or no graph"""
    )


def test_a_cache_of_patterns_is_refused_and_stays_as_it_was(monkeypatch, capture, stand_in):
    model, ids = model_with("llama", Streaming(8, sinks=2)), tokens(1, 12)
    kept = PatternCache(model)
    with torch.no_grad():
        model(ids, past_key_values=kept)
        with monkeypatch.context() as inner:
            inner.setattr(attention, "capturing", lambda where: True)
            with pytest.raises(PlanError) as caught:
                model(ids[:, :1], past_key_values=kept)
        assert (
            str(caught.value)
            == """This cache cannot be read while a CUDA graph is captured.
  cache  PatternLayer, 12 tokens read
  why    it knows outside of the graph where the next token goes, so each run would write over one place
  try    a cache that grows, past_key_values=DynamicCache(), for a graph of one step; or no graph"""
        )
        whole = torch.cat([ids, ids[:, :1]], dim=1)
        wanted = model(whole, use_cache=False).logits[:, -1:]
        torch.testing.assert_close(model(ids[:, :1], past_key_values=kept).logits, wanted)
        with StreamCache(model) as stream:
            capture()
            with pytest.raises(PlanError, match=r"^This cache cannot be read while a CUDA graph is captured"):
                model(ids, past_key_values=stream)


def test_a_cache_without_a_model_is_refused_too(capture):
    kept = Cache(SlidingWindow(8), heads=2)
    sides = [torch.randn(1, 2, 3, 8) for _ in range(3)]
    kept.attend(*sides)
    capture()
    with pytest.raises(PlanError) as caught:
        kept.attend(*(side[:, :, :1] for side in sides))
    assert "cache  Cache of SlidingWindow(8): 3 tokens read, 3 held" in str(caught.value)
    assert kept.lengths == [3]


def test_texts_that_are_split_among_ranks_are_refused(capture):
    model = model_with("llama")
    capture()
    with pytest.raises(ShapeError) as caught:
        sequence.Split.forward(SimpleNamespace(model=model), tokens(1, LENGTH))
    assert (
        str(caught.value)
        == """Texts that are split among ranks cannot be read while a CUDA graph is captured.
  model  LlamaForCausalLM
  why    ranks compare what each of them was given
  try    no graph, or a text on one rank"""
    )


def test_the_operation_of_compiled_models_looks_no_more_than_others(capture, stand_in):
    """It looks when it runs, which it does not while a graph is captured."""
    query = torch.randn(2, 4, LENGTH, 8)
    key, value = (torch.randn(2, 2, LENGTH, 8) for _ in range(2))
    real, joined = (torch.ones(2, size, dtype=torch.bool) for size in (LENGTH, LENGTH - 1))

    def attended(real, joined):
        outline = traced.Outline(real, joined, LENGTH, None)
        return traced.attend(query, key, value, LongMixed(9), outline, [], None, Scores(None, None, None))

    wanted = attended(None, None)
    for given in ((real, None), (None, joined)):
        torch.testing.assert_close(attended(*given), wanted)
    capture()
    torch.testing.assert_close(attended(None, joined), wanted)
    with NotWaiting():
        traced.Outline(None, joined, LENGTH, None).segments(2, LENGTH)
    with pytest.raises(ShapeError, match=r"attention_mask \[2, 20\]"):
        attended(real, None)
    joined[1, 7] = False
    with pytest.raises(RuntimeError, match=r"^longspan: positions restart"):
        attended(None, joined)


def test_the_compiler_leaves_its_operation_out_of_its_own_graphs():
    for name in ("attend_batch", "attend_batch_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.longspan, name).default.tags


def test_layers_look_at_positions_once(as_on_cuda, monkeypatch, stand_in):
    """Outside of a capture looking waits for the device, and all layers are given the same ones."""
    model, ids = model_with("llama"), tokens(2, LENGTH)
    looks = []
    restarts = batch.Batch.restarts

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), named=None):
            looks.append(function.overloadpacket.__name__)
            return function(*given, **(named or {}))

    def counted(self, positions):
        with Counting():
            return restarts(self, positions)

    monkeypatch.setattr(batch.Batch, "restarts", counted)
    model(ids, past_key_values=DynamicCache(config=model.config))
    assert looks.count("_local_scalar_dense") == 1
