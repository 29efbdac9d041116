"""The adapter: which weights are trained, and how they become part of the model again."""

from __future__ import annotations

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from longspan.errors import InputError, message

# How the projections of attention are called: separate in most models, joined in some.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn")


def adapt(model: PreTrainedModel, *, rank: int) -> PeftModel:
    """Put LoRA on the projections of attention, and train embeddings and norms whole.

    Args:
        model: the model; its own weights are left as they are until `merge`.
        rank: of the LoRA matrices; their scale is 2.

    Raises:
        InputError: a model whose attention has no projections of a known name.

    References:
        Hu et al., LoRA (arXiv 2106.09685); Chen et al., LongLoRA (arXiv 2309.12307), section 3.3, for the
        embeddings and norms, without which LoRA falls short at long contexts.
    """
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    projections = [name for name in _PROJECTIONS if name in ends]
    if not projections:
        raise InputError(
            message(
                "LoRA finds no attention to train in this model.",
                {"model": type(model).__name__, "wanted": f"modules called {', '.join(_PROJECTIONS)}"},
                fix="a decoder such as Llama, Mistral, Qwen or Gemma",
            )
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=projections,
        modules_to_save=_whole(model),
        ensure_weight_tying=bool(model.config.tie_word_embeddings),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft still asks for a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Return the model with everything trained put into its own weights, under their own names."""
    return adapted.merge_and_unload()


def _whole(model: PreTrainedModel) -> list[str]:
    """Return the last names of the modules that are trained whole: input embeddings and norms."""
    embeddings = model.get_input_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if module is embeddings or _is_norm(module)
        }
    )


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("Norm", "LayerNorm")) and not list(module.children())
