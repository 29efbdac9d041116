"""Stream: behind transformers' `past_key_values`, a window and sinks whose places are counted within the cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attend import attend_with_lse
from longspan.errors import InputError, PatternError, PlanError, ShapeError, message
from longspan.hf.attention import attention_modules
from longspan.hf.batch import Batch
from longspan.hf.buffer import Buffer
from longspan.hf.cache import PatternCache, PatternLayer, related
from longspan.hf.rope import from_config
from longspan.kernel.merge import merge
from longspan.pattern import Causal, Pattern, Sink, SlidingWindow, Streaming, Window
from longspan.pattern.base import Intersection
from longspan.rope import displacement, shift
from longspan.score import Score, Sinks

# Tokens on which a model is read with its own positions and with ours, and how far the two may lie apart.
_PROBE = 16
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
_LOW_ROUNDING = 0.1
# Tokens that the base moves on by at least, so that short windows are not turned all the time.
_LEAST = 64


class StreamCache(PatternCache):
    """A cache of constant size in which a model reads on without end, at distances that it was trained for.

    Law: every query is turned as if the keys that it reads lay at places 0, 1, 2 and so on, and it at the last of
    them: StreamingLLM. So no distance reaches `window + sinks`, however long the text; a key in the window lies as
    far away as in the text, and only sinks come nearer. Pieces of any size give what token by token gives, up to
    the rounding of three rotations, however long the text.

    Inside `with`, the model counts positions from a base that moves along with the text, so that no angle grows large.
    Keys are held turned to such places. When the base moves, which is once in a window, they are turned by as much, at
    most twice each; only sinks, which are few, are turned for every token, from their first places. In there the model
    reads through this cache alone, and refuses all else.

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
        >>> found.shape, cache.get_seq_length(), cache.nbytes == 2 * 2 * (16 + 4 + 4) * 32 * 4
        (torch.Size([1, 60]), 59, True)

    References:
        Xiao et al., StreamingLLM (arXiv 2309.17453), section 3.2.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        modules = attention_modules(model)
        self.frequency, self.base = from_config(modules[0].config), 0
        rotaries = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
        owners = [module for module in model.modules() if hasattr(module, "rotary_emb")]
        if self.frequency.varies or not rotaries:
            raise _unknown(
                model, "they vary with the length" if self.frequency.varies else "no module turns them"
            )
        self.layers = related([StreamLayer(layer.module(), self) for layer in self.layers])
        self._window = max(bounds(layer.setting.pattern)[0] for layer in self.layers)
        self._turns: tuple[Any, list[tuple[Tensor, Tensor]]] | None = None
        # Weak, as a cache that outlives its model shall not hold its weights.
        self._rotaries, self._owners = weakref.WeakSet(rotaries), weakref.WeakSet(owners)
        self._hooks: list[Any] = []
        self._check_turning(model)

    def __enter__(self) -> Self:
        if not self._hooks:
            self._hooks = [
                rotary.register_forward_pre_hook(self._places, with_kwargs=True) for rotary in self._rotaries
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

    def reset(self) -> None:
        """Forget everything, as if nothing had been read."""
        super().reset()
        self.base = 0

    def turned(self, width: int) -> int:
        """Return how many numbers of a head `width` wide are turned."""
        return 2 * self.frequency.angles_per_token(width).shape[-1]

    def turn(self, distance: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine `[width]` of a turn by so many tokens; found for many distances at a time."""
        block, place = divmod(distance, _LEAST)
        asked = (block, like.shape[3], like.dtype, like.device)
        if self._turns is None or self._turns[0] != asked:
            distances = torch.arange(block * _LEAST, (block + 1) * _LEAST, device=like.device)
            found = displacement(distances, self.frequency, width=like.shape[3])
            exact = torch.promote_types(like.dtype, torch.float32)
            rest = like.shape[3] - 2 * found.cos.shape[-1]
            cos, sin = (F.pad(side.to(exact).repeat(1, 2), (0, rest)) for side in (found.cos, found.sin))
            cos[:, like.shape[3] - rest :] = 1
            self._turns = asked, list(zip(cos, sin, strict=True))
        return self._turns[1][place]

    def _through_here(self, module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        if options.get("past_key_values") is not self:
            raise PlanError(
                message(
                    "Inside `with`, this model reads through its StreamCache alone.",
                    {"why": "its positions are counted from a base that no other cache knows of"},
                    fix="past_key_values=cache, or leave the `with` first",
                )
            )
        # The last layer is the last to count.
        read, step = self.layers[-1].columns, max(self._window, _LEAST)
        if read - self.base >= 2 * step:
            self.base = read - step

    def _places(
        self, module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Count positions from the base: integer tensors are the positions that a rotary module is asked for."""
        read = self.layers[-1].columns - self.base

        def counted(item: Any) -> Any:
            if not isinstance(item, Tensor) or item.is_floating_point():
                return item
            places = torch.arange(read, read + item.shape[-1], dtype=item.dtype, device=item.device)
            return places.expand(item.shape)

        return tuple(map(counted, given)), {name: counted(item) for name, item in options.items()}

    def _check_turning(self, model: nn.Module) -> None:
        """Read a few tokens with the model's own positions and with ours, which must not differ."""
        size = model.get_input_embeddings().weight.shape[0]
        tokens = min(_PROBE, *(bounds(layer.setting.pattern)[0] for layer in self.layers))
        ids = (torch.arange(tokens, device=model.device) * 7919 % size)[None]
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                wanted = model(ids, use_cache=False).logits.double()
                found = []
                with self:
                    # Keys of the first half are turned by the model to other places, and then by us.
                    for piece, self.base in ((ids[:, : tokens // 2], -_PROBE), (ids[:, tokens // 2 :], 0)):
                        if piece.numel():
                            found.append(model(piece, past_key_values=self).logits.double())
                error = (torch.cat(found, dim=1) - wanted).abs().max()
        finally:
            model.train(training)
            self.reset()
        if not error <= _ROUNDING.get(model.dtype, _LOW_ROUNDING) * wanted.abs().max():
            raise _unknown(model, f"turned anew, {tokens} tokens give logits that differ by {error:.3g}")


class StreamLayer(PatternLayer):
    """One layer of a `StreamCache`."""

    def __init__(self, module: nn.Module, owner: StreamCache) -> None:
        super().__init__(module, {})
        self._owner = weakref.ref(owner)

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
        """Return attention `[batch, length, heads, width]` of the new tokens, and take them in."""
        owner = self._owner()
        if not owner.open:
            raise self._refuse(
                "keys reach it turned to places in the text", "with StreamCache(model) as cache: ..."
            )
        if batch.real is not None:
            raise self._refuse("some of the tokens are padding", "one text, or rows of one length")
        if torch.is_grad_enabled() and key.requires_grad:
            raise self._refuse("it carries no gradient", "with torch.no_grad()")
        kept = self.kept
        if kept is None:
            window, sinks = bounds(pattern)
            turned = owner.turned(key.shape[3])
            kept = Buffer(key, value, window=window, sinks=sinks, base=owner.base, turned=turned)
        elif kept.rows != key.shape[0]:
            raise self._refuse(
                f"it holds {kept.rows} rows, and {key.shape[0]} came", "cache.reset() for other texts"
            )
        kept.rebase(owner.base, owner.frequency)
        if query.shape[2] == 1:
            kept.put(key, value)
            if kept.sinks and kept.length > kept.window:
                kept.turn(*owner.turn(self.columns - kept.base - self._place(kept), query))
            output = _last(query, kept, scale, scores)
        else:
            output = self._several(query, key, value, kept, scale, scores)
            kept.put(key, value)
        self.kept, self.pattern = kept, pattern
        self.columns += query.shape[2]
        return output.transpose(1, 2).contiguous()

    def check_crop(self, tokens_to_remove: int) -> None:
        raise _one_way(f"crop({tokens_to_remove})")

    def fork(self) -> PatternLayer:
        raise _one_way("a branch of it")

    def select(self, rows: Tensor) -> None:
        raise _one_way("other rows of the batch, as beams are")

    batch_select_indices = reorder_cache = select

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _one_way(f"{repeats} rows in place of each")

    def _place(self, kept: Buffer) -> int:
        """Return the place at which the next token reads the sinks."""
        return min(self.columns, kept.window + kept.sinks - 1)

    def _several(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kept: Buffer,
        scale: float | None,
        scores: Sequence[Score],
    ) -> Tensor:
        """Read the window and, where it has left them behind, the sinks, and merge."""
        window, sinks = kept.window, kept.sinks
        keys, values = (
            torch.cat([before, new], dim=2) for before, new in zip(kept.recent(), (key, value), strict=True)
        )
        # All of them lie at their distances.
        recent = attend_with_lse(query, keys, values, Causal() & Window(window), scale=scale, scores=scores)
        begin, end = self.columns, self.columns + query.shape[2]
        if not sinks or end <= window:
            return recent[0]
        last = window + sinks - 1
        positions = torch.arange(begin, end, device=query.device)
        owner = self._owner()
        # From the last place on all queries read all sinks, so that one plan serves the whole text.
        start = min(begin, last)
        far = attend_with_lse(
            shift(query, positions.clamp(max=last) - (positions - kept.base), owner.frequency),
            *kept.begun(key, value),
            (Causal() & Sink(sinks)) - Window(window),
            queries=range(start, start + end - begin),
            scale=scale,
            # A learned sink is in the softmax once.
            scores=[score for score in scores if not isinstance(score, Sinks)],
        )
        return merge([recent, far])[0]


def _last(query: Tensor, kept: Buffer, scale: float | None, scores: Sequence[Score]) -> Tensor:
    """Return what one query of each row reads, `[batch, heads, 1, width]`: all keys there are."""
    if scores:
        return attend_with_lse(query, *kept.read(), Causal(), scale=scale, scores=scores)[0]
    # The query heads of one key head become rows of one block, so that keys are read once.
    folded = query.reshape(len(query), kept.heads, -1, query.shape[3])
    output = kept.weigh(folded, query.shape[3] ** -0.5 if scale is None else scale)
    return output.reshape(*query.shape[:3], -1)


def _one_way(asked: str) -> ShapeError:
    return ShapeError(
        message(
            "A StreamCache only reads on.",
            {"asked": asked, "why": "keys that left the window are gone"},
            fix="PatternCache(model, undo=tokens), whose places are those of the text",
        )
    )


def bounds(pattern: Pattern) -> tuple[int, int]:
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


def _unknown(model: nn.Module, reason: str) -> InputError:
    return InputError(
        message(
            "This model's positions cannot be counted within a cache.",
            {"model": type(model).__name__, "why": reason},
            fix="PatternCache(model), or --places text: places are then those of the text",
        )
    )
