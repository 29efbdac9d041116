"""Batch: which sequences it holds, as transformers tells the function that it asks for a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from longspan.errors import ShapeError, message
from longspan.hf.captured import RESTARTING, capturing, hidden, padded, required
from longspan.hf.segment import Segment, attend_segments, unpacked, unpadded, whole
from longspan.hf.traced import Outline
from longspan.pattern import Pattern
from longspan.score import Score

# What every mask is while a text is split among ranks: the batch as all of them together hold it.
SHARED: ContextVar[Batch | None] = ContextVar("shared", default=None)
# What stops a captured graph, see also `RESTARTING`.
_AHEAD = "some tokens read later ones, and the graph was captured for causal attention"


@dataclass(frozen=True)
class Batch:
    """What every layer is handed in place of a mask.

    Attributes:
        segments: the sequences in the batch.
        shape: rows and query columns.
        keys: columns of the key tensor that they were counted in, the first ones.
        window: the window that the model itself asks for on this kind of layer, in tokens, or None.
        masked: whether a mask told where tokens are; positions that restart mean documents only without one.
        spare: columns after these that a cache of fixed size has room for, and hold nothing yet.
        seen: the positions that were looked at last, how often they had been written to, and whether they restart.
    """

    segments: tuple[Segment, ...]
    shape: tuple[int, int]
    keys: int
    window: int | None
    masked: bool
    spare: int = field(default=0, kw_only=True)
    seen: list[tuple[Tensor, int | None, bool]] = field(
        default_factory=list, kw_only=True, repr=False, compare=False
    )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        *,
        scale: float | None,
        scores: Sequence[Score],
    ) -> Tensor:
        """Let each sequence attend by itself, see `attend_segments`."""
        return attend_segments(query, key, value, pattern, self.segments, scale=scale, scores=scores)

    def restarts(self, positions: Tensor) -> bool:
        """Say whether positions `[rows, columns]` jump, as in packed documents; layers that are told of the same ones
        look once. While a CUDA graph is captured they must not, which it checks each time it runs."""
        written = None if positions.is_inference() else positions._version
        if not self.seen or self.seen[0][0] is not positions or self.seen[0][1] != written:
            follow = positions.diff() == 1
            if capturing(positions.device):
                required(follow, RESTARTING)
                found = False
            else:
                found = not bool(follow.all())
            self.seen[:] = [(positions, written, found)]
        return self.seen[0][2]

    @cached_property
    def real(self) -> Tensor | None:
        """Which query columns are tokens, bool `[rows, columns]`; None where all are."""
        if len(self.segments) == 1 and self.segments[0].covers(*self.shape):
            return None
        real = torch.zeros(self.shape, dtype=torch.bool)
        for segment in self.segments:
            columns = torch.zeros(self.shape[1], dtype=torch.bool)
            columns[_on_cpu(segment.queries)] = True
            real[_on_cpu(segment.rows)] |= columns
        return real

    @cached_property
    def starts(self) -> list[int] | None:
        """How many tokens each row had before these; None where a row has none here, so that nobody knows."""
        if self.real is None:
            return [self.segments[0].before(self.shape[1], self.keys)] * self.shape[0]
        starts = torch.full((self.shape[0],), -1)
        for segment in self.segments:
            starts[_on_cpu(segment.rows)] = segment.before(self.shape[1], self.keys)
        return None if (starts < 0).any() else starts.tolist()


def describe(
    *,
    config: PretrainedConfig,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> Batch | Outline | Tensor:
    """Return the sequences of a batch; transformers calls this once per forward and kind of layer.

    The signature is that of transformers' mask functions. Whatever a pattern cannot stand for is refused.

    Args:
        config: of the model.
        batch_size, q_length, kv_length: shape of the scores.
        mask_function: transformers' formula of the mask, which knows of packed documents.
        q_offset: tokens read before the first query.
        kv_offset: first tokens whose keys the cache has let go.
        attention_mask: bool `[batch, tokens]`, false on padding, or None.
        local_size: the window or chunk that the model asks for on these layers.
        options: everything else that a mask function is told.

    Returns:
        A `Batch`, or where a graph is traced an `Outline`. Outside of graphs the batch is marked on an empty 4-D tensor:
        for caches of fixed size `generate` asks before the model does, and the model passes on what looks like a mask.

    Raises:
        ShapeError: a mask that is not 2-D or does not cover the tokens, one that is not causal or that the model
            changes by a rule of its own, attention in chunks, more tokens than a cache of fixed size has room for, or
            a cache that dropped keys that the model still reads; while a CUDA graph is captured, a 2-D mask and a
            cache of fixed size, whose contents nobody can look at.
    """
    device = torch.device(options.get("device", "cpu"))
    held = capturing(device)
    if held and (isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length):
        raise hidden(
            f"a cache of fixed size, with room for {kv_offset + kv_length} tokens",
            why="how much of it is filled decides what is computed, and is on the device",
            fix="a cache that grows, past_key_values=DynamicCache(), for a graph of one step; or no graph",
        )
    end = int(q_offset) + q_length
    if "allow_is_bidirectional_skip" in options:
        raise refusal(config, "its attention is not causal", fix="a causal decoder")
    if options.get("use_vmap"):
        raise refusal(config, "it joins a rule of its own to the causal mask", fix="input that is text alone")
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise refusal(
            config,
            f"its layers read in chunks of {local_size} tokens, which are not supported yet",
            fix="a model with full attention or a sliding window",
        )
    spare = kv_offset + kv_length - end
    tracing = torch.compiler.is_compiling() and not (kv_offset or spare) and _traceable()
    shared = None if tracing else SHARED.get()
    if shared is not None:
        return replace(shared, window=local_size)
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, end):
        raise refusal(
            config,
            f"the mask has shape {list(attention_mask.shape)}, and there are {batch_size} rows of {end} tokens",
            fix="a mask [batch, tokens] that covers the tokens in the cache and the new ones",
        )
    if spare < 0:
        raise refusal(
            config,
            f"its cache has room for {kv_offset + kv_length} keys, and there are {end} tokens",
            fix="a larger cache, or one that grows, past_key_values=DynamicCache()",
        )
    kv_length -= spare
    if kv_offset and local_size is None:
        raise refusal(
            config,
            f"its cache dropped the first {kv_offset} keys, and no window says that they are not read",
            fix="a cache that keeps them, past_key_values=DynamicCache()",
        )
    packed = q_length == kv_length and not options.get("allow_is_causal_skip", True)
    if tracing:
        joined = _joined(mask_function, device, batch_size, q_length) if packed else None
        return Outline(attention_mask, joined, kv_length, local_size)
    if held:
        if attention_mask is not None:
            raise padded(attention_mask)
        if packed:
            # Transformers has not looked whether there are documents, either.
            required(~_formula(mask_function, device, batch_size, q_length, ahead=1), _AHEAD)
            required(_joined(mask_function, device, batch_size, q_length), RESTARTING)
        segments = whole(batch_size, q_length, kv_length, dropped=kv_offset)
    # The device is waited for once, however much is then looked at.
    elif attention_mask is not None and not (real := attention_mask.cpu()).all():
        _check_gaps(config, real, kv_offset)
        segments = unpadded(real, queries=q_length, dropped=kv_offset, device=device)
    elif packed:
        segments = unpacked(_continues(config, mask_function, device, batch_size, q_length))
    else:
        segments = whole(batch_size, q_length, kv_length, dropped=kv_offset)
    masked = attention_mask is not None
    batch = Batch(segments, (batch_size, q_length), kv_length, local_size, masked, spare=spare)
    return batch if torch.compiler.is_compiling() else _marked(batch, device)


def _marked(batch: Batch, device: torch.device) -> Tensor:
    mask = torch.empty((batch.shape[0], 1, batch.shape[1], 0), dtype=torch.bool, device=device)
    mask.longspan = batch
    return mask


def settled(outline: Outline, rows: int, length: int) -> Batch:
    """Return the batch that a graph knew the outline of."""
    segments = outline.segments(rows, length)
    return Batch(segments, (rows, length), outline.keys, outline.window, outline.real is not None)


@torch.compiler.assume_constant_result
def _traceable() -> bool:
    """Say whether a graph may hold attention as one operation; asked while it is traced."""
    return SHARED.get() is None


def refusal(config: PretrainedConfig, reason: str, *, fix: str) -> ShapeError:
    """Return the error for a batch that a pattern cannot be applied to."""
    return ShapeError(
        message(
            "This batch cannot be read by a pattern.", {"model": config.model_type, "why": reason}, fix=fix
        )
    )


def _on_cpu(part: slice | Tensor) -> slice | Tensor:
    return part.cpu() if isinstance(part, Tensor) else part


def _check_gaps(config: PretrainedConfig, real: Tensor, dropped: int) -> None:
    """A cache drops keys by their column. With padding in between, a window over real tokens reaches further."""
    reaches_back = real[:, :dropped].any(dim=1) & ~real[:, dropped:].all(dim=1)
    if reaches_back.any():
        row = int(reaches_back.nonzero()[0])
        raise refusal(
            config,
            f"row {row} has padding between its tokens, and its cache has dropped keys that the window still reads",
            fix="padding on the left, or a cache that keeps all keys, past_key_values=DynamicCache()",
        )


def _continues(
    config: PretrainedConfig, mask_function: Callable, device: torch.device, batch: int, length: int
) -> Tensor:
    """Return which tokens continue the one before them, where none reads a later one."""
    if _formula(mask_function, device, batch, length, ahead=1).any():
        raise refusal(config, "some of its tokens read later ones", fix="input that is text alone")
    return _joined(mask_function, device, batch, length)


def _joined(mask_function: Callable, device: torch.device, batch: int, length: int) -> Tensor:
    """Ask the formula for every token whether it reads the one before: within a document, and only there."""
    return _formula(mask_function, device, batch, length, ahead=0).expand(batch, length - 1)


def _formula(mask_function: Callable, device: torch.device, batch: int, length: int, *, ahead: int) -> Tensor:
    """Ask the formula whether tokens read the one before them, or with `ahead` whether that one reads them."""
    rows = torch.arange(batch, device=device)[:, None]
    later = torch.arange(1, length, device=device)[None, :]
    head = torch.zeros((), dtype=torch.long, device=device)
    return mask_function(rows, head, later - ahead, later - 1 + ahead)
