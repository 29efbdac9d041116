"""Cache: behind transformers' `past_key_values`, the keys that a model's patterns may still read."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from longspan import cache as held
from longspan.errors import PatternError, PlanError, ShapeError, message
from longspan.hf.attention import NAME, attention_modules
from longspan.hf.batch import Batch
from longspan.hf.rope import head_width
from longspan.pattern import Pattern
from longspan.score import Score


class PatternCache(Cache):
    """What `model.generate(..., past_key_values=PatternCache(model))` keeps: only keys that can still be read.

    Law: greedy, sampled and beam search choose the tokens that they choose when the whole text is computed anew at
    every step with the same patterns; rows may be padded on the left. Each layer holds what its own pattern, and the
    model's own window, may still read: a window's worth of keys for a window, everything for dense attention.

    Whatever is refused leaves the cache as it was.

    Args:
        model: a decoder that `set_pattern` was called on, wrapped or not. The cache is for this model alone.
        block: tokens that are taken in before dead keys are let go, at least 1.
        undo: tokens that can be taken back, which assisted decoding needs: how many are guessed at a time and one.
        storage: None for keys and values as they are; "int8" for eight bits, each number within 1 / 254 of the largest
            in its token and head; or a `Pool` of pages, such as `pool_for(model, tokens=...)`, which caches share.

    Raises:
        PatternError: a model without patterns.
        ShapeError: an option outside its range. By the model's forward: another model, patterns that were changed, a
            mask or batch that does not continue what was read, keys that want a gradient.
        PlanError: by the model's forward, where angles change with the length: beyond the trained length with dynamic
            NTK, across it with LongRoPE. Only a text read anew then gives what the model computes. While a CUDA graph
            is captured, which would not see the cache move on.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from longspan.hf import set_pattern
        >>> from longspan.pattern import Streaming
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> set_pattern(model, Streaming(16, sinks=4))
        >>> cache = PatternCache(model, block=1)
        >>> ids = torch.arange(3, 43)[None]
        >>> options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        >>> model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options).shape
        torch.Size([1, 60])
        >>> cache.get_seq_length(), cache.layers[0].kept.held(head=0)[:6]
        (59, [0, 1, 2, 3, 43, 44])
    """

    def __init__(
        self, model: nn.Module, *, block: int = 64, undo: int = 0, storage: str | held.Pool | None = None
    ) -> None:
        options = {"block": block, "undo": undo, "storage": storage}
        layers = layers_of(model, PatternLayer, options)
        # Says what is wrong with the options now rather than in the middle of a forward.
        heads = layers[0].module().config.num_attention_heads
        held.Cache(layers[0].setting.pattern, heads=heads, **options)
        super().__init__(layers=layers)

    def fork(self) -> PatternCache:
        """Return a cache that has read the same text and goes its own way, to continue one prompt in several ways.

        Keys and values are copied, and pages of a pool shared until they differ; `reset` gives them back at once.

        Example:
            >>> from longspan.hf import load_model, set_pattern
            >>> from longspan.pattern import Causal
            >>> model, tokenizer = load_model()
            >>> set_pattern(model, Causal())
            >>> pool = pool_for(model, tokens=200)
            >>> prompt, free = PatternCache(model, storage=pool), pool.free
            >>> with torch.no_grad():
            ...     output = model(torch.arange(90)[None], past_key_values=prompt)
            >>> branches = [prompt.fork() for _ in range(5)]
            >>> lists = model.config.num_hidden_layers * model.config.num_key_value_heads
            >>> free - pool.free == lists * -(-90 // pool.size), branches[0].get_seq_length()
            (True, 90)
        """
        other = copy.copy(self)
        other.layers = related([layer.fork() for layer in self.layers])
        return other

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take on all layers, free slots included."""
        return sum(layer.kept.nbytes for layer in self.layers if layer.kept is not None)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; `tokens_to_remove` is their number below zero, as in transformers."""
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def __str__(self) -> str:
        return (
            f"PatternCache: {self.get_seq_length()} tokens read, {self.nbytes:,} bytes in {len(self)} layers"
        )


class PatternLayer(CacheLayerMixin):
    """One layer of a `PatternCache`.

    Transformers hands keys to a cache before it knows which tokens are padding. So `update` takes nothing in: it
    marks the new keys, and the attention function, which knows, finds the mark and asks `attend` here.

    Attributes:
        kept: the keys and values, None before the first token.
        columns: tokens read, padding included.
        found: whether the attention function has found the last mark.
    """

    is_sliding = False

    def __init__(self, module: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        # Weak, so that a cache that outlives its model does not hold its weights, and a copy does not copy them.
        self.module, self.setting = weakref.ref(module), module.longspan
        self.options, self.turned_anew = options, _turned_anew(module.config)
        self.family: list[PatternLayer] = [self]
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated before the first attention."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.found:
            raise self._refuse(
                "the attention of an earlier forward did not look for what is held: it was not that of a pattern",
                "the model that the cache was made for, with its patterns set; cache.reset() for another text",
            )
        self.found = False
        key_states = key_states.view_as(key_states)
        key_states.longspan = self
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

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
        """Return attention `[batch, length, heads, width]` of the new tokens, which `check` let pass; take them in."""
        kept = self.kept
        if kept is None:
            kept = held.Cache(pattern, heads=query.shape[1], key_heads=key.shape[1], **self.options)
        try:
            output = kept.attend(
                query, key, value, real=batch.real, start=batch.starts, scale=scale, scores=scores
            )
        except BaseException:
            for layer, state in self.family[0].before:
                layer.__dict__.update(state)
            raise
        if self is self.family[-1]:
            self.family[0].before = []
        self.kept, self.pattern = kept, pattern
        self._count(batch, key.shape[2])
        return output.transpose(1, 2).contiguous()

    def _count(self, batch: Batch, tokens: int) -> None:
        """Count columns that were taken in."""
        self.columns += tokens
        if batch.real is None:
            self._full += tokens
        else:
            # Columns at the end that every row has a token in: those may be counted back.
            full = batch.real.all(dim=0).flip(0).long().cumprod(0).sum()
            self._full = int(full) + (self._full if full == tokens else 0)

    def _look_back(self, tokens: int, rows: int) -> list[tuple[PatternLayer, dict[str, Any]]]:
        """Return what all layers hold, where the pool may run out between two of them; else nothing."""
        pool, config = self.options.get("storage"), self.module().config
        if not isinstance(pool, held.Pool):
            return []
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        # A page more for each head, in place of one that others share.
        if pool.free >= len(self.family) * rows * heads * (2 + tokens // pool.size):
            return []
        return [(layer, dict(layer.fork().__dict__, family=self.family, before=[])) for layer in self.family]

    def reset(self) -> None:
        self.before: list[tuple[PatternLayer, dict[str, Any]]] = []
        self.kept: held.Cache | None = None
        self.pattern: Pattern | None = None
        self.columns, self._full = 0, 0
        self.found = True

    def fork(self) -> PatternLayer:
        """Return a layer that has read the same and goes its own way; its family is the caller's to say."""
        other = copy.copy(self)
        other.kept = self.kept and self.kept.fork()
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kept is not None:
            self.kept.select(torch.arange(len(self.kept.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kept is not None:
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.kept.select(rows)

    def activate_past_recording(self) -> None:
        """Transformers announces that tokens will be taken back; how many, `undo` has to say."""

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise where so many tokens cannot be taken back."""
        number = abs(tokens_to_remove)
        if tokens_to_remove > 0 or number > self._full:
            raise ShapeError(
                message(
                    "These tokens cannot be taken back.",
                    {
                        "asked": f"crop({tokens_to_remove})",
                        "why": f"{self._full} columns at the end hold a token in every row, and are counted below zero",
                    },
                    fix="crop(-1), or fewer tokens than padding allows",
                )
            )
        if self.kept is not None:
            self.kept.check_crop([length - number for length in self.kept.lengths])

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if self.kept is not None:
            self.kept.crop([length - abs(tokens_to_remove) for length in self.kept.lengths])
        self.columns -= abs(tokens_to_remove)
        self._full -= abs(tokens_to_remove)

    def check(self, module: nn.Module, pattern: Pattern, batch: Batch, tokens: int) -> None:
        """Refuse what does not continue this cache. The first layer speaks for all, before any has changed."""
        if self.module() is not module:
            raise self._refuse("it was made for another model", "PatternCache(model) for this one")
        if self is self.family[0]:
            for layer in self.family:
                if getattr(layer.module(), NAME, None) != layer.setting:
                    raise self._refuse(
                        "the model's patterns were set anew after it was made",
                        "PatternCache(model) after set_pattern",
                    )
                if layer.columns != self.columns:
                    raise self._refuse("an earlier forward broke off between its layers", "cache.reset()")
            self.before = self._look_back(tokens, batch.shape[0])
        if self.pattern not in (None, pattern):
            raise self._refuse("the model's own window changed", "PatternCache(model) for this model")
        if self.turned_anew is not None and self.columns:
            dynamic, trained = self.turned_anew
            longest = self.columns + tokens
            if longest > trained and (dynamic or min(self.kept.lengths) <= trained):
                raise _stale(dynamic, trained, longest)

    def _refuse(self, reason: str, fix: str) -> PlanError:
        return PlanError(message("This cache cannot be read here.", {"why": reason}, fix=fix))


Layer = TypeVar("Layer", bound=PatternLayer)


def layers_of(model: nn.Module, kind: type[Layer], options: dict[str, Any]) -> list[Layer]:
    """Return what a cache holds for each layer of a model, in their order.

    Args:
        model: a decoder that `set_pattern` was called on.
        kind: the class of the layers.
        options: theirs.

    Raises:
        PatternError: a model without patterns.
    """
    modules = sorted(attention_modules(model), key=lambda module: module.layer_idx)
    if not all(hasattr(module, NAME) for module in modules):
        raise PatternError(
            message(
                "This model has no patterns, so nothing says which keys of a cache are read.",
                {"model": type(model).__name__},
                fix="set_pattern(model, SlidingWindow(4096)), or with any other pattern, before the cache is made",
            )
        )
    return related([kind(module, options) for module in modules])


def related(layers: list[Layer]) -> list[Layer]:
    """Return layers that know one another: the first checks for all, and the last has done what all do."""
    for layer in layers:
        layer.family = layers
    return layers


def pool_for(model: nn.Module, *, tokens: int, size: int = 16) -> held.Pool:
    """Return a pool of pages that holds the keys and values of so many tokens on every layer of a model.

    Texts that share a beginning, and windows, need less; what one cache gives back another takes.

    Args:
        model: a decoder, wrapped or not.
        tokens: of all rows and texts together, at least 1.
        size: tokens of a page, at least 1.

    Raises:
        ShapeError: a number below 1.
    """
    modules = attention_modules(model)
    config, weight = modules[0].config, next(modules[0].parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    pages = len(modules) * heads * -(-tokens // size) if size > 0 else 0
    return held.Pool(pages, size=size, width=head_width(config), dtype=weight.dtype, device=weight.device)


def _stale(dynamic: bool, trained: int, longest: int) -> PlanError:
    """Return the error of keys that were computed with other angles than those of the length now."""
    kind, when = ("dynamic NTK", "with every token") if dynamic else ("LongRoPE", "once")
    fixes = [
        f"yarn, linear or llama3 positions, which do not change; or use_cache=False for what {kind} computes"
    ]
    if not dynamic:
        fixes = [
            f"cache.reset() and all {longest} tokens in one forward, after which the cache goes on",
            "short_factor equal to long_factor, which is what a text of that length is read with",
        ]
    return PlanError(
        message(
            "This cache ends where its model's angles change.",
            {
                "asked": f"to read on to {longest} tokens",
                "why": [
                    f"beyond {trained} tokens {kind} turns all keys by other angles, which change {when}",
                    "later layers hold keys computed from what the old angles let earlier ones read",
                ],
            },
            fix="; or ".join(fixes),
        )
    )


def _turned_anew(config: PretrainedConfig) -> tuple[bool, int] | None:
    """Return whether angles change with every token past the trained length, and that length; None if they never do."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in given.values() if isinstance(kind, Mapping)] or [given]
    found = []
    for kind in kinds:
        if kind.get("rope_type") == "dynamic":
            found.append((True, config.max_position_embeddings))
        elif kind.get("rope_type") == "longrope" and kind.get("short_factor") != kind.get("long_factor"):
            found.append((False, kind["original_max_position_embeddings"]))
    return min(found, key=lambda one: one[1]) if found else None
