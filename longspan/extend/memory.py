"""The memory that training takes, found from the configuration alone: the model runs without numbers."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from longspan.extend.adapter import adapt, causal_model
from longspan.extend.loss import LOGITS
from longspan.extend.recipe import Recipe
from longspan.hf.layers import layer_patterns, windows
from longspan.hf.precision import training_dtype
from longspan.hf.quiet import quiet
from longspan.kernel.plan import plan
from longspan.pattern import parse

_PROBE = "longspan_probe"
# Logits of a chunk, their softmax, and the gradient of them.
_COPIES_OF_LOGITS = 3
# The share of activations' bytes that is left in lower precision: norms and rotary positions stay in float32. Measured
# on the default model.
_LOWER = 0.65
# Frequencies that transformers chooses anew by the length of each text.
_BY_LENGTH = ("longrope", "dynamic")
# Weights of 4 bits, with the scales of their blocks.
_QUANTIZED = 0.53


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on one device, at its peak.

    Attributes:
        parameters: numbers in the model.
        trained: how many of them, or beside them, are trained.
        weights: bytes of the model and what is put beside it.
        moments: of the optimizer.
        gradients: of what is trained.
        activations: what the way back needs of one batch.
        workspace: logits of a chunk, and what attention takes while it is computed.
    """

    parameters: int
    trained: int
    weights: int
    moments: int
    gradients: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """The peak: gradients grow while activations go, so the larger of the two counts."""
        passing = max(self.activations + self.workspace, self.gradients + self.workspace)
        return self.weights + self.moments + passing


def training_memory(
    config: PretrainedConfig, recipe: Recipe, *, dtype: torch.dtype = torch.float32
) -> Memory:
    """Return what training by a recipe takes.

    The model is built on torch's meta device and its forward is run there on a batch of the recipe's size: what
    autograd keeps is counted, whatever the architecture. Attention is taken to keep its input, its output and one
    number per query and head, as all exact kernels do. What the process itself takes (half a gigabyte of
    libraries) comes on top, and so does what an allocator keeps of freed memory: glibc's by default up to as much
    again, which MALLOC_MMAP_THRESHOLD_=262144 avoids.

    Args:
        config: of the model.
        recipe: method, window, batch and what is done with activations.
        dtype: in which the model computes. What is trained is float32, all else as `training_dtype` holds it.

    Returns:
        Bytes by kind: exact in weights, moments and gradients, an estimate in the rest.

    Example:
        >>> from transformers import LlamaConfig
        >>> small = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        >>> recipe = Recipe(length=1024, method="full")
        >>> memory = training_memory(small, recipe)
        >>> memory.parameters == memory.trained, memory.moments == 8 * memory.trained
        (True, True)
    """
    config = copy.deepcopy(config)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _BY_LENGTH:
        # They look at the numbers of positions, and there are none; what is kept is the same.
        config.rope_parameters = {
            key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")
        } | {"rope_type": "default"}
    with init_empty_weights(include_buffers=False), quiet():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=_PROBE, dtype=torch.float32)
        model.config.get_text_config()._experts_implementation = _PROBE
    # Weights were put in one by one, which parts those that are shared.
    model.tie_weights()
    parameters = sum(weight.numel() for weight in model.parameters())
    method = "lora" if recipe.method == "qlora" else recipe.method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = adapt(model, rank=recipe.rank, method=method)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    held = training_dtype(config, dtype).itemsize
    weights = 4 * trained + held * (sum(weight.numel() for weight in adapted.parameters()) - trained)
    if recipe.method == "qlora":
        body = parameters - model.get_input_embeddings().weight.numel()
        weights -= int((held - _QUANTIZED) * body)
    tokens = recipe.batch * recipe.window
    kept = _kept(adapted, recipe)
    share = 1 if dtype == torch.float32 else _LOWER
    # Under autocast the way back holds each weight of float32 once more, in the lower precision: where layers are computed
    # anew, or what they keep is moved away, those of one layer.
    layers = model.config.get_text_config().num_hidden_layers
    whole = parameters if held == 4 else min(trained, parameters)
    at_once = whole if recipe.activations == "kept" else whole // layers
    lower = 0 if dtype == torch.float32 else at_once * dtype.itemsize
    vocabulary = model.get_output_embeddings().weight.shape[0]
    logits = tokens * vocabulary
    if recipe.loss == "chunked":
        logits = min(logits, max(LOGITS, vocabulary))
    return Memory(
        parameters=parameters,
        trained=trained,
        weights=weights + lower,
        moments=8 * trained,
        gradients=4 * trained,
        activations=int(kept * share),
        workspace=int(_COPIES_OF_LOGITS * 4 * logits + _attention(config, recipe, dtype)),
    )


def _attention(config: PretrainedConfig, recipe: Recipe, dtype: torch.dtype) -> int:
    """Return the bytes that the layer with the hungriest pattern takes to attend.

    Those of the way there are counted: on the way back, more is free by then than attention takes.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    parts = [parse(pattern) for pattern in recipe.patterns(recipe.window)]
    return max(
        plan(layer, length=recipe.window, heads=heads, width=width, dtype=dtype).workspace[0]
        for layer in set(layer_patterns(parts, windows(config)))
    )


def _kept(adapted: nn.Module, recipe: Recipe) -> int:
    """Return the bytes that autograd keeps of a forward, and of one layer more where it is recomputed."""
    model = causal_model(adapted)
    own = {weight.untyped_storage()._cdata for weight in [*model.parameters(), *model.buffers()]}
    ids = torch.zeros(recipe.batch, recipe.window, dtype=torch.long, device="meta")
    sizes: dict[int, int] = {}
    # Storages must stay, or a later one could get the number of one that is gone.
    held: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in own:
            held.append(saved)
            sizes[storage._cdata] = storage.nbytes()
        return saved

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        # A mask of four dimensions is handed through as it is; without one, numbers would be looked at.
        mask = torch.zeros(1, 1, 1, 1, device="meta")
        last = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    width = last.numel() * last.element_size()
    whole = sum(sizes.values())
    layers = model.config.get_text_config().num_hidden_layers
    # On the way back, gradients of two of the widest are there beside.
    passing = 2 * max(sizes.values())
    if recipe.activations == "recomputed":
        return layers * width + whole // layers + passing
    # What is offloaded is here only while its layer runs.
    return (whole // layers if recipe.activations == "offloaded" else whole) + passing


class _Attention(torch.autograd.Function):
    """An attention that computes nothing, and keeps what one that does would keep."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, heads, length, value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length))
        return output


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _experts(module: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Let the first expert do the work of all, which keeps as much: each token goes through as many as are chosen."""
    up, down = (module.gate_up_proj if module.has_gate else module.up_proj)[0], module.down_proj[0]
    if not module.is_transposed:
        up, down = up.T, down.T
    inner = states.repeat_interleave(chosen.shape[-1], dim=0) @ up
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return ((inner @ down) * weights.reshape(-1, 1)).unflatten(0, chosen.shape).sum(1)


AttentionInterface.register(_PROBE, _probe)
ALL_EXPERTS_FUNCTIONS.register(_PROBE, _experts)
AttentionMaskInterface.register(_PROBE, lambda **options: None)
