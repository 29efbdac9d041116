"""Layers: what each reads, told by the configuration, is what it reads when the model runs."""

from __future__ import annotations

import pytest
import torch
from hf_models import _SHAPE, FAMILIES, WINDOW, model_of
from transformers import (
    Exaone4Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    MixtralConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from longspan.errors import InputError, PatternError
from longspan.hf.attention import set_pattern
from longspan.hf.batch import Batch
from longspan.hf.layers import layer_patterns, windows
from longspan.pattern import Causal, Chunk, simplify

MORE = {
    "gemma3": Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=WINDOW, sliding_window_pattern=2),
    "phi3": Phi3Config(**_SHAPE, sliding_window=WINDOW),
    "starcoder2": Starcoder2Config(**_SHAPE, sliding_window=WINDOW),
    "mixtral": MixtralConfig(**_SHAPE, sliding_window=WINDOW),
    "phimoe": PhimoeConfig(**_SHAPE, sliding_window=WINDOW),
    "qwen2 with experts, windows off": Qwen2MoeConfig(**_SHAPE, num_experts=8),
    "exaone4": Exaone4Config(**_SHAPE, sliding_window=WINDOW, sliding_window_pattern=2),
    "smollm3": SmolLM3Config(
        **_SHAPE, use_sliding_window=True, sliding_window=WINDOW, no_rope_layers=[1, 0, 1]
    ),
}


@pytest.mark.parametrize("asked", [[Causal()], [Chunk(6), Causal(), Chunk(5)]], ids=["one", "each"])
@pytest.mark.parametrize("family", FAMILIES | MORE)
def test_layers_read_as_told(family, asked, monkeypatch):
    config = (FAMILIES | MORE)[family]
    model = model_of(config, dtype=torch.float32)
    set_pattern(model, asked if len(asked) > 1 else asked[0])
    read, attend = [], Batch.attend

    def noted(batch, query, key, value, pattern, **options):
        read.append(simplify(pattern))
        return attend(batch, query, key, value, pattern, **options)

    monkeypatch.setattr(Batch, "attend", noted)
    with torch.no_grad():
        model(torch.arange(3, 43)[None], use_cache=False)
    assert tuple(read) == layer_patterns(asked, windows(config))


def test_windows_are_those_of_layers_that_attend():
    kept = {name: windows(config) for name, config in (FAMILIES | MORE).items()}
    assert kept["llama"] == kept["qwen2"] == kept["qwen2 with experts, windows off"] == (None,) * 3
    assert kept["mistral"] == kept["phi3"] == (WINDOW,) * 3
    assert kept["qwen2 with windows"] == (None, WINDOW, WINDOW)
    assert kept["gemma2 without cap"] == kept["gemma3"] == (WINDOW, None, WINDOW)
    assert windows(Qwen3NextConfig(num_hidden_layers=8)) == (None, None)


def test_layers_that_no_pattern_describes_are_refused():
    with pytest.raises(InputError) as refused:
        windows(Llama4TextConfig(num_hidden_layers=4))
    assert str(refused.value).splitlines() == [
        "Some layers of this model read by a rule that no pattern says.",
        "  model   llama4_text",
        "  layers  chunked_attention",
        "  try     a decoder whose layers read densely or through sliding windows, such as Llama, Mistral, Qwen or Gemma",
    ]


def test_patterns_must_be_one_or_as_many_as_layers():
    with pytest.raises(PatternError, match="one for each attention layer"):
        layer_patterns([Causal(), Causal()], (4, None, 4))
