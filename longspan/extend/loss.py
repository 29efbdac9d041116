"""The loss: logits of a few tokens at a time, so those of a long window are never there at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longspan.errors import InputError, message

# Logits that are held at a time: 64 MiB in float32.
LOGITS = 1 << 24
# Tokens on which the chunked loss is compared with the model's own, and the share of it that rounding may change.
_PROBE = 16
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_IGNORED = -100


def chunked_loss(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    cap: float | None = None,
    items: Tensor | int | None = None,
    logits: int = LOGITS,
) -> Tensor:
    """Return the loss of a causal language model, equal to that over all logits at once.

    The law: it is the mean over the labels that count of `-log softmax(head(hidden))[label]`, where the token at
    place `i` is to be guessed from `hidden[i - 1]`. Logits of each chunk are computed again on the way back.

    Args:
        hidden: `[batch, length, width]`.
        labels: token ids int64 `[batch, length]`, -100 where nothing is to be guessed; not shifted.
        head: turns hidden states into logits.
        cap: logits are squeezed to `cap * tanh(logits / cap)`, as Gemma 2 does; None leaves them.
        items: what to divide the sum by, None for the number of labels that count.
        logits: how many numbers the logits of one chunk may be.

    Returns:
        The loss, float32 (float64 for float64), without shape.

    Example:
        >>> head = nn.Linear(8, 5)
        >>> hidden, labels = torch.randn(2, 7, 8), torch.randint(5, (2, 7))
        >>> whole = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        >>> torch.allclose(chunked_loss(hidden, labels, head, logits=15), whole)
        True
    """
    targets = labels[:, 1:].flatten()
    states = hidden[:, :-1].flatten(0, 1)
    if items is None:
        items = targets.ne(_IGNORED).sum()
    size = max(1, logits // max(1, _vocabulary(head)))

    def part(states: Tensor, targets: Tensor) -> Tensor:
        scores = head(states)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        return F.cross_entropy(scores, targets, ignore_index=_IGNORED, reduction="sum")

    if len(targets) <= size:
        return part(states, targets) / items
    sums = [
        checkpoint(part, some, guesses, use_reentrant=False)
        for some, guesses in zip(states.split(size), targets.split(size), strict=True)
    ]
    return torch.stack(sums).sum() / items


@contextmanager
def chunked(model: PreTrainedModel) -> Iterator[None]:
    """Let a causal model compute its loss in chunks for as long as a block runs; it then returns no logits.

    Args:
        model: the model itself, inside any wrapper.

    Raises:
        InputError: its own loss is another one, as where logits are scaled or experts add a term: found by
            comparing the two on a few tokens.
    """
    own = model.forward
    base, head = model.base_model, model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def forward(
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if labels is None:
            return own(input_ids=input_ids, **options)
        options = {name: value for name, value in options.items() if value is not None}
        hidden = base(input_ids=input_ids, **options | {"use_cache": False, "return_dict": True})[0]
        if shift_labels is not None:
            # Every place has its own label, the last one too; a place more, and nothing is left out.
            labels, hidden = F.pad(shift_labels, (1, 0)), F.pad(hidden, (0, 0, 0, 1))
        loss = chunked_loss(hidden, labels.to(hidden.device), head, cap=cap, items=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    _check(model, own, forward)
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _check(model: PreTrainedModel, own: Any, ours: Any) -> None:
    """Compare the two losses on a few tokens, where reading in chunks is not told apart from reading whole."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_PROBE, device=model.device) * 7919 % size)[None]
    before = model.training
    kinds = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    model.eval()
    try:
        # Weights of several dtypes multiply each other under autocast alone, as in training.
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=len(kinds) > 1):
            wanted, got = (
                float(loss(input_ids=ids, labels=ids, use_cache=False).loss) for loss in (own, ours)
            )
    finally:
        model.train(before)
    if not math.isfinite(wanted):
        raise InputError(
            message(
                "This model's loss is no number.",
                {
                    "model": type(model).__name__,
                    "its loss": f"{wanted} on {_PROBE} tokens, before any training",
                    "why": "its weights hold numbers that are none, or its own code fails on this text",
                },
                fix="a checkpoint that `longspan eval` can measure",
            )
        )
    if not abs(got - wanted) <= max(map(_ROUNDING.__getitem__, kinds)) * abs(wanted):
        raise InputError(
            message(
                "The loss of this model cannot be computed in chunks.",
                {
                    "model": type(model).__name__,
                    "its loss": f"{wanted:.6f} on {_PROBE} tokens",
                    "in chunks": f"{got:.6f}: it does more to its logits or its loss than is known here",
                },
                fix="--loss whole",
            )
        )


def _vocabulary(head: nn.Module) -> int:
    size = getattr(head, "out_features", None)
    return int(size if size is not None else head.weight.shape[0])
