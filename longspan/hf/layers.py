"""Layers: what each attention layer of a decoder reads, by a pattern and by the window that the model itself has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PretrainedConfig

from longspan.errors import InputError, PatternError, message
from longspan.pattern import Causal, Pattern, Window, simplify

# Layers that attend, some of which do more beside, and those that pass on what is between tokens by other means.
_DENSE = ("full_attention", "hybrid")
_SLIDING = ("sliding_attention", "hybrid_sliding")
_OTHER = ("linear_attention", "conv", "moe", "mlp")


def windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Return the window that a decoder itself has on each of its attention layers, None where it reads densely.

    Law: these are the windows that the model asks transformers for when it runs. `layer_types` says which layers
    have one; without it all have `sliding_window`. Layers without attention are left out.

    Args:
        config: of the model.

    Returns:
        Tokens that a query reads, its own included, layer by layer.

    Raises:
        InputError: layers that read by another rule, such as chunks.

    Example:
        >>> from transformers import Gemma2Config, LlamaConfig, MistralConfig
        >>> windows(MistralConfig(num_hidden_layers=2)), windows(LlamaConfig(num_hidden_layers=2))
        ((4096, 4096), (None, None))
        >>> windows(Gemma2Config(num_hidden_layers=3))
        (4096, None, 4096)
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        chunks = getattr(text, "attention_chunk_size", None)
        usual = "sliding_attention" if window else "chunked_attention" if chunks else "full_attention"
        kinds = [usual] * text.num_hidden_layers
    strange = sorted(set(kinds) - {*_DENSE, *_SLIDING, *_OTHER})
    if strange:
        raise InputError(
            message(
                "Some layers of this model read by a rule that no pattern says.",
                {"model": text.model_type, "layers": ", ".join(strange)},
                fix="a decoder whose layers read densely or through sliding windows, such as Llama, Mistral, Qwen or Gemma",
            )
        )
    return tuple(window if kind in _SLIDING else None for kind in kinds if kind not in _OTHER)


def layer_patterns(patterns: Sequence[Pattern], windows: Sequence[int | None]) -> tuple[Pattern, ...]:
    """Return what each attention layer reads once `set_pattern` was given some patterns.

    Law: a layer reads by its pattern, nothing of the future, and through its own window.

    Args:
        patterns: one for all layers, or one for each.
        windows: of the model, as `windows` returns them.

    Raises:
        PatternError: more patterns than one, and not as many as layers.

    Example:
        >>> layer_patterns([Causal()], (4, None))
        (Causal() & Window(4), Causal())
    """
    parts = one_per_layer(patterns[0] if len(patterns) == 1 else patterns, len(windows))
    return tuple(
        simplify(within(part & Causal(), frozenset({window})))
        for part, window in zip(parts, windows, strict=True)
    )


@lru_cache(maxsize=64)
def within(pattern: Pattern, windows: frozenset[int | None]) -> Pattern:
    """Return a pattern inside the windows that the model asks for, the same one for every layer and token."""
    for window in windows - {None}:
        pattern = pattern & Window(window)
    return pattern


def one_per_layer(pattern: Pattern | Sequence[Pattern], layers: int) -> list[Pattern]:
    """Return one pattern for each layer, or raise PatternError where there are too many or too few."""
    if isinstance(pattern, Pattern):
        return [pattern] * layers
    if not isinstance(pattern, Sequence) or not all(isinstance(part, Pattern) for part in pattern):
        raise PatternError(
            message(
                "A model reads by a pattern, or by a sequence of patterns.",
                {"got": repr(pattern)},
                fix="Causal() & Window(512), or a list with one pattern for each layer",
            )
        )
    if len(pattern) != layers:
        raise PatternError(
            message(
                "A sequence of patterns needs one for each attention layer.",
                {"got": f"{len(pattern)} patterns", "model": f"{layers} attention layers"},
                fix=f"a sequence of {layers}, or one pattern for all of them",
            )
        )
    return list(pattern)
