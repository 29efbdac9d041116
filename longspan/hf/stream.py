"""Stream: behind transformers' `past_key_values`, a window and sinks whose places are counted within the cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from longspan.attend import attend_with_lse
from longspan.errors import InputError, PatternError, PlanError, ShapeError, message
from longspan.frequency import Frequency
from longspan.hf.attention import attention_modules
from longspan.hf.batch import Batch
from longspan.hf.cache import PatternCache, PatternLayer
from longspan.hf.rope import from_config
from longspan.kernel.merge import merge
from longspan.pattern import Causal, Pattern, Sink, SlidingWindow, Streaming, Window
from longspan.pattern.base import Intersection
from longspan.rope import shift
from longspan.score import Score, Sinks

# Tokens on which a model is read with its own positions and with ours, and how far the two may lie apart.
_PROBE = 16
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
_LOW_ROUNDING = 0.1


class StreamCache(PatternCache):
    """A cache of constant size in which a model reads on without end, at distances that it was trained for.

    Law: every query is turned as if the keys that it reads lay at places 0, 1, 2 and so on, and it at the last of
    them: StreamingLLM. So no distance reaches `window + sinks`, however long the text; a key in the window lies as
    far away as in the text, and only sinks come nearer. Pieces of any size give what token by token gives, up to
    the rounding of one rotation.

    Inside `with`, the model's rotary positions are held at 0, where turning changes nothing (the cosine is 1 and the
    sine 0, exactly), and keys are held so. They are turned at every reading, so no error adds up over a text. In
    there the model reads through this cache alone, and refuses all else.

    Args:
        model: a decoder with rotary positions on which `set_pattern` set `Streaming` or `SlidingWindow`, wrapped or
            not. A window of its own narrows the pattern.

    Raises:
        PatternError: a model without patterns, or with others.
        InputError: positions that are not rotary, vary with the length or are turned in a way unknown here: found by
            reading a few tokens both ways.
        PlanError, ShapeError: by the model's forward: padding, another cache or none, a cache outside of `with`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from longspan.hf import set_pattern
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
        >>> set_pattern(model, Streaming(16, sinks=4))
        >>> options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        >>> with StreamCache(model) as cache:
        ...     found = model.generate(torch.arange(3, 43)[None], past_key_values=cache, **options)
        >>> found.shape, cache.get_seq_length(), cache.nbytes == 2 * 2 * (15 + 4) * 32 * 4
        (torch.Size([1, 60]), 59, True)

    References:
        Xiao et al., StreamingLLM (arXiv 2309.17453), section 3.2.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        modules = attention_modules(model)
        frequency = from_config(modules[0].config)
        rotaries = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
        owners = [module for module in model.modules() if hasattr(module, "rotary_emb")]
        if frequency.varies or not rotaries:
            raise _unknown(model, "they vary with the length" if frequency.varies else "no module turns them")
        self.layers = [
            StreamLayer(layer.module(), frequency, self)
            for layer in self.layers
            if isinstance(layer, PatternLayer)
        ]
        for layer in self.layers:
            layer.family = self.layers
            _bounds(layer.setting.pattern)
        # Weak, as a cache that outlives its model shall not hold its weights.
        self._rotaries, self._owners = weakref.WeakSet(rotaries), weakref.WeakSet(owners)
        self._hooks: list[Any] = []
        self._check_turning(model)

    def __enter__(self) -> Self:
        if not self._hooks:
            self._hooks = [
                rotary.register_forward_pre_hook(_at_zero, with_kwargs=True) for rotary in self._rotaries
            ]
            self._hooks += [
                owner.register_forward_pre_hook(self._through_here, with_kwargs=True)
                for owner in self._owners
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def open(self) -> bool:
        """Whether this is inside `with`, so that keys come unturned."""
        return bool(self._hooks)

    def __str__(self) -> str:
        return (
            f"StreamCache: {self.get_seq_length()} tokens read, {self.nbytes:,} bytes in {len(self)} layers"
        )

    def _through_here(self, module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        if options.get("past_key_values") is not self:
            raise PlanError(
                message(
                    "Inside `with`, this model reads through its StreamCache alone.",
                    {"why": "its positions are held at 0, which no other cache knows of"},
                    fix="past_key_values=cache, or leave the `with` first",
                )
            )

    def _check_turning(self, model: nn.Module) -> None:
        """Read a few tokens with the model's own positions and with ours, which must not differ."""
        size = model.get_input_embeddings().weight.shape[0]
        tokens = min(_PROBE, *(_bounds(layer.setting.pattern)[0] for layer in self.layers))
        ids = (torch.arange(tokens, device=model.device) * 7919 % size)[None]
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                wanted = model(ids, use_cache=False).logits.double()
                with self:
                    error = (model(ids, past_key_values=self).logits.double() - wanted).abs().max()
        finally:
            model.train(training)
            self.reset()
        if not error <= _ROUNDING.get(model.dtype, _LOW_ROUNDING) * wanted.abs().max():
            raise _unknown(model, f"turned anew, {tokens} tokens give logits that differ by {error:.3g}")


class StreamLayer(PatternLayer):
    """One layer of a `StreamCache`."""

    def __init__(self, module: nn.Module, frequency: Frequency, owner: StreamCache) -> None:
        super().__init__(module, {})
        self.frequency, self._owner = frequency, weakref.ref(owner)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        batch: Batch,
        scale: float | None,
        scores: Sequence[Score],
    ) -> Tensor:
        """Return attention `[batch, length, heads, width]` of the new tokens, and take them in."""
        self._check(module, pattern, batch, key.shape[2])
        if not self._owner().open:
            raise self._refuse(
                "keys reach it turned to places in the text", "with StreamCache(model) as cache: ..."
            )
        if batch.real is not None:
            raise self._refuse("some of the tokens are padding", "one text, or rows of one length")
        if torch.is_grad_enabled() and key.requires_grad:
            raise self._refuse("it carries no gradient", "with torch.no_grad()")
        window, sinks = _bounds(pattern)
        kept = self.kept or Kept.empty(key, value)
        if kept.keys.shape[0] != key.shape[0]:
            raise self._refuse(
                f"it holds {kept.keys.shape[0]} rows, and {key.shape[0]} came",
                "cache.reset() for other texts",
            )
        keys, values = torch.cat([kept.keys, key], dim=2), torch.cat([kept.values, value], dim=2)
        first = [
            torch.cat([before, new[:, :, : sinks - before.shape[2]]], dim=2)
            for before, new in ((kept.first_keys, key), (kept.first_values, value))
        ]
        read = self.columns + query.shape[2]
        if query.shape[2] == 1:
            outside = min(sinks, max(0, read - window))
            every = [
                torch.cat([before[:, :, :outside], after], dim=2)
                for before, after in zip(first, (keys, values), strict=True)
            ]
            # What one query reads lies in order, so its places are counted once for sinks and window.
            output = self._recent(query, *every, Causal(), scale, scores)[0]
        else:
            recent = self._recent(query, keys, values, Causal() & Window(window), scale, scores)
            output = recent[0]
            if sinks and read > window:
                output = merge([recent, self._sinks(query, *first, window, sinks, scale, scores)])[0]
        stay = max(0, keys.shape[2] - (window - 1))
        # Copies, for views would hold the whole piece.
        self.kept = Kept(keys[:, :, stay:].clone(), values[:, :, stay:].clone(), *first, length=read)
        self.pattern = pattern
        self.columns = read
        return output.transpose(1, 2).contiguous()

    def _recent(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pattern: Pattern,
        scale: float | None,
        scores: Sequence[Score],
    ) -> tuple[Tensor, Tensor]:
        """Read keys at places 0, 1, 2 and so on, the last of which are the queries' own."""
        places = torch.arange(key.shape[2], device=key.device)
        return attend_with_lse(
            shift(query, places[-query.shape[2] :], self.frequency),
            shift(key, places, self.frequency),
            value,
            pattern,
            scale=scale,
            scores=scores,
        )

    def check_crop(self, tokens_to_remove: int) -> None:
        raise _one_way(f"crop({tokens_to_remove})")

    def _sinks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int,
        sinks: int,
        scale: float | None,
        scores: Sequence[Score],
    ) -> tuple[Tensor, Tensor]:
        """Read the sinks that lie before the window of a query, which lies at the last place of a full cache."""
        last = window + sinks - 1
        tokens = query.shape[2]
        places = torch.arange(self.columns, self.columns + tokens, device=query.device).clamp(max=last)
        # From there on all queries read all sinks, so that one plan serves the whole text.
        start = min(self.columns, last)
        return attend_with_lse(
            shift(query, places, self.frequency),
            shift(key, torch.arange(key.shape[2], device=key.device), self.frequency),
            value,
            (Causal() & Sink(sinks)) - Window(window),
            queries=range(start, start + tokens),
            scale=scale,
            # A learned sink is in the softmax once.
            scores=[score for score in scores if not isinstance(score, Sinks)],
        )


