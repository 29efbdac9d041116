"""Attention: patterns in transformers' own decoders, through its registry of attention functions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longspan.cache.form import captured
from longspan.errors import InputError, PlanError, ShapeError, message
from longspan.hf import traced
from longspan.hf.batch import Batch, describe, refusal, settled
from longspan.hf.captured import capturing
from longspan.hf.layers import one_per_layer, within
from longspan.hf.quiet import quiet
from longspan.hf.traced import Outline
from longspan.pattern import Causal, Pattern
from longspan.score import Score, Scores, Sinks, SoftCap

NAME = "longspan"
_NOTHING = nullcontext()

# Arguments that change nothing here, or are looked at elsewhere.
_HARMLESS = {"position_ids", "use_cache", "sliding_window", "softcap", "s_aux"}
# Arguments that ask for what is not there: not None means asked.
_UNSUPPORTED = {
    "position_bias": "a bias is added to its scores, and a pattern does not change scores",
    "cache": "it keeps keys of many requests in shared pages (continuous batching)",
}


@dataclass(frozen=True)
class Setting:
    """What `set_pattern` leaves on an attention module: it goes where the module goes, copies included.

    Attributes:
        pattern: what the layer reads, causal.
        before: the attention implementation that `reset` goes back to.
    """

    pattern: Pattern
    before: str


def set_pattern(model: nn.Module, pattern: Pattern | Sequence[Pattern]) -> None:
    """Let a transformers decoder read by a pattern, the same for all layers or one for each.

    The law: with `Causal()` the model computes what it computed before. Every pattern is intersected with
    `Causal()`, so no pattern makes a decoder read the future, and with the window that the model itself
    asks for on a layer. Positions count a sequence's own tokens, whatever `position_ids` say to RoPE:
    padding is taken out first, wherever it is, and rows of padding return zero. Packed documents each count
    from 0; as everywhere in transformers, `position_ids` that restart or jump mark documents where neither
    a mask nor a cache is given, so give an `attention_mask` of ones with positions that skip.

    `torch.compile` with `fullgraph=True` takes a model with patterns as it takes one without, padded, packed and
    with a cache that grows. A `PatternCache` breaks the graph at every layer.

    A CUDA graph may be captured of it, forward and backward, as its calls do not depend on numbers on the device. What
    they would depend on is not looked at: an `attention_mask` and a cache that is not transformers' own growing one are
    refused while a graph is captured, and `position_ids` that restart stop it with an error of the device when it runs.
    What `create_causal_mask` of transformers gave before the capture is taken for a mask; its padding stays.

    `generate` reads through any cache of transformers that holds keys as they are, growing or of a fixed size
    (`cache_implementation="static"`); of the latter what is filled is read. To hold no more than can still be read, give
    it a `PatternCache`.

    Patterns stay with the model's attention modules: they survive `copy.deepcopy`, wrapping by peft and
    switching the implementation to and fro, and are not saved in checkpoints.

    Args:
        model: a decoder of transformers, wrapped or not; changed in place.
        pattern: one pattern for all layers, or a sequence with one for each attention layer, in order.

    Raises:
        PatternError: not a pattern, or not one per attention layer.
        InputError: the model is not a decoder, or does not look its attention up in transformers' registry.
        PlanError, ShapeError: later, by the model's forward, for what a pattern cannot stand for: biases of
            scores, attention dropout, 4-D masks; soft-capped scores (Gemma 2) on texts whose dense scores do not
            fit into memory.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from longspan.pattern import Causal, LongMixed
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(config)
        >>> set_pattern(model, LongMixed(64))
        >>> set_pattern(model, [Causal(), LongMixed(64)])
        >>> reset(model)
    """
    modules = attention_modules(model)
    patterns = one_per_layer(pattern, len(modules))
    owner = _owner(model, modules[0])
    before = owner.config._attn_implementation
    if before == NAME:
        before = modules[0].longspan.before if hasattr(modules[0], NAME) else "sdpa"
    else:
        _switch(owner, NAME)
    for module, part in zip(modules, patterns, strict=True):
        module.longspan = Setting(part & Causal(), before)


def reset(model: nn.Module) -> None:
    """Take the patterns off a model and go back to the attention it had before; without patterns do nothing.

    Args:
        model: the model that `set_pattern` was given, or a copy or wrapping of it; changed in place.
    """
    modules = [module for module in model.modules() if isinstance(getattr(module, NAME, None), Setting)]
    if not modules:
        return
    owner = _owner(model, modules[0])
    if owner.config._attn_implementation == NAME:
        _switch(owner, modules[0].longspan.before)
    for module in modules:
        del module.longspan


def _attention(*sides: Any, **options: Any) -> tuple[Tensor, None]:
    """Attend by the module's pattern; called by transformers, see `_attend`."""
    if not torch.compiler.is_compiling():
        return _attend(*sides, **options)
    module, query, key, value, mask = sides[:5]
    if isinstance(mask, Outline) and getattr(key, NAME, None) is None:
        return _traced(module, query, key, value, mask, **options)
    # What a batch holds decides what is done, and windows make patterns: a compiled model runs this as it is.
    return _apart(*sides, **options)


