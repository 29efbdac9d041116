"""The streamed mixture is the mixture, at lengths of which several segments and chunks are few."""

from __future__ import annotations

import pytest
import stream
import torch

from longspan import LongNet, attend


@pytest.mark.parametrize(
    ("tokens", "chunk", "first"), [(256, 32, 8), (192, 64, 4), (128, 128, 16), (96, 8, 4)]
)
def test_the_stream_is_exact(tokens: int, chunk: int, first: int):
    """On every query against float64, which is the library's own mixture of the whole text."""
    segments, dilations = stream.mixture(tokens, first=first, growth=2)
    source = stream.generated(8, torch.device("cpu"), torch.float64)
    done = stream.read(source, tokens, segments, dilations, chunk=chunk, samples=range(tokens))
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
        keys = stream._read_by(q, segments, dilations)
        own, _ = stream._sums(whole[0][0, 0, q], whole[1][0, 0, keys], whole[2][0, 0, keys])
        torch.testing.assert_close(own, truth[0, 0, q], rtol=0, atol=1e-12)


def test_a_key_too_few_is_found(monkeypatch: pytest.MonkeyPatch):
    """The check can fail."""
    segments, dilations = stream.mixture(128, first=8, growth=2)
    source = stream.generated(8, torch.device("cpu"), torch.float64)
    right = stream._read_by
    monkeypatch.setattr(stream, "_read_by", lambda *asked: right(*asked)[1:])
    assert stream.read(source, 128, segments, dilations, chunk=32, samples=[100]).worst > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_budget_is_smaller_than_what_a_key_is_worth(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """In the precision of the text, as on a device: what is read rightly is within it, one key too few is not."""
    segments, dilations = stream.mixture(1_024, first=16, growth=4)
    source = stream.generated(16, torch.device("cpu"), dtype)
    samples = stream.telling(1_024, dilations)
    right = stream._read_by

    def read() -> stream.Reading:
        return stream.read(source, 1_024, segments, dilations, chunk=64, samples=samples)

    assert read().worst <= read().budget
    monkeypatch.setattr(stream, "_read_by", lambda *asked: right(*asked)[1:] or right(*asked))
    assert read().worst > 2 * read().budget


def test_every_term_is_among_what_is_checked():
    """Most positions are kept by the short ones alone."""
    segments, dilations = stream.mixture(1_024, first=16, growth=4)
    samples = stream.telling(1_024, dilations)
    for segment, dilation in zip(segments, dilations, strict=True):
        assert any(q % segment % dilation == 0 and q % segment >= segment - dilation for q in samples)
