"""The flash kernel: the flash attention that PyTorch ships for CUDA, called on strided views of the bands of a pattern.

Forward, each call gives an output and a log-sum-exp, merged as they come. Backward, each call is handed the merged
output and log-sum-exp, which makes its gradients exact shares of the whole. A pattern that is one band is one call
on the tensors as they lie, and nothing beside its result is made.

The calls go through PyTorch's operators, so what is activated there (FlashAttention 3 or 4, by
`torch.nn.attention.activate_flash_attention_impl`) runs here too.

A row that is not finite is kept out of the tiles that it shares with others, as in the sdpa kernel. Which rows read it
is a difference of two running counts, since a row of a band reads one stretch. The first look at the result waits for
the device; while a CUDA graph is captured nothing can wait, and rows are looked through and cleared in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longspan.kernel.flash.band import Band
from longspan.kernel.flash.bands import BandGroup
from longspan.kernel.flash.views import View, served, split, views
from longspan.kernel.softmax.finite import capturing, cleared, spoiled
from longspan.kernel.softmax.merge import merge, merge_into
from longspan.kernel.softmax.rows import alike, sinks_gradient, widened, with_lse_gradient, with_sinks
from longspan.score import Scores

DTYPES = ("bfloat16", "float16")
# Numbers in a head, at most, and what they are a multiple of.
WIDEST, LANES = 256, 8
# The first devices with the instructions that PyTorch's kernels are made of.
CAPABILITY = (8, 0)


@dataclass(frozen=True, eq=False)
class Work:
    """What is asked of the kernel beside tensors.

    Attributes:
        groups: who reads what.
        scale: what scores are multiplied by, above 0.
    """

    groups: tuple[BandGroup, ...]
    scale: float

    @cached_property
    def pieces(self) -> tuple[tuple[range, Band], ...]:
        """Heads and bands, those of a few queries cut."""
        return tuple(
            (group.heads, piece) for group in self.groups for band in group.bands for piece in split(band)
        )

    @property
    def fresh(self) -> bool:
        """Whether nothing is to be merged."""
        return all(band.fresh for _, band in self.pieces)


def refusal(query: Tensor, value: Tensor, changes: Scores) -> str | None:
    """Say why this kernel cannot take these tensors and changes of scores, or None where it can."""
    width = max(query.shape[-1], value.shape[-1])
    why = kind_refusal(query.device.type, str(query.dtype).removeprefix("torch."), width)
    if why:
        return why
    if changes.limit is not None:
        return "cannot cap scores softly: PyTorch's flash attention has no tanh"
    if changes.slopes is not None:
        return "knows no distances, which ALiBi needs"
    capability = torch.cuda.get_device_capability(query.device)
    if capability < CAPABILITY:
        least, got = (".".join(map(str, number)) for number in (CAPABILITY, capability))
        return f"needs compute capability {least}, got {got}"
    return None


def kind_refusal(device: str, dtype: str, width: int) -> str | None:
    """Say why this kernel cannot take a kind of device, a dtype or a width of heads, or None where it can."""
    if device != "cuda":
        return f"runs on cuda, got {device}"
    if dtype not in DTYPES:
        return f"takes {' or '.join(DTYPES)}, got {dtype}"
    return None if width <= WIDEST else f"takes heads of {WIDEST} numbers at most, got {width}"


def workspace(
    groups: tuple[BandGroup, ...], heads: int, queries: int, keys: int, width: int
) -> tuple[int, int]:
    """Return the bytes that are taken beside inputs, outputs and gradients, forward and backward, for one row of a
    batch; key heads are counted as query heads."""
    bands = [band for group in groups for band in group.bands]
    if len(bands) == len(groups) == 1 and bands[0].query.places == queries:
        # What flows into queries is summed in float32, and every row has a sum of output times gradient.
        return 0, heads * queries * 4 * (1 + width)
    rows = max((band.query.places * band.shape[1] for band in bands), default=0)
    columns = max((band.key.places * band.shape[1] for band in bands), default=0)
    whole = heads * width * 4
    return whole * (queries + 2 * rows), whole * (queries + 2 * keys + rows + 2 * columns)


def attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the bands of each group of heads, differentiable."""
    return _Attend.apply(query, key, value, sinks, work)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        output, lse = forward(query, key, value, sinks, work)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, sinks, output, lse)
        ctx.work = work
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*backward(*grads, *ctx.saved_tensors, ctx.work), None)


def forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, work: Work
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp."""
    output, lse = _contained(*_taken(query, key, value), work)
    output = output[..., : value.shape[-1]]
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    return output.to(query.dtype), lse


def backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    work: Work,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients for query, key, value and sinks; None flows in where nothing does."""
    silent = lse.isneginf()
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output.to(query.dtype)
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(silent, 0.0)
    grad_sinks = None
    if sinks is not None:
        into = torch.zeros_like(lse) if grad_lse is None else grad_lse
        grad_sinks = sinks_gradient(grad_output, into, output, lse, sinks)
    # Of a row that read nothing no call takes anything, so any finite number serves it.
    lse = lse.masked_fill(silent, 0.0)
    sides = (query, key, value, grad_output, output)
    if grad_lse is not None:
        sides = with_lse_gradient(sides, grad_lse, LANES)
    grads = _contained_gradients(*_taken(*sides), lse, work)
    widths = (query.shape[-1], key.shape[-1], value.shape[-1])
    made = [grad[..., :width].to(query.dtype) for grad, width in zip(grads, widths, strict=True)]
    return made[0], made[1], made[2], grad_sinks


def _taken(*sides: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one width that the kernel takes, whose rows lie in one piece."""
    sides = alike(*sides)
    width = -(-sides[0].shape[-1] // LANES) * LANES
    return sides if sides[0].shape[-1] == width else tuple(widened(side, width) for side in sides)


# What is not finite.


def _contained(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, NaN in the rows that read or are what is not finite, and only there."""
    if not capturing(query):
        output, lse = _merged(query, key, value, work)
        if output.sum(dtype=lse.dtype).isfinite():
            return output, lse
    rows, keys = spoiled(query), spoiled(key) | spoiled(value)
    output, lse = _merged(cleared(query, rows), cleared(key, keys), cleared(value, keys), work)
    struck = (rows | _readers(keys, rows, work)) & ~lse.isneginf()
    return output.masked_fill(struck.unsqueeze(-1), torch.nan), lse.masked_fill(struck, torch.nan)


def _contained_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, output: Tensor, lse: Tensor, work: Work
) -> list[Tensor]:
    """Return the gradients, NaN for the rows that are not finite and for the keys that they read, and only there."""
    sides = (query, key, value, grad_output, output)
    if not capturing(query):
        grads = _accumulated(*sides, lse, work)
        if sum(grad.sum(dtype=lse.dtype) for grad in grads).isfinite():
            return grads
    keys = spoiled(key) | spoiled(value)
    rows = spoiled(query) | spoiled(grad_output) | spoiled(output) | ~lse.isfinite()
    rows = rows | _readers(keys, rows, work)
    taken_out = (rows, keys, keys, rows, rows)
    finite = (cleared(side, where) for side, where in zip(sides, taken_out, strict=True))
    grads = _accumulated(*finite, lse.masked_fill(rows, 0.0), work)
    struck = _read(rows, keys, work)
    rows = rows & _readers(torch.ones_like(keys), rows, work)
    return [
        grad.masked_fill(where.unsqueeze(-1), torch.nan)
        for grad, where in zip(grads, (rows, struck, struck), strict=True)
    ]


