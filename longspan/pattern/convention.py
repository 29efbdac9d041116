"""Conventions: patterns from the arguments that other libraries take for them, each written down in this one place.

Windows differ by one from library to library, and some count one side where others count both. Here every size counts
positions and includes the query's own; a function below takes the foreign number and says the same in our words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longspan.errors import PatternError, message
from longspan.pattern.atoms import Causal, Chunk, Everything, Window
from longspan.pattern.base import Pattern, PerHead
from longspan.pattern.bigbird import outermost
from longspan.pattern.choice import Chosen
from longspan.pattern.headwise import LongNet
from longspan.pattern.named import Longformer
from longspan.pattern.neighborhood import Neighborhood
from longspan.pattern.sparse import Fixed, Strided


def mistral(sliding_window: int | None) -> Pattern:
    """Return what `sliding_window` of Mistral and of transformers' decoders means: so many keys, the own included.

    Args:
        sliding_window: keys read, in tokens; None reads all before.

    Raises:
        PatternError: a window that is no positive integer.

    Example:
        >>> mistral(4096)
        Causal() & Window(4096)
    """
    return Causal() if sliding_window is None else Causal() & Window(sliding_window)


def transformers_encoder(sliding_window: int | None) -> Pattern:
    """Return what `sliding_window` of transformers' encoders means: so many keys on each side, besides the own.

    Example:
        >>> transformers_encoder(64)
        Window(65)
    """
    return Everything() if sliding_window is None else Window(sliding_window + 1)


def transformers_chunked(attention_chunk_size: int) -> Pattern:
    """Return what `attention_chunk_size` of transformers' decoders means, of a text without padding on the left.

    Example:
        >>> transformers_chunked(8192)
        Causal() & Chunk(8192)
    """
    return Causal() & Chunk(attention_chunk_size)


def attention_gym(window_size: int) -> Pattern:
    """Return what `generate_sliding_window` of attention-gym means: so many keys before the query's own.

    Example:
        >>> attention_gym(512)
        Causal() & Window(513)
    """
    return Causal() & Window(window_size + 1)


def flash(window_size: tuple[int, int] = (-1, -1), *, causal: bool = False) -> Pattern:
    """Return what `window_size` of flash-attention means: keys before and after the query's own, -1 for all.

    The library lays the last query beside the last key; `attend` does so too where it is given no `queries`.

    Args:
        window_size: keys to the left and to the right, each -1 or more.
        causal: True reads nothing to the right whatever `window_size` says.

    Raises:
        PatternError: a side below -1.

    Example:
        >>> flash((511, 0))
        Causal() & Window(512)
        >>> flash((511, 64))
        Causal() & Window(512) | Causal().T & Window(65)
    """
    left, right = window_size[0], 0 if causal else window_size[1]
    if min(left, right) < -1:
        raise PatternError(
            message(
                "A side of `window_size` is a number of tokens, or -1 for all.",
                {"got": f"window_size={window_size}"},
                fix="window_size=(511, 0), or (-1, -1) for no window",
            )
        )
    before = Causal() if left < 0 else Causal() & Window(left + 1)
    after = Causal().T if right < 0 else Causal().T & Window(right + 1)
    if right == 0:
        return before
    if left == right:
        return Everything() if left < 0 else Window(left + 1)
    return before | after


def longformer(attention_window: int, *, global_tokens: Sequence[int] = ()) -> Longformer:
    """Return what `attention_window` of the paper and of transformers means: half of it on each side, and the own key.

    Args:
        attention_window: keys on both sides together, in tokens, even.
        global_tokens: positions that read everything and are read by all.

    Raises:
        PatternError: a window that is odd or no positive integer.

    Example:
        >>> [longformer(window) for window in (32, 64)]  # one per layer, as in `config.attention_window`
        [Longformer(17, global_tokens=0, causal=False), Longformer(33, global_tokens=0, causal=False)]
    """
    if type(attention_window) is not int or attention_window < 2 or attention_window % 2:
        raise PatternError(
            message(
                "Longformer's attention_window is even: half of it lies on each side.",
                {"got": f"attention_window={attention_window!r}"},
                fix="longformer(512), or Longformer(window) with the keys of one side and the query's own",
            )
        )
    return Longformer(attention_window // 2 + 1, global_tokens=tuple(global_tokens) or 0, causal=False)


def longformer_code(
    attention_window: int,
    *,
    attention_dilation: int | Sequence[int] = 1,
    autoregressive: bool = False,
) -> Longformer:
    """Return what `attention_window` of the authors' code means: so many keys on each side, besides the own.

    Args:
        attention_window: keys on one side.
        attention_dilation: distance between them, for all heads or one for each.
        autoregressive: True reads nothing after the query.

    Example:
        >>> longformer_code(256, attention_dilation=[1, 2], autoregressive=True)
        Longformer(257, dilation=(1, 2), global_tokens=0)
    """
    apart = attention_dilation if isinstance(attention_dilation, int) else tuple(attention_dilation)
    return Longformer(attention_window + 1, dilation=apart, global_tokens=0, causal=autoregressive)


def natten(kernel_size: int, *, dilation: int = 1, is_causal: bool = False, length: int = 0) -> Neighborhood:
    """Return what the arguments of NATTEN's `na1d` mean, over a text of `length` tokens where it is not causal.

    Example:
        >>> natten(7, dilation=4, length=100)
        Neighborhood(7, dilation=4, length=100, causal=False)
    """
    return Neighborhood(kernel_size, dilation=dilation, length=0 if is_causal else length, causal=is_causal)


def torchscale(
    segment_length: Sequence[int], dilated_ratio: Sequence[int], *, causal: bool = True
) -> LongNet:
    """Return what torchscale's LongNet reads, whose neighbouring heads keep the same tokens.

    Torchscale reads its own zero padding where `causal=False` and the length is no multiple of the segments; that is
    left out.

    Example:
        >>> torchscale([2048, 4096], [1, 2])
        LongNet((2048, 4096), (1, 2), offset='torchscale')
    """
    return LongNet(tuple(segment_length), tuple(dilated_ratio), offset="torchscale", causal=causal)


def sparse_strided(local_attn_ctx: int) -> tuple[Pattern, Pattern]:
    """Return the two steps of `openai/sparse_attention` for `strided`: a window that counts the own key, and strides.

    Example:
        >>> [pattern.at_head(0, 1) for pattern in sparse_strided(128)]
        [Causal() & Window(128), Causal() & Dilated(128)]
    """
    near, far = Strided(local_attn_ctx, window=local_attn_ctx).by_layer(2)
    return near, far


def sparse_fixed(local_attn_ctx: int, *, blocksize: int, vertsize: int = 1, num_verts: int = 1) -> Fixed:
    """Return what `openai/sparse_attention` reads for `fixed`, whose summaries count blocks of `blocksize` tokens.

    Example:
        >>> sparse_fixed(128, blocksize=32, num_verts=4)
        Fixed(128, summary=32, variants=4)
    """
    return Fixed(local_attn_ctx, summary=vertsize * blocksize, variants=num_verts)


def bigbird(plan: Any, *, block: int) -> Pattern:
    """Return what transformers' BigBird reads with one plan of random blocks, counted as often as its softmax does.

    In training it is the paper's pattern, if not the same one every time: transformers draws a new plan from numpy's
    global generator for every forward pass. Draws that repeat a block that is read anyway count once more.

    Args:
        plan: `rand_attn` of transformers, `[heads, blocks - 2, random]`: for each row but the outermost the blocks drawn.
        block: tokens in a block.

    Raises:
        PatternError: a plan of another shape.

    Example:
        >>> bigbird([[[3], [0], [0]]], block=2).at_head(0, 1).operands[-1]
        Chosen(((), (3,), (0,), (0,)), size=2)
    """
    table = np.asarray(plan)
    if table.ndim != 3 or table.dtype.kind not in "iu" or not table.shape[0]:
        raise PatternError(
            message(
                "A plan of random blocks is an array of integers, [heads, blocks - 2, random].",
                {"got": f"{list(table.shape)} {table.dtype}"},
                fix="the array `rand_attn` of transformers, without its batch",
            )
        )
    fixed = outermost(block, (table.shape[1] + 2) * block)
    heads = [
        sum((Chosen(rows, size=block) for rows in _repeats(head)), start=fixed) for head in table.tolist()
    ]
    return heads[0] if len(heads) == 1 else PerHead(heads)


def bigbird_evaluated(*, block: int, length: int, random: int = 3) -> Pattern:
    """Return what transformers' BigBird reads in evaluation: no random block at all, and block 0 `1 + random` times.

    Its plan is all zeros when the model is not training (transformers 5.23, since pull request 23056), so every row
    but the outermost counts the keys of block 0 `random` times more. It is here to reproduce that, not to use;
    `BigBird` reads in evaluation what it reads in training.

    Args:
        block: tokens in a block.
        length: tokens in the text, a multiple of `block`.
        random: blocks drawn for each row, `num_random_blocks`.

    Example:
        >>> from longspan.derive.mask import counts
        >>> counts(bigbird_evaluated(block=1, length=6), length=6)[2].tolist()
        [4, 1, 1, 1, 0, 1]
    """
    return bigbird(np.zeros((1, length // block - 2, random), dtype=np.int64), block=block)


def _repeats(rows: list[list[int]]) -> list[tuple[tuple[int, ...], ...]]:
    """Cut draws into tables without repetition: each block's first draw in a row, its second, and so on."""
    most = max((row.count(block) for row in rows for block in row), default=0)
    # The outermost rows of blocks have no draws.
    return [
        ((), *(tuple(block for block in sorted(set(row)) if row.count(block) > often) for row in rows))
        for often in range(most)
    ]
