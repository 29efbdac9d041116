"""Recurrence: a text in segments, each reading the keys and values of those before it, through which no gradient flows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from longspan.attention import attend
from longspan.cache.origin import moved
from longspan.errors import InputError, PlanError, message
from longspan.hf.batch import Batch
from longspan.hf.cache import PatternLayer, layers_of
from longspan.pattern import Causal, Chunk, Pattern, PerHead
from longspan.score import Score


def recurrent_losses(model: Any, ids: Tensor, *, segment: int, memory: int) -> Iterator[Tensor]:
    """Yield the loss of every segment of some texts; the caller goes backward from each before asking for the next.

    Law: the losses, evaluated, are those of one pass over the whole text with `pattern & recurrence(segment,
    memory=memory)`, where `pattern` is the model's own. Where `pattern` is a causal window of at most `memory + 1`
    tokens, that is the window itself, whatever the segments. Gradients are those of that one pass with all keys and
    values of earlier segments taken for constants.

    Memory and work per segment are constant, for training as for evaluation: use `torch.no_grad()` for the latter, or
    read by that pattern, which gives the same losses: `longspan read --pattern "Causal() & (Chunk(512) | Chunk(512,
    shift=512))"`.

    Args:
        model: a causal language model of transformers with patterns set, `Causal()` for plain Transformer-XL.
        ids: int64 `[batch, tokens]`, without padding, at least 2 tokens.
        segment: tokens of a segment, at least 1.
        memory: tokens before a segment whose keys and values it may read, at least 0.

    Yields:
        Mean loss of the tokens that a segment guesses: its own but the first, and the first of the next.

    Raises:
        InputError: texts or sizes outside their ranges, or activations that are computed anew on the way back.
        PatternError: a model without patterns.

    Example:
        >>> from longspan.hf import load_model, set_pattern
        >>> model, _ = load_model()
        >>> set_pattern(model, Causal())
        >>> for loss in recurrent_losses(model, torch.arange(100)[None], segment=40, memory=40):
        ...     loss.backward()

    References:
        Dai et al., Transformer-XL (arXiv 1901.02860), section 3.2. Positions are the model's own: rotary ones are
        relative too, which is what section 3.3 asks for.
    """
    if ids.dim() != 2 or ids.shape[1] < 2 or segment < 1 or memory < 0:
        raise InputError(
            message(
                "Segments of a token or more are cut from texts of two tokens or more.",
                {"asked": f"ids {list(ids.shape)}, segment={segment}, memory={memory}"},
                fix="ids [batch, tokens], segment=512, memory=512",
            )
        )
    recomputing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if model.training and recomputing:
        raise InputError(
            message(
                "Segments cannot be carried where activations are computed anew on the way back.",
                {"model": type(model).__name__, "why": "transformers then passes no cache to its layers"},
                fix="model.activation_checkpointing_disable(); one segment at a time is held anyway",
            )
        )
    carried = Carried(model, memory=memory)
    for begin in range(0, ids.shape[1] - 1, segment):
        targets = ids[:, begin + 1 : begin + 1 + segment]
        logits = model(ids[:, begin : begin + segment], past_key_values=carried, use_cache=True).logits
        guesses = logits[:, : targets.shape[1]].flatten(0, 1)
        exact = torch.promote_types(guesses.dtype, torch.float32)
        yield F.cross_entropy(guesses.to(exact), targets.flatten())


def recurrence(segment: int, *, memory: int) -> Pattern:
    """Return what segments read that carry the keys of those before: the pattern view of Transformer-XL.

        # . . . . .        recurrence(2, memory=2)
        # # . . . .
        # # # . . .
        # # # # . .
        . . # # # .
        . . # # # #

    The formula is `k <= q` and `k >= (q div segment) * segment - memory`.

    Args:
        segment: tokens of a segment, at least 1.
        memory: tokens before a segment that it reads, a multiple of `segment`.

    Raises:
        InputError: memory that is no multiple of the segment.
        PatternError: a segment that is no positive integer.

    Example:
        >>> recurrence(2, memory=2)
        Causal() & (Chunk(2) | Chunk(2, shift=2))
    """
    own: Pattern = Chunk(segment)
    if memory < 0 or memory % segment:
        raise InputError(
            message(
                "The memory is written as a pattern in whole segments.",
                {"asked": f"segment={segment}, memory={memory}"},
                fix=f"memory={max(1, round(memory / segment)) * segment}",
            )
        )
    for shift in range(segment, memory + 1, segment):
        own = own | Chunk(segment, shift=shift)
    return Causal() & own


class Carried(Cache):
    """Behind transformers' `past_key_values`: the last keys and values before a segment, as constants.

    Args:
        model: a decoder that `set_pattern` was called on.
        memory: tokens that are carried, at least 0.

    Raises:
        PatternError: a model without patterns.
    """

    def __init__(self, model: nn.Module, *, memory: int) -> None:
        super().__init__(layers=layers_of(model, CarriedLayer, {"memory": memory}))


class CarriedLayer(PatternLayer):
    """One layer of `Carried`."""

    key: Tensor | None = None
    value: Tensor | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        batch: Batch,
        scale: float | None,
        scores: Sequence[Score],
    ) -> Tensor:
        """Return attention `[batch, length, heads, width]` of a segment, and carry what the next may read."""
        if batch.real is not None:
            raise PlanError(
                message(
                    "Segments of padded texts cannot be carried on.",
                    {"why": "a pattern counts tokens, and carried columns would hold padding"},
                    fix="texts of one length, cut from documents end to end",
                )
            )
        if self.key is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        first = self.columns + query.shape[2] - key.shape[2]
        heads = query.shape[1]
        seen = tuple(moved(pattern.at_head(head, heads), first) for head in range(heads))
        output = attend(
            query,
            key,
            value,
            seen[0] if len(set(seen)) == 1 else PerHead(seen),
            scale=scale,
            scores=scores,
        )
        self.columns += query.shape[2]
        stay = max(0, key.shape[2] - self.options["memory"])
        # Copies without a past: a view would hold the whole segment and its graph.
        self.key, self.value = (side[:, :, stay:].detach().clone() for side in (key, value))
        self.pattern = pattern
        return output.transpose(1, 2).contiguous()

    def reset(self) -> None:
        super().reset()
        self.key = self.value = None
