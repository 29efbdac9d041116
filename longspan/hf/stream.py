"""Stream: behind transformers' `past_key_values`, a window and sinks whose places are counted within the cache."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from longspan.attention import attend_with_lse
from longspan.cache.form import Form, check
from longspan.errors import InputError, PatternError, message
from longspan.hf.attention import attention_modules
from longspan.hf.batch import Batch
from longspan.hf.buffer import Buffer
from longspan.hf.cache import PatternCache, PatternLayer, related
from longspan.hf.places import Places
from longspan.hf.rope import from_config
from longspan.hf.texts import Texts
from longspan.kernel.softmax.merge import merge
from longspan.pattern import Causal, Pattern, Sink, SlidingWindow, Streaming, Window
from longspan.pattern.base import Intersection
from longspan.rope import shift
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
    reads through this cache, its forks and copies alone, and refuses all else.

    Rows may be padded anywhere. Those that have had their tokens in the same columns are read together, others one
    after the other. Beams and rows are chosen, and tokens taken back, as in a `PatternCache`.

    Args:
        model: a decoder with rotary positions on which `set_pattern` set `Streaming` or `SlidingWindow`, wrapped or
            not. A window of its own narrows the pattern.
        undo: tokens that can always be taken back, which assisted decoding needs: how many are guessed at a time and
            one. With 0 all tokens can be, as long as the window holds the whole text, and then the last one.

    Raises:
        PatternError: a model without patterns, or with others.
        InputError: positions that are not rotary, vary with the length or are turned in a way unknown here: found by
            reading a few tokens both ways.
        ShapeError: an `undo` below 0. By the model's forward: a mask or batch that does not continue what was read,
            keys that want a gradient. By `crop`: keys that are gone.
        PlanError: by the model's forward: another cache or none, a cache outside of `with`.

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

    def __init__(self, model: nn.Module, *, undo: int = 0) -> None:
        super().__init__(model, undo=undo)
        modules = attention_modules(model)
        frequency = from_config(modules[0].config)
        rotaries = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
        owners = [module for module in model.modules() if hasattr(module, "rotary_emb")]
        if frequency.varies or not rotaries:
            raise _unknown(model, "they vary with the length" if frequency.varies else "no module turns them")
        self.places = Places(frequency, rotaries, owners)
        options = {"undo": undo, "places": self.places}
        self.layers = related([StreamLayer(layer.module(), options) for layer in self.layers])
        self._window = max(bounds(layer.setting.pattern)[0] for layer in self.layers)
        self._check_turning(model)

    def __enter__(self) -> Self:
        self.places.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.places.leave()

    def begin(self) -> int:
        """Return the place of the next token, before it is read; the base moves along here."""
        # The last layer is the last to count.
        read, step = self.layers[-1].columns, max(self._window, _LEAST)
        if read - self.layers[0].base >= 2 * step:
            self._move(read - step)
        return read - self.layers[0].base

    def __str__(self) -> str:
        return (
            f"StreamCache: {self.get_seq_length()} tokens read, {self.nbytes:,} bytes in {len(self)} layers"
        )

    def _move(self, base: int) -> None:
        for layer in self.layers:
            layer.base = base

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
                    for piece, base in ((ids[:, : tokens // 2], -_PROBE), (ids[:, tokens // 2 :], 0)):
                        self._move(base)
                        if piece.numel():
                            found.append(model(piece, past_key_values=self).logits.double())
                error = (torch.cat(found, dim=1) - wanted).abs().max()
        finally:
            model.train(training)
            self.reset()
        if not error <= _ROUNDING.get(model.dtype, _LOW_ROUNDING) * wanted.abs().max():
            raise _unknown(model, f"turned anew, {tokens} tokens give logits that differ by {error:.3g}")


class StreamLayer(PatternLayer):
    """One layer of a `StreamCache`.

    Attributes:
        base: column that lies at place 0.
    """

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
        if not self.options["places"].open:
            raise self._refuse(
                "keys reach it turned to places in the text", "with StreamCache(model) as cache: ..."
            )
        kept = self.kept
        self._check(kept, query, key, value, batch)
        if kept is None:
            window, sinks = bounds(pattern)
            undo, frequency = self.options["undo"], self.options["places"].frequency
            buffer = Buffer(key, value, window=window, sinks=sinks, undo=undo, frequency=frequency)
            kept = Texts(Form.of(key, value), buffer)
        real = None if batch.real is None or bool(batch.real.all()) else batch.real
        if real is None and kept.alike is not None:
            output = self._read(query, key, value, kept.alike, 0, scale, scores)
        else:
            output = query.new_zeros((*query.shape[:3], value.shape[3]))
            for rows, columns, buffer in kept.turns(real, query.shape[2]):
                sides = (side[rows][:, :, columns] for side in (query, key, value))
                output[rows, :, columns] = self._read(*sides, buffer, columns.start, scale, scores)
        self.kept, self.pattern = kept, pattern
        self._count(batch, query.shape[2])
        return output.transpose(1, 2).contiguous()

    def reset(self) -> None:
        super().reset()
        self.base = 0

    def _check(self, kept: Texts | None, query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> None:
        """Refuse what does not continue the texts. All layers are given the same, so the first finds it."""
        heads = query.shape[1], key.shape[1]
        fits = kept is not None and kept.form.fits(query, key, value, *heads)
        if fits and (self is not self.family[0] or batch.starts in (None, kept.lengths)):
            return
        form, lengths = (None, []) if kept is None else (kept.form, kept.lengths)
        sides = {"query": query, "key": key, "value": value}
        check(sides, batch.real, batch.starts, heads=heads, form=form, lengths=lengths)

    def _read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kept: Buffer,
        column: int,
        scale: float | None,
        scores: Sequence[Score],
    ) -> Tensor:
        """Return what texts of one length read in neighbouring columns, from a new one on, and take it in."""
        # The next token of a text comes turned to the place of its column.
        kept.rebase(self.base + kept.length - self.columns - column)
        if query.shape[2] > 1:
            output = self._several(query, key, value, kept, scale, scores)
            kept.put(key, value)
            return output
        position = kept.length
        kept.put(key, value)
        if kept.sinks and kept.length > kept.window:
            place = min(position, kept.window + kept.sinks - 1)
            kept.turn(*self.options["places"].turn(position - kept.base - place, query))
        return _last(query, kept, scale, scores)

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
        begin, end = kept.length, kept.length + query.shape[2]
        if not sinks or end <= window:
            return recent[0]
        last = window + sinks - 1
        positions = torch.arange(begin, end, device=query.device)
        frequency = self.options["places"].frequency
        # From the last place on all queries read all sinks, so that one plan serves the whole text.
        start = min(begin, last)
        far = attend_with_lse(
            shift(query, positions.clamp(max=last) - (positions - kept.base), frequency),
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
