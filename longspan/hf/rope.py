"""RoPE keys: frequencies read from and written as the keys of a config.json, in the spellings that readers know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import PretrainedConfig

from longspan.errors import InputError, message
from longspan.frequency import (
    NTK,
    DynamicNTK,
    Frequency,
    Linear,
    Llama3,
    LongRoPE,
    NTKByParts,
    Plain,
    YaRN,
)

# Each `rope_type` with its class, and which keys say which fields besides theta and share.
_TYPES: dict[str, tuple[type[Frequency], dict[str, str]]] = {
    "default": (Plain, {}),
    "linear": (Linear, {"factor": "factor"}),
    "dynamic": (DynamicNTK, {"factor": "factor"}),
    "yarn": (
        YaRN,
        {
            "factor": "factor",
            "original": "original_max_position_embeddings",
            "fast": "beta_fast",
            "slow": "beta_slow",
            "attention_factor": "attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
        },
    ),
    "longrope": (
        LongRoPE,
        {
            "short": "short_factor",
            "long": "long_factor",
            "factor": "factor",
            "original": "original_max_position_embeddings",
            "attention_factor": "attention_factor",
        },
    ),
    "llama3": (
        Llama3,
        {
            "factor": "factor",
            "original": "original_max_position_embeddings",
            "low": "low_freq_factor",
            "high": "high_freq_factor",
        },
    ),
}
# Keys that transformers wants even where they have their default values.
_ALWAYS = {"factor", "original", "low", "high"}
# Phi-3's first name for LongRoPE.
_FORMER = {"su": "longrope"}
# Where transformers before version 5 kept theta and the share of rotated dimensions, by model type.
_LEGACY_KEYS = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
# All keys that frequencies are said with, those for the share of a head aside: some classes insist on that one.
KEYS = {"rope_type", "rope_theta", "truncate"}.union(*(names.values() for _, names in _TYPES.values()))
_DEFAULTS = {
    known: {field.name: field.default for field in fields(known) if field.default is not MISSING}
    for known, _ in _TYPES.values()
}


def from_config(config: PretrainedConfig | Mapping[str, Any]) -> Frequency:
    """Return the frequencies with which transformers builds a model.

    Args:
        config: a configuration, or the content of a config.json as saved by transformers 4 (`rope_theta` and
            `rope_scaling`), 5 (`rope_parameters`), or by `write_config` (both).

    Returns:
        A value whose angles and scale are bit by bit those of transformers. Static NTK reads as `Plain` with the
        raised theta, for nothing in a config tells them apart.

    Raises:
        InputError: there is no RoPE, one per kind of layer, one of an unknown type, or one whose keys are missing,
            out of range or contradict each other.

    Example:
        >>> scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
        >>> keys = {"max_position_embeddings": 2048, "rope_theta": 5e5, "rope_scaling": scaling}
        >>> from_config(keys) == YaRN(4.0, original=512, theta=5e5)
        True
    """
    if not isinstance(config, PretrainedConfig):
        return _read(_joined(config), config)
    around = ("max_position_embeddings", "original_max_position_embeddings")
    return _read(parameters_of(config), {name: getattr(config, name, None) for name in around})


def to_config(frequency: Frequency, *, length: int, width: int, model_type: str = "") -> dict[str, Any]:
    """Return the keys of a config.json that say these frequencies, in the old spelling and the new.

    Law: `from_config(to_config(f, ...))` has the angles and the scale of `f`.

    | frequency         | transformers     | vLLM                          | llama.cpp's converter |
    |-------------------|------------------|-------------------------------|-----------------------|
    | Plain, NTK        | yes              | yes                           | yes                   |
    | Linear            | yes              | yes, expects length * factor  | yes                   |
    | YaRN, Llama3      | yes              | yes                           | yes                   |
    | YaRN with a scale | yes              | not in every version          | not in every version  |
    | NTKByParts        | as YaRN, scale 1 | as YaRN with a scale          | as YaRN with a scale  |
    | LongRoPE          | yes, see below   | yes, with the formula's scale | for Phi-3             |
    | DynamicNTK        | until it caches  | as at its longest length      | no                    |

    What vLLM and llama.cpp do is read from their sources, and was not run.

    Transformers chooses LongRoPE's factors anew at every step and keeps cached keys as they were; with `short` equal
    to `long` nothing changes, which is what to write.

    Args:
        frequency: what to say.
        length: tokens that the model shall read, for `max_position_embeddings`. Dynamic NTK wants the trained length
            there, and gets it.
        width: numbers in a head; static NTK is a larger theta, which depends on it.
        model_type: transformers' name of the architecture; GPT-NeoX spells the old keys its own way.

    Returns:
        `rope_parameters`, `rope_theta`, `rope_scaling` where there is a scaling, and `max_position_embeddings`.

    Raises:
        InputError: YaRN or NTK by parts with the paper's ramp, which no key can say.
        ShapeError: a head that the frequency cannot turn.

    Example:
        >>> to_config(Linear(4.0), length=2048, width=64)["rope_scaling"]
        {'rope_type': 'linear', 'factor': 4.0, 'type': 'linear'}
    """
    found = both_styles(to_parameters(frequency, width=width), model_type)
    return found | {"max_position_embeddings": positions(frequency, length)}


def to_parameters(frequency: Frequency, *, width: int) -> dict[str, Any]:
    """Return `rope_parameters` as transformers 5 wants them; see `to_config`."""
    # What cannot be computed must not be written either.
    frequency.angles_per_token(width)
    frequency = _named(frequency, width)
    kind = next(kind for kind, (known, _) in _TYPES.items() if type(frequency) is known)
    written: dict[str, Any] = {"rope_theta": frequency.theta, "rope_type": kind}
    if frequency.share != 1:
        written["partial_rotary_factor"] = frequency.share
    for name, key in _TYPES[kind][1].items():
        value = getattr(frequency, name)
        if name in _ALWAYS or value != _DEFAULTS[type(frequency)].get(name):
            written[key] = list(value) if isinstance(value, tuple) else value
    if isinstance(frequency, YaRN) and frequency.ramp == "unrounded":
        written["truncate"] = False
    return written


def positions(frequency: Frequency, length: int) -> int:
    """Return what `max_position_embeddings` must say for a model that reads `length` tokens."""
    return frequency.original if isinstance(frequency, DynamicNTK) else length


def both_styles(parameters: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return the keys of transformers 5 and of those before, with equal values.

    Where they differ, transformers takes the old ones, and servers built on version 4 know no others.
    """
    theta_key, share_key = _legacy_keys(model_type)
    keys = {"rope_parameters": parameters, theta_key: parameters["rope_theta"]}
    if "partial_rotary_factor" in parameters:
        keys[share_key] = parameters["partial_rotary_factor"]
    if parameters["rope_type"] != "default":
        elsewhere = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in parameters.items() if key not in elsewhere}
        keys["rope_scaling"] = scaling | {"type": parameters["rope_type"]}
    return keys


