"""Model: a causal language model and its tokenizer, from a folder, a Hugging Face id, or the package itself."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import torch
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longspan.errors import InputError, message
from longspan.hf import quantized
from longspan.hf.quiet import quiet
from longspan.size import size

DEFAULT = "default"
_PACKAGED = Path(__file__).parents[1] / "default_model"
# Seconds to wait for the hub's first answer.
_PATIENCE = 10
# How classes of causal models are called, those of older checkpoints and of foreign code among them.
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def load_config(source: str | os.PathLike[str] | None = None) -> PretrainedConfig:
    """Return the configuration of a causal language model, without reading its weights.

    Args:
        source: a folder, a Hugging Face id, or None or "default" for the model that comes with Longspan.

    Returns:
        The configuration, of transformers' class for this model.

    Raises:
        InputError: nothing can be found or fetched under this name, its config.json cannot be read, or the
            model is not a causal language model.

    Example:
        >>> load_config("no/such/folder")
        Traceback (most recent call last):
        longspan.errors.InputError: There is no model folder at this path.
          asked  no/such/folder
          try    a folder with config.json, a Hugging Face id (owner/name), or "default"
    """
    place = _place(source)
    reading = _reading(place)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(place, **reading)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(place, "configuration", error, reading) from error
    _check_causal(place, config)
    return config


def load_model(
    source: str | os.PathLike[str] | None = None,
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    bits: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model in eval mode and its tokenizer.

    Args:
        source: a folder, a Hugging Face id, or None or "default" for the model that comes with Longspan.
        config: a configuration to build the model with in place of its own, such as one from
            `longspan.hf.config.extended`.
        dtype: of the weights. Frequencies of RoPE stay in float32 whatever it is.
        device: where the weights go.
        bits: 4 to hold every matrix but the embeddings and the head in 4 bits (NF4 of bitsandbytes), each made so
            as it is read; 0 leaves them.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: as `load_config`; or there is no tokenizer, there are no weights, some are missing, or there is no
            room for them.

    Example:
        >>> model, tokenizer = load_model("path/to/model")  # doctest: +SKIP
    """
    if config is None:
        config = load_config(source)
    place = _place(source)
    _check_causal(place, config)
    device = torch.device(device)
    _check_room(place, config, dtype, device, bits)
    reading = _reading(place)
    made = quantized.as_read(dtype, device) if bits else {}
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **reading)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _unreadable(place, "tokenizer", error, reading) from error
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, **made, **reading
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _unreadable(place, "weights", error, reading) from error
    missing = sorted(found["missing_keys"])
    if missing:
        shown = missing[:3] + ([f"and {len(missing) - 3} more"] if len(missing) > 3 else [])
        raise InputError(
            message(
                "The weights lack tensors that the model needs.",
                {"model": place, "missing": shown},
                fix="the complete checkpoint of a causal language model",
            )
        )
    # Weights of 4 bits were put there as they were read, and are not moved again.
    model = quantized.settled(model) if bits else model.to(device)
    return model.eval(), tokenizer


def check_tokens(model: PreTrainedModel, ids: np.ndarray) -> None:
    """Refuse token ids that a model has no embeddings for.

    Raises:
        InputError: the tokenizer that made them is that of another model.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if len(ids) and ids.max() >= known:
        raise InputError(
            message(
                "The tokenizer does not belong to this model.",
                {
                    "model": f"{type(model).__name__} with embeddings of {known:,} tokens",
                    "tokenizer": f"writes this text with token {ids.max():,}",
                },
                fix="the tokenizer that the model was trained with, in the model's folder",
            )
        )


def _check_room(
    place: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, bits: int
) -> None:
    """Refuse weights that do not fit into memory, before they are read; they come through the CPU's."""
    with torch.device("meta"), quiet():
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bits:
        needed = quantized.needed(empty)
    else:
        needed = sum(weight.numel() * weight.element_size() for weight in empty.parameters())
    rooms = {"cpu": psutil.virtual_memory().available}
    if device.type == "cuda":
        rooms[str(device)] = torch.cuda.mem_get_info(device)[0]
    for name, room in rooms.items():
        if needed > room:
            raise InputError(
                message(
                    "This model does not fit into memory.",
                    {
                        "model": place,
                        "needs": f"{size(needed)} for its weights in {str(dtype).removeprefix('torch.')}",
                        "there is": f"{size(room)} on {name}",
                    },
                    fix="a smaller model, or a machine with more memory",
                )
            )


