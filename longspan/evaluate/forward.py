"""Forward: rows of token ids through a model, for the logits of their last positions, or for what it writes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from longspan.errors import InputError, message
from longspan.hf.quiet import quiet

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


def written(model: Any, rows: Sequence[np.ndarray], budgets: Sequence[int]) -> Iterator[list[int]]:
    """Yield what a model writes after each row by greedy decoding, with its cache of keys and values.

    Args:
        model: a causal language model of transformers.
        rows: token ids, int64 `[tokens]` each; neighbours of one length share a forward pass and need no padding.
        budgets: the most tokens to write after each row; writing ends sooner at an end token.

    Yields:
        The ids written, one list per row.

    Raises:
        InputError: the model has no positions beyond some shorter length.
    """
    kinds = [(len(row), budget) for row, budget in zip(rows, budgets, strict=True)]
    done = 0
    for (length, budget), alike in groupby(kinds):
        end = done + len(list(alike))
        batch = max(1, TOKENS // length)
        for begin in range(done, end, batch):
            ids = torch.from_numpy(np.stack(rows[begin : min(end, begin + batch)])).to(model.device)
            yield from _continued(model, ids, budget)
        done = end


def _continued(model: Any, ids: torch.Tensor, budget: int) -> list[list[int]]:
    """Write on after rows of one length."""
    settings = model.generation_config
    # Rows that have ended are filled with this; what stands there is dropped as special when decoded.
    blank = settings.pad_token_id
    if blank is None and settings.eos_token_id is not None:
        blank = settings.eos_token_id if isinstance(settings.eos_token_id, int) else settings.eos_token_id[0]
    training = model.training
    model.eval()
    try:
        with quiet(), torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=budget,
                pad_token_id=blank,
            )
    except IndexError as error:
        raise _beyond(model, ids.shape[1] + budget) from error
    finally:
        model.train(training)
    return found[:, ids.shape[1] :].tolist()


def check_positions(model: Any, length: int) -> None:
    """Refuse a length for which a model has no positions, before anything is measured.

    Raises:
        InputError: positions are a table with fewer rows.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or length <= limit:
        return
    for name, module in model.named_modules():
        table = name.rsplit(".", 1)[-1]
        # GPT-2 calls it wpe; others have positions in the name, and a few rows more for padding.
        if isinstance(module, torch.nn.Embedding) and ("pos" in table or table == "wpe"):
            raise _beyond(model, length)


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
