"""Tensors as users have them: empty, in two dtypes, strided, checkpointed, of other widths."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longspan import attend, attend_with_lse
from longspan.errors import ShapeError
from longspan.pattern import BigBird, Causal, Keys, LongMixed, LongNet, Pattern, SlidingWindow, Window
from longspan.score import ALiBi, Sinks

# Those that have gradients on cpu.
KERNELS = "sdpa", "reference"
HEADS, KEY_HEADS, WIDTH = 4, 2, 8
PATTERNS = [SlidingWindow(7), LongMixed(9), LongNet((8, 32), (1, 4))]
CHANGES = (ALiBi(), Sinks(torch.tensor([0.5, 0.0, -1.0, 2.0], dtype=torch.float64)))


def sides(
    rows: int, keys: int, *, batch: int = 2, width: int = WIDTH, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + 100 * keys)
    shapes = (HEADS, rows, WIDTH), (KEY_HEADS, keys, WIDTH), (KEY_HEADS, keys, width)
    return [
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def graded(act, given: list[torch.Tensor]) -> list[torch.Tensor]:
    results = act(*given)
    loss = sum(part.masked_fill(part.isneginf(), 0.0).square().sum() for part in results)
    return [*results, *torch.autograd.grad(loss, given)]


def same(one: list[torch.Tensor], other: list[torch.Tensor], atol: float = 1e-11) -> None:
    for got, right in zip(one, other, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=atol)


@pytest.mark.parametrize("scores", [(), CHANGES], ids=["plain", "changed"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(0, range(5), 5), (2, range(0), 0), (2, range(9, 9), 9), (2, range(9), 0)],
    ids=["no batch", "no text", "no queries", "no keys"],
)
def test_nothing_is_a_size(batch: int, queries: range, keys: int, kernel: str, scores: tuple):
    given = sides(len(queries), keys, batch=batch)

    def act(*tensors):
        return attend_with_lse(*tensors, LongMixed(9), queries=queries, kernel=kernel, scores=scores)

    output, lse, *gradients = graded(act, given)
    assert output.shape == (batch, HEADS, len(queries), WIDTH) and not output.any()
    assert lse.shape == output.shape[:3]
    for gradient, side in zip(gradients, given, strict=True):
        assert gradient.shape == side.shape and not gradient.any()


@pytest.mark.parametrize("width", [1, 3, 8, 9, 24])
@pytest.mark.parametrize("scores", [(), CHANGES], ids=["plain", "changed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_of_another_width(pattern: Pattern, scores: tuple, width: int):
    given = sides(31, 31, width=width)
    results = [
        graded(
            lambda *tensors, kernel=kernel: attend_with_lse(*tensors, pattern, kernel=kernel, scores=scores),
            given,
        )
        for kernel in ("sdpa", "reference")
    ]
    assert results[0][0].shape == (2, HEADS, 31, width)
    same(*results)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_activation_checkpoints_change_nothing(kernel: str, reentrant: bool):
    logits = CHANGES[1].logits.clone().requires_grad_()

    def act(query, key, value, sinks):
        return attend_with_lse(query, key, value, LongMixed(9), kernel=kernel, scores=[ALiBi(), Sinks(sinks)])

    def saved(*given):
        return checkpoint(act, *given, use_reentrant=reentrant)

    given = [*sides(31, 31), logits]
    results = []
    for function in (saved, act):
        leaves = [side.detach().requires_grad_() for side in given]
        output, lse = function(*leaves)
        (output.square().sum() + lse.square().sum()).backward()
        results.append([output, lse, *(leaf.grad for leaf in leaves)])
    same(*results, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_takes_each_step_in_its_dtype(kernel: str):
    """Rotated queries and keys in float32 beside lower values, and gradients in the dtype of each leaf."""
    query, key, value = sides(31, 31, dtype=torch.float32)
    value = value.detach().to(torch.bfloat16).requires_grad_()
    logits = torch.zeros(HEADS, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key, value, LongMixed(9), scores=Sinks(logits), kernel=kernel)
    low = [side.detach().to(torch.bfloat16).requires_grad_() for side in (query, key, value)]
    right = attend(*low, LongMixed(9), scores=Sinks(logits), kernel=kernel)
    assert output.dtype == torch.bfloat16 and torch.equal(output, right)
    gradients = torch.autograd.grad(output.sum(), (query, key, value, logits))
    expected = torch.autograd.grad(right.sum(), (*low, logits))
    for got, truth, leaf in zip(gradients, expected, (query, key, value, logits), strict=True):
        assert got.dtype == leaf.dtype and torch.equal(got, truth.to(leaf.dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_float16_is_near_float64(pattern: Pattern, kernel: str):
    low = sides(97, 97, dtype=torch.float16)
    exact = [side.detach().double().requires_grad_() for side in low]
    for got, truth in zip(
        graded(lambda *given: (attend(*given, pattern, kernel=kernel).float(),), low),
        graded(lambda *given: (attend(*given, pattern),), exact),
        strict=True,
    ):
        # Ten bits of a number, and a sum over up to a hundred of them.
        torch.testing.assert_close(got.double(), truth, rtol=2**-8, atol=2**-8 * truth.abs().max().item())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["every other", "backwards in memory", "one head for all", "narrowed"])
def test_gradients_fit_any_layout(layout: str, kernel: str):
    def laid_out(side: torch.Tensor) -> torch.Tensor:
        if layout == "every other":
            return side.repeat_interleave(2, dim=2)[:, :, ::2]
        if layout == "backwards in memory":
            return side.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        if layout == "one head for all":
            return side[:, :1].expand(side.shape)
        return torch.cat([side, side], dim=-1)[..., 3 : 3 + WIDTH]

    given = sides(31, 31)

    def act(*tensors):
        return attend_with_lse(*map(laid_out, tensors), LongMixed(9), kernel=kernel)

    def plainly(*tensors):
        copies = [laid_out(side).contiguous() for side in tensors]
        return attend_with_lse(*copies, LongMixed(9), kernel=kernel)

    same(graded(act, given), graded(plainly, given))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_what_is_no_real_number_is_refused(dtype: torch.dtype):
    side = torch.ones(1, 2, 3, 4).to(dtype)
    with pytest.raises(ShapeError) as raised:
        attend(side, side, side, Causal())
    kind = f"[1, 2, 3, 4] {str(dtype).removeprefix('torch.')}, cpu"
    assert (
        str(raised.value)
        == f"""Query, key and value share one floating-point dtype.
  pattern  Causal()
  query    {kind}
  key      {kind}
  value    {kind}
  queries  the last ones
  try      tensor.to(query.dtype)"""
    )


@pytest.mark.parametrize("pattern", [BigBird(16), Causal() & (Window(16) | Keys([3, 77]))], ids=str)
def test_keys_that_are_gathered_take_gradients_in_bfloat16(pattern: Pattern):
    """They are added up in another dtype than they come in."""
    grads = []
    for dtype, kernel in ((torch.bfloat16, "sdpa"), (torch.float64, "reference")):
        leaves = [side.bfloat16().to(dtype).detach().requires_grad_() for side in sides(200, 200)]
        attend(*leaves, pattern, kernel=kernel).sin().sum().backward()
        grads.append([leaf.grad.double() for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm()
