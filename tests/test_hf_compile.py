"""Compiled models: one graph where transformers' own attention gives one, with the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from hf_models import FULL, WINDOWED, model_of, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from longspan.hf.attention import set_pattern
from longspan.hf.cache import PatternCache
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


def model_with(pattern: Pattern | None, kind: str = "llama"):
    model = model_of({**FULL, **WINDOWED}[kind], dtype=torch.float32, num_hidden_layers=2)
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


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_training_is_one_graph(name: str, kind: str):
    graphs = []
    for pattern in (None, LongMixed(9)):
        torch._dynamo.reset()
        model = model_with(pattern, name)
        fast, counter = compiled(model)
        results = []
        for act in (model, fast):
            logits = act(tokens(2, 20), use_cache=False, **batch(kind)).logits
            results.append([logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
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
