"""Compiled models: one graph where transformers' own attention gives one, with the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flash_stand_in import flash_on_cpu
from hf_models import FULL, GEMMA2, WINDOWED, model_of, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from longspan.hf import traced
from longspan.hf.attention import set_pattern
from longspan.hf.cache import PatternCache
from longspan.kernel.operation import compiled as operation
from longspan.pattern import Causal, LongMixed, Pattern, Window


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend: str = "aot_eager"):
    """Return a model compiled into whole graphs, and what counts them."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def model_with(pattern: Pattern | None, kind: str = "llama", **changes):
    model = model_of(
        {**FULL, **WINDOWED, "gemma2": GEMMA2}[kind], dtype=torch.float32, num_hidden_layers=2, **changes
    )
    if pattern is not None:
        set_pattern(model, pattern)
    return model


def batch(kind: str) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 20, dtype=torch.long)
    if kind == "padded":
        mask[0, :5] = 0
        mask[1, 13:] = 0
        return {"attention_mask": mask}
    positions = torch.arange(20).expand(2, 20)
    return {"position_ids": torch.where(positions < 8, positions, positions - 8)} if kind == "packed" else {}


def same_training(model, fast, given: dict[str, torch.Tensor], *, error: float = 1e-6) -> None:
    """Logits and gradients of a model, and of what it was compiled to."""
    results = []
    for act in (model, fast):
        logits = act(tokens(2, 20), use_cache=False, **given).logits
        results.append([logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=error, rtol=10 * error)


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_training_is_one_graph(name: str, kind: str):
    graphs = []
    for pattern in (None, LongMixed(9)):
        torch._dynamo.reset()
        model = model_with(pattern, name)
        fast, counter = compiled(model)
        same_training(model, fast, batch(kind))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] == 1


def test_a_step_with_a_cache_takes_as_many_graphs():
    graphs, ids = [], tokens(2, 20)
    for pattern in (None, Causal() & Window(9)):
        torch._dynamo.reset()
        model = model_with(pattern).requires_grad_(False)
        fast, counter = compiled(model)
        steps = []
        for act in (model, fast):
            cache = DynamicCache(config=model.config)
            act(ids, past_key_values=cache)
            steps.append(act(ids[:, :1], past_key_values=cache).logits)
        torch.testing.assert_close(*steps)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


def test_what_a_graph_looks_into_may_change():
    """Padding is looked at when the graph runs, not when it is made."""
    model = model_with(LongMixed(9)).requires_grad_(False)
    fast, counter = compiled(model)
    for left in (0, 3, 7):
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :left] = 0
        given = {"attention_mask": mask, "use_cache": False}
        torch.testing.assert_close(fast(tokens(2, 20), **given).logits, model(tokens(2, 20), **given).logits)
    assert counter.frame_count == 1


def test_a_pattern_cache_breaks_the_graph_and_nothing_else():
    model = model_with(Causal() & Window(9)).requires_grad_(False)
    steps = []
    for act in (model, torch.compile(model, backend="eager")):
        cache = PatternCache(model)
        act(tokens(2, 20), past_key_values=cache)
        steps.append(act(tokens(2, 1), past_key_values=cache).logits)
    torch.testing.assert_close(*steps)


@pytest.fixture(params=["flash", "reference"])
def elsewhere(request, monkeypatch) -> Iterator[None]:
    """Let graphs run what they would on CUDA, with a stand-in for its flash attention."""
    monkeypatch.setattr(traced, "at_once", lambda *given, **asked: None)
    monkeypatch.setattr(operation, "chosen", lambda *given, **asked: request.param)
    with flash_on_cpu():
        yield


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
def test_the_operations_of_cuda_are_one_graph_too(elsewhere, kind: str):
    model = model_with(LongMixed(9), "llama")
    fast, counter = compiled(model)
    # Other kernels than those of the model as it is, which round in their own ways.
    same_training(model, fast, batch(kind), error=2e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["full", "padded"])
def test_scores_that_are_capped_are_one_graph(kind: str):
    model = model_with(
        LongMixed(9),
        "gemma2",
        attn_logit_softcapping=0.5,
        layer_types=["sliding_attention", "full_attention"],
    )
    fast, counter = compiled(model)
    same_training(model, fast, batch(kind))
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
def test_training_on_cuda_is_one_graph(kind: str):
    """By the compiler that users take, in bfloat16, which the flash kernel runs."""
    model = model_with(LongMixed(9)).to("cuda", torch.bfloat16)
    fast, counter = compiled(model, "inductor")
    given = {name: side.to("cuda") for name, side in batch(kind).items()}
    results = []
    for act in (model, fast):
        logits = act(tokens(2, 20).to("cuda"), use_cache=False, **given).logits.float()
        results.append([logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 0.05 * one.norm()
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_captures_a_model():
    """Replayed on other tokens, a captured forward gives what is given without one."""
    model = model_with(LongMixed(9)).to("cuda", torch.bfloat16).requires_grad_(False)
    ids = tokens(2, 20).to("cuda")
    for _ in range(3):
        model(ids, use_cache=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(ids, use_cache=False).logits
    ids.copy_(ids.flip(0).roll(1, dims=1))
    graph.replay()
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits)
