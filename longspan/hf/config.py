"""Config: position scaling written into a model's configuration, so that the checkpoint stays a plain one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from longspan.errors import InputError, ShapeError, message
from longspan.frequency import NTK, Frequency, Linear, Llama3, YaRN
from longspan.hf.rope import (
    KEYS,
    both_styles,
    from_config,
    head_width,
    parameters_of,
    positions,
    to_parameters,
)

# Keys of a YaRN configuration whose value was chosen for one factor, and is wrong for another.
_YARN_TEMPERATURE = ("attention_factor", "mscale", "mscale_all_dim")
# Each method with the frequency for a stretch, a trained length and what else is known of the plain one.
_METHODS: dict[str, Callable[[float, int, dict[str, float]], Frequency]] = {
    "linear": lambda factor, trained, plain: Linear(factor, **plain),
    "ntk": lambda factor, trained, plain: NTK(factor, **plain),
    "yarn": lambda factor, trained, plain: YaRN(factor, original=trained, **plain),
    "llama3": lambda factor, trained, plain: Llama3(factor, original=trained, **plain),
}
METHODS = tuple(_METHODS)
# Those by which a model that they stretched can be stretched further.
GO_ON = ("yarn", "llama3")


def rope_parameters(
    config: PretrainedConfig, *, method: str, length: int, margin: float = 1.0
) -> dict[str, Any]:
    """Return the `rope_parameters` that let a model read `length` positions.

    With `s` the new length over the old one: `linear` divides every position by `s`; `ntk` raises theta; `yarn` and
    `llama3` divide the slow frequencies by `s` and keep the fast ones, and `yarn` sharpens the scores by a
    temperature that the reader computes from `s`. The frequencies are `Linear`, `NTK`, `YaRN` and `Llama3` of
    `longspan.frequency`.

    A model that was stretched before by `yarn` or `llama3` is stretched further by the same, counted from the length
    that it was trained at; `ntk` leaves a plain model, which any method takes.

    Args:
        config: the configuration of a model that rotates its queries and keys; not changed.
        method: "linear", "ntk", "yarn" or "llama3".
        length: tokens the model shall read, more than it reads now.
        margin: by how much the model's own length is taken for shorter than it says, 1 or more. A model saw its
            longest distances only at the end of its windows, and is weak at the far end of what they become.

    Returns:
        A dict with `rope_type`, `rope_theta` and what the type needs, understood by plain transformers.

    Raises:
        InputError: the method is not one of the four, the length is not larger, or the model has no RoPE, one
            RoPE per kind of layer, or a scaling that the method cannot be put on top of.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(max_position_embeddings=512)
        >>> rope_parameters(config, method="linear", length=4096)
        {'rope_theta': 10000.0, 'rope_type': 'linear', 'factor': 8.0}

    References:
        Position interpolation: arXiv 2306.15595. YaRN and NTK-aware: arXiv 2309.00071, sections 3.1 and 3.4.
    """
    _check_method(method)
    now = parameters_of(config)
    length_now = _length(config, now)
    if length <= length_now:
        raise InputError(
            message(
                "The new length is not longer than the model's own.",
                {
                    "asked": f"{length} tokens",
                    "model": f"reads {length_now} tokens already",
                },
                fix=f"a length of more than {length_now}",
            )
        )
    if now["rope_type"] == "default":
        trusted = round(length_now / margin)
        plain = {"theta": now["rope_theta"], "share": now.get("partial_rotary_factor", 1.0)}
        return _said(_METHODS[method](length / trusted, trusted, plain), now, config, method)
    _check_goes_on(now, method)
    frequency = from_config(config)
    if method == "yarn":
        return _said(replace(frequency, factor=length / frequency.original), now, config, method)
    # How far its pairs were stretched need not be how far its length was.
    return _said(replace(frequency, factor=frequency.factor * length / length_now), now, config, method)


def extended(config: PretrainedConfig, *, method: str, length: int, margin: float = 1.0) -> PretrainedConfig:
    """Return a copy of a configuration whose model reads `length` positions.

    A model takes it up when it is built, not later: frequencies are computed once, on loading.

    Args:
        config: the configuration to start from; not changed.
        method: "linear", "ntk", "yarn" or "llama3", see `rope_parameters`.
        length: tokens the model shall read, more than it reads now.
        margin: see `rope_parameters`.

    Returns:
        A configuration of the same class with new `rope_parameters` and `max_position_embeddings`.

    Raises:
        InputError: as `rope_parameters`, or the model's class refuses the scaling (Phi-3 knows its own only).

    Example:
        >>> from transformers import LlamaConfig
        >>> extended(LlamaConfig(max_position_embeddings=512), method="yarn", length=4096).rope_parameters["factor"]
        8.0
    """
    parameters = rope_parameters(config, method=method, length=length, margin=margin)
    return _with(config, parameters, length, method)


def with_frequency(config: PretrainedConfig, frequency: Frequency, *, length: int) -> PretrainedConfig:
    """Return a copy of a configuration whose model turns its queries and keys by these frequencies.

    What the model did before does not count: the frequency says all, theta and share included.

    Args:
        config: the configuration of a model with RoPE; not changed.
        frequency: any that `to_config` of `longspan.hf.rope` can write.
        length: tokens the model shall read.

    Returns:
        A configuration of the same class, which `write_config` saves for old and new readers.

    Raises:
        InputError: the model has no RoPE or several, no key says the frequency, or the class refuses it.
        ShapeError: a head that the frequency cannot turn.

    Example:
        >>> from longspan.frequency import Llama3
        >>> from transformers import LlamaConfig
        >>> found = with_frequency(LlamaConfig(), Llama3(original=2048), length=16384)
        >>> found.rope_parameters["rope_type"], found.max_position_embeddings
        ('llama3', 16384)
    """
    now = parameters_of(config)
    written = to_parameters(frequency, width=head_width(config))
    if "partial_rotary_factor" in now:
        written["partial_rotary_factor"] = frequency.share
    return _with(config, written, positions(frequency, length), written["rope_type"])


def write_config(config: PretrainedConfig, folder: str | Path) -> Path:
    """Write `config.json` so that old and new readers find the same frequencies in it.

    Version 5 of transformers saves only `rope_parameters`; version 4, and servers built on it, would then fall
    back to a theta of 10,000 without scaling and without a word. Both styles are written, with equal values.

    Args:
        config: the configuration of the saved weights.
        folder: the checkpoint's folder; created where missing, an existing `config.json` is replaced.

    Returns:
        The path of the file.

    Example:
        >>> import json, tempfile
        >>> from transformers import LlamaConfig
        >>> config = extended(LlamaConfig(max_position_embeddings=512), method="yarn", length=4096)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = json.loads(write_config(config, folder).read_text())
        >>> saved["rope_scaling"]["type"], saved["rope_parameters"]["factor"], saved["rope_theta"]
        ('yarn', 8.0, 10000.0)
    """
    path = Path(folder) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = json.loads(config.to_json_string())
    keys |= both_styles(parameters_of(config), config.model_type)
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _check_method(method: str) -> None:
    if method == "dynamic":
        raise InputError(
            message(
                "Dynamic NTK cannot be written into a checkpoint.",
                {
                    "asked": "dynamic",
                    "why": [
                        "its frequencies change with the length of the text, so keys already in a cache keep",
                        "frequencies that no longer hold; it also turns itself off when max_position_embeddings",
                        "says the new length",
                    ],
                },
                fix=", ".join(METHODS),
            )
        )
    if method not in METHODS:
        raise InputError(
            message(
                "No RoPE scaling has this name.",
                {"asked": str(method)},
                fix=", ".join(METHODS),
            )
        )


def _check_accepted(config: PretrainedConfig, method: str) -> None:
    """Check that the model's own class reads the parameters back as they were meant."""
    meant = copy.deepcopy(config.rope_parameters)
    try:
        found = type(config).from_dict(config.to_dict()).rope_parameters
        reason = f"its configuration turns it into {found['rope_type']}"
    except KeyError:
        found, reason = (
            None,
            "its configuration takes it for another kind of scaling, which needs more keys",
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        found, reason = None, str(error.__cause__ or error)
    if found != meant:
        raise InputError(
            message(
                "This model's class does not take this RoPE scaling.",
                {"asked": method, "model": config.model_type, "why": reason},
                fix="ntk, which changes theta alone",
            )
        )


def _length(config: PretrainedConfig, now: dict[str, Any]) -> int:
    """Return how many tokens the model reads as it is configured."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise InputError(
            message(
                "This model does not say how many tokens it reads.",
                {
                    "model": config.model_type,
                    "found": f"max_position_embeddings = {length}",
                },
                fix="set max_position_embeddings in its config.json to the length it was trained at",
            )
        )
    if now["rope_type"] == "yarn":
        # Some published checkpoints leave max_position_embeddings at the length before YaRN.
        return max(length, int(now["factor"] * now["original_max_position_embeddings"]))
    return length


def _check_goes_on(now: dict[str, Any], method: str) -> None:
    """Check that a method can stretch further what is stretched already."""
    if now["rope_type"] not in GO_ON:
        raise _already_scaled(now, method, "how far it was stretched, and from which length, is not certain")
    if method != now["rope_type"]:
        raise _already_scaled(now, method, "two kinds of scaling do not add up to one that a config can say")
    fixed = [key for key in _YARN_TEMPERATURE if now.get(key) is not None]
    if fixed:
        raise _already_scaled(now, method, f"its {', '.join(fixed)} was chosen for that factor alone")


def _said(frequency: Frequency, now: dict[str, Any], config: PretrainedConfig, method: str) -> dict[str, Any]:
    """Return the parameters of a frequency, and those of the model's own that are none of its business."""
    try:
        written = to_parameters(frequency, width=head_width(config))
    except ShapeError as error:
        raise InputError(str(error)) from error
    kept = {key: value for key, value in now.items() if key not in KEYS}
    return kept | written


def _with(config: PretrainedConfig, parameters: dict[str, Any], length: int, method: str) -> PretrainedConfig:
    result = copy.deepcopy(config)
    result.rope_parameters = parameters
    result.max_position_embeddings = length
    if getattr(result, "head_dim", 0) is None:
        # YaRN of transformers reads it where it stands, even as None (Mixtral).
        result.head_dim = head_width(config)
    if "original_max_position_embeddings" in parameters and hasattr(
        result, "original_max_position_embeddings"
    ):
        # Phi-3 keeps it here as well, and transformers prefers it.
        result.original_max_position_embeddings = parameters["original_max_position_embeddings"]
    _check_accepted(result, method)
    return result


def _already_scaled(now: dict[str, Any], method: str, reason: str) -> InputError:
    kind, factor = now["rope_type"], now.get("factor")
    found = kind if factor is None else f"{kind} with factor {factor}"
    fix = "start from the checkpoint before it was scaled, and go to the full length at once"
    if kind in GO_ON and method != kind:
        fix = f"{kind}, which goes on from there"
    return InputError(
        message(
            "This model's positions are scaled already, and cannot be scaled again in this way.",
            {"asked": method, "model": found, "why": reason},
            fix=fix,
        )
    )
