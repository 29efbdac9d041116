"""The streamed mixture is the mixture, at lengths of which several segments and chunks are few."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from longspan import LongNet, attend

STREAM = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "stream.py"))


@pytest.mark.parametrize(
    ("tokens", "chunk", "first"), [(256, 32, 8), (192, 64, 4), (128, 128, 16), (96, 8, 4)]
)
def test_the_stream_is_exact(tokens: int, chunk: int, first: int):
    """On every query against float64, which is the library's own mixture of the whole text."""
    segments, dilations = STREAM["mixture"](tokens, first=first, growth=2)
    source = STREAM["generated"](8, torch.device("cpu"), torch.float64)
    done = STREAM["read"](source, tokens, segments, dilations, chunk=chunk, samples=range(tokens))
    assert done.worst < 1e-12
    long = [
        segment // dilation for segment, dilation in zip(segments, dilations, strict=True) if segment > chunk
    ]
    assert done.kept <= sum(long)
    whole = [
        torch.cat(parts, dim=2)
        for parts in zip(*(source(at, chunk) for at in range(0, tokens, chunk)), strict=True)
    ]
    truth = attend(*whole, LongNet(segments, dilations), kernel="reference")
    for q in (0, tokens // 2, tokens - 1):
        keys = STREAM["_read_by"](q, segments, dilations)
        own = STREAM["_exact"](whole[0][0, 0, q], whole[1][0, 0, keys], whole[2][0, 0, keys])
        torch.testing.assert_close(own, truth[0, 0, q], rtol=0, atol=1e-12)


def test_a_key_too_few_is_found(monkeypatch: pytest.MonkeyPatch):
    """The check can fail."""
    segments, dilations = STREAM["mixture"](128, first=8, growth=2)
    source = STREAM["generated"](8, torch.device("cpu"), torch.float64)
    names, right = STREAM["read"].__globals__, STREAM["_read_by"]
    monkeypatch.setitem(names, "_read_by", lambda *asked: right(*asked)[1:])
    assert STREAM["read"](source, 128, segments, dilations, chunk=32, samples=[100]).worst > 1e-3