def _place(source: str | os.PathLike[str] | None) -> str:
    """Return what transformers can load from: a folder that exists, or something that can be an id."""
    if source is None or source == DEFAULT:
        if not (_PACKAGED / "config.json").exists():
            raise InputError(
                message(
                    "The default model is not in this installation.",
                    {"looked in": "longspan/default_model"},
                    fix="install Longspan again, or name a folder or a Hugging Face id",
                )
            )
        return str(_PACKAGED)
    place = os.fspath(source)
    path = Path(place).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(
                message(
                    "This folder holds no model.",
                    {"asked": place, "missing": "config.json"},
                    fix='a folder with config.json, a Hugging Face id (owner/name), or "default"',
                )
            )
        return str(path)
    if path.exists():
        raise InputError(
            message(
                "This is a file, where a model's folder is wanted.",
                {"asked": place},
                fix=f"the folder it lies in, {path.parent}",
            )
        )
    if not _may_be_id(place):
        raise InputError(
            message(
                "There is no model folder at this path.",
                {"asked": place},
                fix='a folder with config.json, a Hugging Face id (owner/name), or "default"',
            )
        )
    return place


def _may_be_id(place: str) -> bool:
    try:
        validate_repo_id(place)
    except HFValidationError:
        return False
    return not place.startswith((".", "~"))


def _reading(place: str) -> dict[str, bool]:
    """Return how transformers shall read: from the network only if it answers, and never by foreign code."""
    return {
        "local_files_only": Path(place).is_dir() or not _answers(),
        "trust_remote_code": False,
    }


def _answers() -> bool:
    """Say whether the hub can be reached: its own client tries for half a minute before it gives up."""
    if is_offline_mode():
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True


def _check_causal(place: str, config: PretrainedConfig) -> None:
    """Refuse what transformers would load as a causal model although it was not trained as one."""
    names = config.architectures or []
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    classes = known if isinstance(known, tuple) else (known,)
    wanted = {model.__name__ for model in classes if model is not None}
    if not wanted:
        reason = f"transformers has no causal language model of type {config.model_type}"
    elif getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder with a decoder"
    elif names and not any(name in wanted or name.endswith(_CAUSAL_ENDINGS) for name in names):
        reason = f"it was saved as {', '.join(names)}, not as {' or '.join(sorted(wanted))}"
    elif getattr(config, "is_decoder", None) is False and _encoder_by_default(config):
        reason = "its tokens read in both directions (is_decoder is false)"
    elif not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        reason = "its configuration makes every token read in both directions"
    else:
        return
    raise InputError(
        message(
            "This model is not a causal language model.",
            {"model": place, "why": reason},
            fix="a decoder such as Llama, Mistral, Qwen or Gemma",
        )
    )


def _encoder_by_default(config: PretrainedConfig) -> bool:
    """Say whether models of this type are encoders unless told otherwise: those that transformers can mask."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def _unreadable(place: str, part: str, error: Exception, reading: dict[str, bool]) -> InputError:
    """Lay out why a part of a model could not be read, in the words of whoever failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:4]
    if Path(place).is_dir():
        return InputError(
            message(
                f"The model's {part} cannot be read.",
                {"model": place, "reason": lines},
                fix="a complete checkpoint: config.json, weights and tokenizer",
            )
        )
    tried = [
        f"the folder {place}: there is none",
        f"Hugging Face id {place}, copies on this machine",
    ]
    if reading["local_files_only"]:
        tried += ["huggingface.co: it does not answer"]
        facts = {"tried": tried}
    else:
        facts = {"tried": [*tried, "huggingface.co"], "reason": lines}
    return InputError(
        message(
            f"The model's {part} cannot be fetched.",
            facts,
            fix="check the name and the network, or give the path of a folder",
        )
    )
