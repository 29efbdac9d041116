"""torch.compile sees attention as one operation: no break in the graph, the same numbers, patterns as constants."""

from __future__ import annotations

import pytest
import torch
from hf_models import WINDOWED, model_of, tokens
from torch._dynamo.exc import InternalTorchDynamoError
from torch._dynamo.testing import CompileCounterWithBackend

from longspan import attend, attend_with_lse
from longspan.hf.attention import set_pattern
from longspan.kernel.native import native
from longspan.kernel.operation import opaque
from longspan.pattern import Causal, LongMixed, Pattern, Window
from longspan.score import ALiBi, Sinks, SoftCap

HEADS = 4
WINDOWED_CAUSAL, MIXED = Causal() & Window(9), LongMixed(9)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sides(length: int, *, grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, heads, length, 8, generator=generator).requires_grad_(grad) for heads in (HEADS, 2, 2)
    ]


def compiled(act, backend: str, **options):
    """Return a function compiled into one graph, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(act, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("pattern", [WINDOWED_CAUSAL, MIXED], ids=str)
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_gives_the_same(backend: str, changed: bool, pattern: Pattern):
    def act(query, key, value, logits):
        scores = [ALiBi(), Sinks(logits)] if changed else []
        return attend_with_lse(query, key, value, pattern, scores=scores)

    fast, _ = compiled(act, backend)
    given, logits = sides(31), torch.zeros(HEADS, requires_grad=True)
    wanted = [*given, logits] if changed else given
    results = []
    for function in (fast, act):
        output, lse = function(*given, logits)
        loss = output.square().sum() + lse.square().sum()
        results.append([output, lse, *torch.autograd.grad(loss, wanted)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_all_lengths(backend: str):
    fast, counter = compiled(lambda *given: attend(*given, WINDOWED_CAUSAL), backend, dynamic=True)
    for length in (31, 40, 97):
        given = sides(length)
        output = fast(*given)
        assert torch.equal(output, attend(*given, WINDOWED_CAUSAL))
        (gradient,) = torch.autograd.grad(output.sum(), given[1])
        (right,) = torch.autograd.grad(attend(*given, WINDOWED_CAUSAL).sum(), given[1])
        assert torch.equal(gradient, right)
    assert counter.frame_count == 1


def test_another_pattern_is_another_graph():
    class Layer(torch.nn.Module):
        def __init__(self, pattern: Pattern) -> None:
            super().__init__()
            self.pattern = pattern

        def forward(self, query, key, value):
            return attend(query, key, value, self.pattern)

    layer, given = Layer(WINDOWED_CAUSAL), sides(31)
    fast, counter = compiled(layer, "eager")
    first = fast(*given)
    layer.pattern = MIXED
    assert torch.equal(fast(*given), attend(*given, MIXED))
    assert not torch.equal(first, fast(*given))
    assert counter.frame_count == 2


# The compiler's own code does what the warning is about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_reference_is_traced():
    def act(*given):
        return attend(*given, WINDOWED_CAUSAL, scores=SoftCap(2.0))

    given = sides(31, grad=False)
    fast, _ = compiled(act, "eager")
    torch.testing.assert_close(fast(*given), act(*given))


def test_a_pattern_made_inside_is_refused_in_words():
    given = sides(31)
    fast, _ = compiled(lambda *sides: attend(*sides, WINDOWED_CAUSAL & Window(5)), "eager")
    with pytest.raises(InternalTorchDynamoError) as raised:
        fast(*given)
    assert "A compiled function cannot make a pattern." in str(raised.value)
    assert "make the pattern outside of the function, and use it inside" in str(raised.value)


def test_the_operation_keeps_the_rules_of_custom_operations():
    """Shapes, strides and aliasing are as announced, for what autograd and the compiler do with them."""
    number = opaque.numbered(MIXED)
    logits = torch.zeros(HEADS, requires_grad=True)
    asked = [("sdpa", None, None), ("sdpa", logits, [0.5, 0.25, 0.1, 0.0])]
    asked += [] if native.MISSING else [("native", None, None), ("native", logits, None)]
    for kernel, *extra in asked:
        given = (*sides(9), *extra, number, 0, 1, 0.3, kernel)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(opaque._attend, given, test_utils=checks)


def test_a_compiled_model_of_transformers_gives_the_same():
    model = model_of(WINDOWED["mistral"], dtype=torch.float32, num_hidden_layers=1).requires_grad_(False)
    set_pattern(model, MIXED)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    right = model(ids, attention_mask=mask, use_cache=False).logits
    fast = torch.compile(model, backend="eager")
    torch.testing.assert_close(fast(ids, attention_mask=mask, use_cache=False).logits, right)
