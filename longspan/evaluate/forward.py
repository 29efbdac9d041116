"""Forward: rows of token ids through a model, for the logits of their last positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from longspan.errors import InputError, message

# Called after every window with the tokens read so far and the tokens in all.
Progress = Callable[[int, int], None]

# Short rows share a forward pass of about this many tokens; longer rows go one by one.
TOKENS = 4096


def last_logits(model: Any, rows: np.ndarray, keep: int) -> Iterator[torch.Tensor]:
    """Yield the logits of the last positions of each row, for rows of one length.

    Only the logits asked for are computed. The model runs in evaluation mode, without gradients and in its own
    dtype, and is left in the mode it was in.

    Args:
        model: a causal language model of transformers.
        rows: token ids, int64 `[rows, length]`.
        keep: how many of the last positions, 1 to length.

    Yields:
        Logits `[keep, vocabulary]` in the model's dtype, one per row.

    Raises:
        InputError: the model has no positions beyond some shorter length.
    """
    length = rows.shape[1]
    batch = max(1, TOKENS // length)
    training = model.training
    model.eval()
    try:
        for begin in range(0, len(rows), batch):
            ids = torch.from_numpy(rows[begin : begin + batch]).to(model.device)
            with torch.no_grad():
                try:
                    logits = model(ids, use_cache=False, logits_to_keep=keep).logits
                except IndexError as error:
                    raise _beyond(model, length) from error
            yield from logits
    finally:
        model.train(training)


def _beyond(model: Any, length: int) -> InputError:
    """A model whose positions are a table fails with an index error after the table's end."""
    return InputError(
        message(
            "This model cannot read that many tokens.",
            {
                "asked": f"a window of {length:,} tokens",
                "model": f"{type(model).__name__} has {model.config.max_position_embeddings:,} positions in a table",
            },
            fix=f"lengths up to {model.config.max_position_embeddings:,}",
        )
    )