def parameters_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return a model's one set of RoPE parameters, without the old spelling of its type.

    Raises:
        InputError: there is none, or one for each kind of layer.
    """
    return _single(getattr(config, "rope_parameters", None), config.model_type)


def head_width(config: PretrainedConfig) -> int:
    """Return the numbers in a head, turned or not."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _single(parameters: Mapping[str, Any] | None, model_type: str) -> dict[str, Any]:
    model = {"model": model_type}
    if not parameters:
        raise InputError(
            message(
                "This model has no RoPE to scale.",
                model
                | {"why": "its configuration has no rope_parameters: positions enter it in another way"},
                fix="a model with rotary positions, such as Llama, Mistral, Qwen or Gemma",
            )
        )
    kinds = sorted(kind for kind, value in parameters.items() if isinstance(value, Mapping))
    if kinds:
        raise InputError(
            message(
                "This model has one RoPE per kind of layer, which is not scaled yet.",
                model | {"found": ", ".join(kinds)},
                fix="a model whose layers share one RoPE, such as Llama, Mistral, Qwen or Gemma 2",
            )
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return {key: value for key, value in parameters.items() if key != "type"} | {"rope_type": kind}


def _legacy_keys(model_type: str) -> tuple[str, str]:
    return _LEGACY_KEYS.get(model_type, ("rope_theta", "partial_rotary_factor"))


def _joined(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters of a config.json in either style, or in both if they agree."""
    model_type = str(keys.get("model_type", "not said"))
    theta_key, share_key = _legacy_keys(model_type)
    old = dict(keys.get("rope_scaling") or {})
    for key, name in ((theta_key, "rope_theta"), (share_key, "partial_rotary_factor")):
        if keys.get(key) is not None:
            old[name] = keys[key]
    new = dict(keys.get("rope_parameters") or {})
    for style in (old, new):
        if "type" in style:
            style.setdefault("rope_type", style.pop("type"))
    differing = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if differing:
        raise InputError(
            message(
                "This config says two different things about its RoPE.",
                {
                    "old keys": ", ".join(f"{key} {old[key]}" for key in differing),
                    "new keys": ", ".join(f"{key} {new[key]}" for key in differing),
                    "why": "readers of the old keys and readers of rope_parameters would build two models",
                },
                fix="the values it was trained with in both, or only one style",
            )
        )
    return _single(old | new, model_type)


def _read(parameters: dict[str, Any], around: Mapping[str, Any]) -> Frequency:
    """Return what a set of parameters says, with defaults as transformers takes them from the keys around it."""
    kind = _FORMER.get(parameters["rope_type"], parameters["rope_type"])
    if kind not in _TYPES:
        raise InputError(
            message(
                "This type of RoPE is not known.",
                {"found": f"rope_type {kind}"},
                fix=f"a model with {', '.join(_TYPES)}",
            )
        )
    known, names = _TYPES[kind]
    given = {name: parameters[key] for name, key in names.items() if parameters.get(key) is not None}
    given |= _from_around(known, given, around)
    if parameters.get("rope_theta") is not None:
        given["theta"] = parameters["rope_theta"]
    if parameters.get("partial_rotary_factor") is not None:
        given["share"] = parameters["partial_rotary_factor"]
    if known is YaRN and parameters.get("truncate") is False:
        given["ramp"] = "unrounded"
    wanted = {field.name for field in fields(known)} - _DEFAULTS[known].keys() | {"theta"}
    missing = sorted(wanted - given.keys())
    if missing:
        spelled = {"theta": "rope_theta", "original": "max_position_embeddings"}
        raise InputError(
            message(
                "This config does not say all that its RoPE needs.",
                {
                    "found": f"rope_type {kind}",
                    "missing": ", ".join(spelled.get(name) or names[name] for name in missing),
                },
                fix="longspan.hf.load_config, if the model's class has a default for it",
            )
        )
    return known(**given)


def _from_around(known: type[Frequency], given: dict[str, Any], around: Mapping[str, Any]) -> dict[str, Any]:
    length, original = (
        around.get(name) for name in ("max_position_embeddings", "original_max_position_embeddings")
    )
    if known is DynamicNTK:
        return {} if length is None else {"original": length}
    if known not in (YaRN, LongRoPE, Llama3):
        return {}
    found = {}
    if original is not None:
        # Phi-3 keeps it there, and transformers prefers it.
        found["original"] = original
    elif "original" not in given and length is not None:
        found["original"] = length
    if "factor" not in given and known is not Llama3 and length is not None:
        found["factor"] = length / (found | given)["original"]
    return found


def _named(frequency: Frequency, width: int) -> Frequency:
    """Return the same frequency as one that a `rope_type` stands for."""
    if isinstance(frequency, NTK):
        return Plain(theta=frequency.base(width), share=frequency.share)
    if isinstance(frequency, NTKByParts) and frequency.ramp == "turns":
        raise InputError(
            message(
                "No key of a config says the ramp of the YaRN paper.",
                {"asked": f"{type(frequency).__name__} with ramp 'turns'"},
                fix='ramp="rounded", or LongRoPE with the factors of longspan.frequency.factors',
            )
        )
    if type(frequency) is NTKByParts:
        shared = {field.name: getattr(frequency, field.name) for field in fields(frequency)}
        return YaRN(**shared, attention_factor=1.0)
    return frequency
