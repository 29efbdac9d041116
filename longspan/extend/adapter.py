"""The adapter: which weights are trained, and how they become part of the model again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from longspan.errors import InputError, message

# How the projections of attention are called: separate in most models, joined in some.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "dense")


def check_method(method: str) -> None:
    """Refuse a method that this installation cannot carry out.

    Raises:
        InputError: "qlora" without bitsandbytes.
    """
    if method == "qlora" and find_spec("bitsandbytes") is None:
        raise InputError(
            message(
                "QLoRA cannot be done here.",
                {
                    "asked": "method qlora",
                    "why": "weights of 4 bits come from bitsandbytes, which is not installed",
                },
                fix="pip install bitsandbytes, or --method lora",
            )
        )


def adapt(
    model: PreTrainedModel, *, rank: int, method: str = "lora+", seed: int = 0
) -> PreTrainedModel | PeftModel:
    """Mark the weights to train, with LoRA put on the projections of attention unless all of them are.

    Args:
        model: the model; with LoRA its own weights are left as they are until `merge`.
        rank: of the LoRA matrices; their scale is 2.
        method: "full", "lora", "lora+" or "qlora", see `longspan.extend.recipe.Recipe`.
        seed: of the matrices' first values.

    Returns:
        The model itself for "full", else the model wrapped by peft.

    Raises:
        InputError: a model whose attention has no projections of a known name.

    References:
        Hu et al., LoRA (arXiv 2106.09685); Chen et al., LongLoRA (arXiv 2309.12307), section 3.3, for the
        embeddings and norms, without which LoRA falls short at long contexts; Dettmers et al., QLoRA (arXiv
        2305.14314).
    """
    if method == "full":
        return model.requires_grad_(True)
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    projections = [name for name in _PROJECTIONS if name in ends]
    if not projections:
        raise InputError(
            message(
                "LoRA finds no attention to train in this model.",
                {"model": type(model).__name__, "wanted": f"modules called {', '.join(_PROJECTIONS)}"},
                fix="--method full; or a decoder such as Llama, Mistral, Qwen or Gemma",
            )
        )
    whole = _whole(model) if method == "lora+" else None
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=projections,
        modules_to_save=whole,
        ensure_weight_tying=bool(whole and model.config.tie_word_embeddings),
        task_type="CAUSAL_LM",
    )
    if method == "qlora":
        _quantize(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        # peft still asks for a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge(
    adapted: PreTrainedModel | PeftModel, *, fresh: Callable[[], PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Return the model with everything trained put into its own weights, under their own names.

    Args:
        adapted: what `adapt` returned.
        fresh: reads the model again; called where the weights trained beside are of 4 bits only.
    """
    if not isinstance(adapted, PeftModel):
        return adapted
    model = adapted.get_base_model()
    if getattr(model, "is_loaded_in_4bit", False) and fresh is not None:
        trained = get_peft_model_state_dict(adapted)
        rank = adapted.active_peft_config.r
        adapted = adapt(fresh(), rank=rank, method="lora")
        set_peft_model_state_dict(adapted, trained)
    return adapted.merge_and_unload()


def causal_model(adapted: nn.Module) -> PreTrainedModel:
    """Return the model of transformers inside what `adapt` returned."""
    return adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted


def _quantize(model: PreTrainedModel) -> None:
    """Put weights of 4 bits in place of every matrix but the head's."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    device, head = model.device, model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            small = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=torch.bfloat16 if device.type == "cuda" else module.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            small.weight = Params4bit(module.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
            small.bias = module.bias
            # Read once without gradients, it would order its weights anew for bfloat16 instructions of a CPU: rounded
            # again, of some sizes only, and from then on without a gradient for what comes before it.
            small.support_avx512bf16_for_cpu = False
            model.set_submodule(name, small.to(device))
    # This is how peft tells that its matrices stand beside weights of 4 bits.
    model.is_loaded_in_4bit = True


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
