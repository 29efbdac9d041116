"""Config: position scaling written into a model's configuration, so that the checkpoint stays a plain one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from longspan.errors import InputError, message

METHODS = ("linear", "ntk", "yarn")

# Keys of a YaRN configuration that say how it was trained, and so stay when it is stretched further.
_YARN_SHAPE = ("beta_fast", "beta_slow", "truncate")
# Keys of a YaRN configuration whose value was chosen for one factor, and is wrong for another.
_YARN_TEMPERATURE = ("attention_factor", "mscale", "mscale_all_dim")
# Where transformers before version 5 kept theta and the share of rotated dimensions, by model type.
_LEGACY_KEYS = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}


def rope_parameters(
    config: PretrainedConfig, *, method: str, length: int, margin: float = 1.0
) -> dict[str, Any]:
    """Return the `rope_parameters` that let a model read `length` positions.

    With `s` the new length over the old one, and `D` the rotated dimensions of a head: `linear` divides every
    position by `s`; `ntk` raises theta to `theta * s ** (D / (D - 2))`; `yarn` divides the slow frequencies
    by `s`, keeps the fast ones, and sharpens the scores by a temperature that the reader computes from `s`.

    Args:
        config: the configuration of a model that rotates its queries and keys; not changed.
        method: "linear", "ntk" or "yarn".
        length: tokens the model shall read, more than it reads now.
        margin: by how much the model's own length is taken for shorter than it says, 1 or more. A model saw its
            longest distances only at the end of its windows, and is weak at the far end of what they become.

    Returns:
        A dict with `rope_type`, `rope_theta` and what the type needs, understood by plain transformers.

    Raises:
        InputError: the method is not one of the three, the length is not larger, or the model has no RoPE, one
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
    now = _rotation(config)
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
    if now["rope_type"] == "yarn":
        return _longer_yarn(now, method, length)
    if now["rope_type"] != "default":
        raise _already_scaled(
            now,
            method,
            "how far it was stretched, and from which length, is not certain",
        )
    trusted = round(length_now / margin)
    if method == "ntk":
        return now | {"rope_theta": _ntk_theta(config, now, length / trusted)}
    scaled = now | {"rope_type": method, "factor": length / trusted}
    if method == "yarn":
        # Without this key transformers silently takes max_position_embeddings, which is the new length.
        scaled["original_max_position_embeddings"] = trusted
    return scaled


def extended(config: PretrainedConfig, *, method: str, length: int, margin: float = 1.0) -> PretrainedConfig:
    """Return a copy of a configuration whose model reads `length` positions.

    A model takes it up when it is built, not later: frequencies are computed once, on loading.

    Args:
        config: the configuration to start from; not changed.
        method: "linear", "ntk" or "yarn", see `rope_parameters`.
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
    result = copy.deepcopy(config)
    result.rope_parameters = parameters
    result.max_position_embeddings = length
    _check_accepted(result, method)
    return result


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
    parameters = _rotation(config)
    theta_key, share_key = _LEGACY_KEYS.get(config.model_type, ("rope_theta", "partial_rotary_factor"))
    keys[theta_key] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        keys[share_key] = parameters["partial_rotary_factor"]
    if parameters["rope_type"] != "default":
        elsewhere = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in parameters.items() if key not in elsewhere}
        keys["rope_scaling"] = scaling | {"type": parameters["rope_type"]}
    keys["rope_parameters"] = parameters
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


def _rotation(config: PretrainedConfig) -> dict[str, Any]:
    """Return the model's one set of RoPE parameters, without the old spelling of its type."""
    parameters = getattr(config, "rope_parameters", None)
    model = {"model": config.model_type}
    if not parameters:
        raise InputError(
            message(
                "This model has no RoPE to scale.",
                model
                | {"why": "its configuration has no rope_parameters: positions enter it in another way"},
                fix="a model with rotary positions, such as Llama, Mistral, Qwen or Gemma",
            )
        )
    if "rope_type" not in parameters:
        kinds = ", ".join(sorted(parameters))
        raise InputError(
            message(
                "This model has one RoPE per kind of layer, which is not scaled yet.",
                model | {"found": kinds},
                fix="a model whose layers share one RoPE, such as Llama, Mistral, Qwen or Gemma 2",
            )
        )
    return {key: value for key, value in parameters.items() if key != "type"}


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


def _longer_yarn(now: dict[str, Any], method: str, length: int) -> dict[str, Any]:
    """Stretch YaRN further: its factor is counted from the trained length, which it carries with it."""
    if method != "yarn":
        raise _already_scaled(
            now,
            method,
            "two kinds of scaling do not add up to one that a config can say",
        )
    fixed = [key for key in _YARN_TEMPERATURE if now.get(key) is not None]
    if fixed:
        raise _already_scaled(now, method, f"its {', '.join(fixed)} was chosen for that factor alone")
    original = now["original_max_position_embeddings"]
    kept = {key: now[key] for key in (*_YARN_SHAPE, "partial_rotary_factor") if now.get(key) is not None}
    return kept | {
        "rope_theta": now["rope_theta"],
        "rope_type": "yarn",
        "factor": length / original,
        "original_max_position_embeddings": original,
    }


def _already_scaled(now: dict[str, Any], method: str, reason: str) -> InputError:
    factor = now.get("factor")
    found = now["rope_type"] if factor is None else f"{now['rope_type']} with factor {factor}"
    return InputError(
        message(
            "This model's positions are scaled already, and cannot be scaled again in this way.",
            {"asked": method, "model": found, "why": reason},
            fix="start from the checkpoint before it was scaled, and go to the full length at once",
        )
    )


def _ntk_theta(config: PretrainedConfig, now: dict[str, Any], factor: float) -> float:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * now.get("partial_rotary_factor", 1.0))
    if rotated <= 2:
        raise InputError(
            message(
                "NTK scaling needs heads with more than one pair of rotated dimensions.",
                {"model": f"rotates {rotated} dimensions of each head"},
                fix="linear",
            )
        )
    return now["rope_theta"] * factor ** (rotated / (rotated - 2))