def _readers(keys: Tensor, rows: Tensor, work: Work) -> Tensor:
    """Return which queries read a key that is marked."""
    found = torch.zeros_like(rows)
    for band, view in _views(rows, keys, work):
        first, last = _stretches(band, band.query.places, band.low, band.high, band.key.places, keys.device)
        some = _some(view.keys(keys), first, last)
        some = some.repeat_interleave(len(view.heads) // len(view.key_heads), dim=2)
        view.add_queries(found, some, torch.Tensor.logical_or_)
    return found


def _read(rows: Tensor, keys: Tensor, work: Work) -> Tensor:
    """Return which keys are read by a query that is marked."""
    found = torch.zeros_like(keys)
    for band, view in _views(rows, keys, work):
        # A column is read by a stretch of rows: the same band turned.
        low, high = (None if line is None else -line for line in (band.high, band.low))
        first, last = _stretches(band, band.key.places, low, high, band.query.places, keys.device)
        some = _some(view.queries(rows), first, last)
        some = some.unflatten(2, (len(view.key_heads), -1)).any(3)
        view.add_keys(found, some, torch.Tensor.logical_or_)
    return found


def _stretches(
    band: Band, rows: int, low: int | None, high: int | None, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return where the stretch of each row begins, and where it has ended."""
    row = torch.arange(rows, device=device)
    first = torch.zeros_like(row) if low is None else (row + low).clamp(0, columns)
    end = torch.full_like(row, columns) if high is None else (row + high + 1).clamp(0, columns)
    return first, torch.maximum(first, end)


def _some(marks: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Say for stretches of the second axis whether they hold a mark."""
    count = torch.nn.functional.pad(marks.cumsum(1), (0, 0, 1, 0))
    return count.index_select(1, end) > count.index_select(1, first)


# The calls.


def _merged(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over all bands."""
    exact = torch.promote_types(query.dtype, torch.float32)
    output = lse = None
    for band, view in _views(query, key, work):
        part, part_lse = _forward(view.queries(query), view.keys(key), view.keys(value), band, work.scale)
        part_lse = part_lse.transpose(1, 2)
        if view.again:
            stretches = zip(part.to(exact).unbind(0), part_lse.unbind(0), strict=True)
            part, part_lse = (side.unsqueeze(0) for side in merge(list(stretches)))
        if len(work.pieces) == 1 and view.all_queries(query):
            return part.transpose(1, 2), part_lse.transpose(1, 2)
        if output is None:
            output = query.new_zeros(query.shape, dtype=query.dtype if work.fresh else exact)
            lse = query.new_full(query.shape[:-1], -torch.inf, dtype=exact)
        into = view.once.queries(output), view.once.queries(lse)
        if band.fresh:
            for whole, side in zip(into, (part, part_lse), strict=True):
                whole.copy_(side)
        else:
            merge_into(*into, part, part_lse)
    if output is None:
        return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=exact)
    return output, lse


def _accumulated(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, output: Tensor, lse: Tensor, work: Work
) -> list[Tensor]:
    """Return the gradients of query, key and value, summed over what every band contributes."""
    grads: list[Tensor] = []
    for band, view in _views(query, key, work):
        made = _backward(
            *(view.queries(side) for side in (grad_output, query)),
            *(view.keys(side) for side in (key, value)),
            *(view.queries(side) for side in (output, lse)),
            band,
            work.scale,
        )
        if len(work.pieces) == 1 and view.all_queries(query) and view.all_keys(key):
            return [grad.transpose(1, 2) for grad in made]
        grads = grads or [
            torch.zeros(side.shape, dtype=lse.dtype, device=side.device) for side in (query, key, value)
        ]
        view.add_queries(grads[0], made[0], torch.Tensor.add_)
        for whole, part in zip(grads[1:], made[1:], strict=True):
            view.add_keys(whole, part, torch.Tensor.add_)
    return grads or [torch.zeros_like(side) for side in (query, key, value)]


def _views(query: Tensor, key: Tensor, work: Work) -> Iterator[tuple[Band, View]]:
    """Yield what each call reads."""
    if not query.numel():
        return
    for heads, band in work.pieces:
        for some, key_heads in served(heads, query.shape[1] // key.shape[1]):
            for view in views(band, query.shape[0], some, key_heads):
                yield band, view


def _forward(query: Tensor, key: Tensor, value: Tensor, band: Band, scale: float) -> tuple[Tensor, Tensor]:
    """Return output `[rectangles, rows, heads, width]` and log-sum-exp `[rectangles, heads, rows]` of one call."""
    left, right = band.window
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(_aligned(side) for side in (query, key, value)),
        None,
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        band.causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return output, lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    band: Band,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of one call, each laid out as its side is."""
    left, right = band.window
    # Nothing is dropped at random, so there is no state of a generator.
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        *(_aligned(side) for side in (query, key, value)),
        output.contiguous(),
        lse.transpose(1, 2).contiguous(),
        None,
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        band.causal,
        unused,
        unused,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )


def _aligned(side: Tensor) -> Tensor:
    """Return a view that starts, and whose rows start, where the kernel can load 16 bytes; else a copy."""
    size = side.element_size()
    steps = (
        stride * size
        for length, stride in zip(side.shape[:-1], side.stride()[:-1], strict=True)
        if length > 1
    )
    return side if not side.data_ptr() % 16 and not any(step % 16 for step in steps) else side.contiguous()