@dataclass(frozen=True)
class Kept:
    """Keys and values of one layer, unturned: those of the window, and the first of the text.

    Attributes:
        keys, values, first_keys, first_values: `[batch, key heads, tokens, width]`.
        length: tokens read.
    """

    keys: Tensor
    values: Tensor
    first_keys: Tensor
    first_values: Tensor
    length: int

    @classmethod
    def empty(cls, key: Tensor, value: Tensor) -> Kept:
        return cls(*(side[:, :, :0] for side in (key, value, key, value)), length=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens read in each row."""
        return [self.length] * len(self.keys)

    @property
    def nbytes(self) -> int:
        sides = (self.keys, self.values, self.first_keys, self.first_values)
        return sum(side.numel() * side.element_size() for side in sides)

    def select(self, rows: Tensor) -> None:
        raise _one_way("other rows of the batch, as beams are")


def _one_way(asked: str) -> ShapeError:
    return ShapeError(
        message(
            "A StreamCache only reads on.",
            {"asked": asked, "why": "keys that left the window are gone"},
            fix="PatternCache(model, undo=tokens), whose places are those of the text",
        )
    )


def _bounds(pattern: Pattern) -> tuple[int, int]:
    """Return the window and the sinks of a pattern.

    Raises:
        PatternError: it is no window with or without sinks.
    """
    operands = pattern.operands if isinstance(pattern, Intersection) else (pattern,)
    windows, streams = [], []
    for part in operands:
        if isinstance(part, Streaming):
            streams.append(part)
        elif isinstance(part, SlidingWindow | Window):
            windows.append(part.window if isinstance(part, SlidingWindow) else part.size)
        elif not isinstance(part, Causal):
            raise _refusal(pattern)
    narrowest = min(windows, default=None)
    if len(streams) == 1 and narrowest is None:
        return streams[0].window, streams[0].sinks
    if narrowest is not None and all(stream.window >= narrowest for stream in streams):
        return narrowest, 0
    raise _refusal(pattern)


def _refusal(pattern: Pattern) -> PatternError:
    return PatternError(
        message(
            "Places in the cache are counted for a window, with or without sinks.",
            {"pattern": str(pattern)},
            fix="Streaming(508, sinks=4) or SlidingWindow(512); PatternCache(model) for any other pattern",
        )
    )


def _at_zero(
    module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn nothing: integer tensors are the positions that a rotary module is asked for."""

    def zeroed(item: Any) -> Any:
        return torch.zeros_like(item) if isinstance(item, Tensor) and not item.is_floating_point() else item

    return tuple(map(zeroed, given)), {name: zeroed(item) for name, item in options.items()}


def _unknown(model: nn.Module, reason: str) -> InputError:
    return InputError(
        message(
            "This model's positions cannot be counted within a cache.",
            {"model": type(model).__name__, "why": reason},
            fix="PatternCache(model), or --places text: places are then those of the text",
        )
    )
