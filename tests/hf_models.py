"""Tiny decoders of transformers, and what the tests ask of them."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
WINDOW = 8
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Large enough that attention is far from uniform.
    "initializer_range": 0.3,
}
_HALF = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

FULL = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=8),
    "gemma": GemmaConfig(**_SHAPE, head_dim=16),
    "phi": PhiConfig(**_SHAPE, partial_rotary_factor=0.5),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
}
WINDOWED = {
    "mistral": MistralConfig(**_SHAPE, sliding_window=WINDOW),
    "qwen2 with windows": Qwen2Config(**_SHAPE, **_HALF),
    "qwen3 with windows": Qwen3Config(**_SHAPE, **_HALF, head_dim=8),
}
# transformers has no sdpa for Gemma 2, because of its cap.
GEMMA2 = Gemma2Config(**_SHAPE, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=None)
SDPA = FULL | WINDOWED
FAMILIES = SDPA | {"gemma2 without cap": GEMMA2}


def model_of(config: PretrainedConfig, *, dtype: torch.dtype = torch.float64, **changes):
    """Return a model with random weights, the same on every call, in eval mode."""
    torch.manual_seed(0)
    keys = config.to_dict() | changes
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(type(config).from_dict(keys), attn_implementation=attention)
    return model.to(dtype).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    """Return token ids [batch, length] without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def padding(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """Return a mask [batch, length], 0 on padding: each row differently, the last row full."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch - 1):
        amount = 3 + 4 * row
        if kind == "left":
            mask[row, :amount] = 0
        elif kind == "right":
            mask[row, length - amount :] = 0
        elif kind == "holes":
            mask[row, 2 + row :: 5] = 0
    return mask


def real_logits(model, ids, mask, **options):
    """Return the logits [tokens, vocabulary] of the tokens that are not padding."""
    logits = model(ids, attention_mask=mask, **options).logits
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


def recompute(model, **options) -> None:
    """Let a model compute its activations again on the way back, by whichever name transformers has for it."""
    new = hasattr(model, "activation_checkpointing_enable")
    getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")(options or None)