def _traced(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outline: Outline,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend in a graph, by one operation that looks into the batch when it runs."""
    setting = _check_setting(module)
    _check_options(module, dropout, options)
    if outline.keys != key.shape[2]:
        raise _short(module, outline.keys, key.shape[2])
    windows = [window for window in (outline.window, options.get("sliding_window")) if window is not None]
    lowered = torch.is_autocast_enabled(query.device.type)
    dtype = torch.get_autocast_dtype(query.device.type) if lowered else value.dtype
    query, key, value = (side.to(dtype) for side in (query, key, value))
    changes = Scores(options.get("softcap"), None, options.get("s_aux"))
    return traced.attend(query, key, value, setting.pattern, outline, windows, scaling, changes), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend with query `[batch, heads, length, width]`, and the arguments of transformers' attention functions."""
    if isinstance(attention_mask, Outline):
        attention_mask = settled(attention_mask, query.shape[0], query.shape[2])
    attention_mask = getattr(attention_mask, NAME, attention_mask)
    # The mark of a PatternCache, whose keys come without those that it holds.
    cached = getattr(key, NAME, None)
    if cached is not None:
        cached.found = True
    pattern = _check_setting(module).pattern
    _check_options(module, dropout, options)
    batch = _check_batch(module, key, attention_mask, options.get("position_ids"), cached)
    windows = batch.window, options.get("sliding_window")
    if windows != (None, None):
        pattern = within(pattern, frozenset(windows))
    if cached is not None:
        if capturing(key.device):
            raise captured(f"{type(cached).__name__}, {cached.columns} tokens read")
        cached.check(module, pattern, batch, key.shape[2])
    if batch.spare:
        key, value = (side[:, :, : batch.keys] for side in (key, value))
    # Under autocast, rotary positions leave query and key in float32 while the value is already lower.
    device = query.device.type
    lowered = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lowered else value.dtype
    if not query.dtype == key.dtype == value.dtype == dtype:
        query, key, value = (side.to(dtype) for side in (query, key, value))
    with torch.autocast(device, enabled=False) if lowered else _NOTHING:
        scores = _scores(options)
        if cached is not None:
            return cached.attend(query, key, value, pattern, batch, scaling, scores), None
        return batch.attend(query, key, value, pattern, scale=scaling, scores=scores), None


_apart = torch.compiler.disable(_attend, reason="longspan reads the padding of the batch")


def _scores(options: dict[str, Any]) -> list[Score]:
    """Return what the model does to its scores."""
    limit, sinks = options.get("softcap"), options.get("s_aux")
    capped: list[Score] = [] if limit is None else [SoftCap(limit)]
    return capped if sinks is None else [*capped, Sinks(sinks)]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that transformers calls an attention function with, in the order of the layers."""
    modules = [
        module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    ]
    if not modules or not all(module.is_causal for module in modules):
        raise InputError(
            message(
                "This model has no causal attention that a pattern could be set on.",
                {"model": type(model).__name__, "found": f"{len(modules)} attention layers"},
                fix="a decoder of transformers, such as Llama, Mistral, Qwen or Gemma",
            )
        )
    return modules


def _owner(model: nn.Module, attention: nn.Module) -> PreTrainedModel:
    """Return the model whose configuration says which attention function its layers look up."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is attention.config:
            return module
    raise _not_registered(model)


def _switch(owner: PreTrainedModel, name: str) -> None:
    """Set the attention function, which transformers only warns about where it has no effect."""
    with quiet():
        owner.set_attn_implementation(name)
    if owner.config._attn_implementation != name:
        raise _not_registered(owner)


def _not_registered(model: nn.Module) -> InputError:
    return InputError(
        message(
            "This model does not look its attention up in transformers' registry.",
            {"model": type(model).__name__, "why": "its forward holds an attention of its own"},
            fix="a decoder of transformers, such as Llama, Mistral, Qwen or Gemma",
        )
    )


def _check_setting(module: nn.Module) -> Setting:
    setting = getattr(module, NAME, None)
    if not isinstance(setting, Setting):
        raise PlanError(
            message(
                "This layer has no pattern to read by.",
                {"layer": _title(module), "why": 'attn_implementation="longspan" was set without a pattern'},
                fix="set_pattern(model, Causal())",
            )
        )
    return setting


def _check_options(module: nn.Module, dropout: float, options: dict[str, Any]) -> None:
    if dropout == 0 and options.keys() <= _HARMLESS:
        return
    asked = [name for name in _UNSUPPORTED if options.get(name) is not None]
    reasons = [_UNSUPPORTED[name] for name in asked]
    fix = "reset(model), which goes back to the attention that the model had before"
    if options.get("output_attentions"):
        reasons.append("attention weights are asked for, and are never held as a whole")
        fix = "output_attentions=False"
    if options.get("is_causal") is False:
        reasons.append("the layer is told not to be causal")
    if dropout > 0:
        reasons.append(
            f"its weights are dropped at random (attention dropout {dropout}), which is not supported"
        )
        fix = "load the model with attention_dropout=0.0, or model.eval()"
    if reasons:
        raise PlanError(
            message(
                "A pattern cannot stand for this layer.", {"layer": _title(module), "why": reasons}, fix=fix
            )
        )


def _short(module: nn.Module, announced: int, keys: int) -> ShapeError:
    return refusal(
        module.config,
        f"its cache announced {announced} keys and handed over {keys}",
        fix="a cache that keeps all keys, past_key_values=DynamicCache()",
    )


def _check_batch(module: nn.Module, key: Tensor, given: Any, positions: Any, cached: Any) -> Batch:
    if not isinstance(given, Batch):
        found = "none" if given is None else f"{type(given).__name__} {list(getattr(given, 'shape', []))}"
        raise refusal(
            module.config,
            f"a mask of its own came with it ({found}), whose holes a pattern cannot see",
            fix="a mask [batch, tokens] for padding; what else shall not be read belongs into the pattern",
        )
    keys = key.shape[2] + (cached.columns if cached is not None else 0)
    if given.keys + given.spare != keys:
        raise _short(module, given.keys, keys)
    if given.masked or len(given.segments) > 1:
        return given
    several = isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1
    if several and given.restarts(positions):
        raise refusal(
            module.config,
            "its positions restart, as in packed documents, while a cache hides where they end",
            fix="use_cache=False, which lets every document attend alone; or an attention_mask of ones",
        )
    return given


def _title(module: nn.Module) -> str:
    return f"{module.layer_idx}, {type(module).__name__}"


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, describe)
