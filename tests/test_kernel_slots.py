"""Slots: what a few queries read of keys that a cache holds equals attention as defined, however they are held."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch

from longspan.cache import Pages, Plain, Pool, Rounded
from longspan.kernel.native import compiler, native, slots

SIZES = [
    # Rows, key heads, queries that share one, numbers of a key and of a value, slots, first that is read.
    (1, 4, 2, 32, 32, 576, 61),
    (2, 1, 7, 20, 48, 101, 0),
    (3, 2, 1, 128, 5, 17, 16),
    (1, 2, 9, 64, 64, 1, 0),
]


@pytest.fixture(params=[*compiler.SETS, "none"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every library that this processor can run, and none at all."""
    name = request.param
    if name == "none":
        monkeypatch.setattr(slots, "_weigh", None)
        return name
    if not native.able(name) or not compiler.library(name).exists():
        pytest.skip(f"no library for {name}")
    monkeypatch.setattr(native, "_library", ctypes.CDLL(str(compiler.library(name))))
    for function, found in zip(("_weigh", "_put"), slots._functions(), strict=True):
        monkeypatch.setattr(slots, function, found)
    return name


def _expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    scores = query.double() @ key.double().mT * scale
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return weights @ value.double()


@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8", "pages"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_queries_read_what_is_held(library: str, size: tuple[int, ...], held: str):
    rows, heads, share, width, value_width, tokens, begin = size
    dtype = torch.bfloat16 if held == "bfloat16" else torch.float32
    torch.manual_seed(7)
    query = torch.randn(rows, heads, share, width).to(dtype)
    key, value = (torch.randn(rows, heads, tokens, wide).to(dtype) for wide in (width, value_width))
    if held == "pages":
        storage = Pages(Pool(rows * heads * tokens, size=5, width=width, value_width=value_width), key, value)
    else:
        storage = (Rounded if held == "int8" else Plain)(key, value)
    storage.keep(torch.zeros(1, 0, dtype=torch.bool), tokens)
    # Pages of rows and heads lie between each other.
    for first in range(0, tokens, 40):
        # Some in one piece, and then one by one.
        for some in (
            slice(first, first + 30),
            *(slice(one, one + 1) for one in range(first + 30, first + 40)),
        ):
            storage.append(key[:, :, some], value[:, :, some])
    biases = [None]
    for shape in ((1, 1, 1), (rows, 1, 1), (rows, heads, share)):
        bias = torch.randn(*shape, tokens - begin)
        bias[..., 1::3] = -torch.inf
        biases.append(bias)
    for side, whole in zip(storage.read(), (key, value), strict=True):
        largest = whole.float().abs().amax(-1, keepdim=True)
        assert ((side - whole).abs() <= largest / (250 if held == "int8" else torch.inf)).all()
    kept = [side[:, :, begin:] for side in storage.read()]
    for bias in biases:
        found = storage.weigh(query, bias, 0.3, begin)
        wanted = _expected(query, *kept, bias, 0.3)
        assert found.dtype == dtype and found.shape == wanted.shape
        error = 2e-2 if dtype == torch.bfloat16 else 5e-6
        assert (found - wanted).abs().max() <= error * wanted.abs().max()
    again = copy.deepcopy(storage) if held != "pages" else storage.select(torch.arange(rows))
    before = storage.weigh(query, None, 0.3, begin)
    storage.release()
    assert torch.equal(again.weigh(query, None, 0.3, begin), before)


def test_what_is_no_number_reaches_those_that_read_it(library: str):
    if library == "none":
        pytest.skip("PyTorch gives no number for what reads nothing; `Reading` makes it 0")
    key = torch.randn(1, 2, 30, 16)
    key[0, 1, 7], key[0, 0, 3] = torch.nan, torch.inf
    lying = slots.Slots(key, torch.randn(1, 2, 30, 16))
    bias = torch.zeros(1, 1, 2, 30)
    bias[:, :, 1] = -torch.inf
    output = lying.weigh(torch.ones(1, 2, 2, 16), bias, 1.0, 0, 30)
    assert output[0, :, 0].isnan().all() and (output[0, :, 1] == 0).all()
    assert lying.weigh(torch.randn(1, 2, 1, 16), None, 1.0, 8, 30).isfinite().all()
