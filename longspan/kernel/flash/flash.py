"""The flash kernel: a flash attention for CUDA, called on strided views of the bands of a pattern.

Forward, each call gives an output and a log-sum-exp; where calls share queries, their outputs are weighed and added when
all are there. Backward, each call is handed the merged output and log-sum-exp, which makes its gradients exact shares of
the whole. A pattern that is one band is one call on the tensors as they lie, and nothing beside its result is made.

Which flash attention is called is chosen for each band (`provider.py`). Where it is PyTorch's own, what is activated by
`torch.nn.attention.activate_flash_attention_impl` runs here too.

A row that is not finite is kept out of the tiles that it shares with others, as in the sdpa kernel. Which rows read it
is a difference of two running counts, since a row of a band reads one stretch. The first look at the result waits for
the device; while a CUDA graph is captured nothing can wait, and rows are looked through and cleared in any case. Where
no call has pairs that are not read, as for a token that is decoded, what is not finite spreads to its readers alone, and
nothing waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.kernel.flash import provider
from longspan.kernel.flash.band import Band
from longspan.kernel.flash.bands import BandGroup
from longspan.kernel.flash.libraries import Asked
from longspan.kernel.flash.order import Order, Step, order
from longspan.kernel.flash.views import View, views
from longspan.kernel.softmax.finite import capturing, cleared, spoiled
from longspan.kernel.softmax.merge import merge
from longspan.kernel.softmax.rows import alike, sinks_gradient, widened, with_lse_gradient, with_sinks
from longspan.score import Scores

DTYPES = ("bfloat16", "float16")
# What the numbers in a head are made a multiple of.
LANES = 8


@dataclass(frozen=True, eq=False)
class Work:
    """What is asked of the kernel beside tensors.

    Attributes:
        groups: who reads what.
        scale: what scores are multiplied by, above 0.
    """

    groups: tuple[BandGroup, ...]
    scale: float

    def order(self, query: Tensor, key: Tensor) -> Order:
        """Return what is called for tensors, and in which order."""
        return order(self.groups, *query.shape[1:3], *key.shape[1:3])


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
    return provider.refusal(taken_width(width), provider.capability(query.device))


def kind_refusal(device: str, dtype: str, width: int) -> str | None:
    """Say why this kernel cannot take a kind of device, a dtype or a width of heads, or None where it can."""
    if device != "cuda":
        return f"runs on cuda, got {device}"
    if dtype not in DTYPES:
        return f"takes {' or '.join(DTYPES)}, got {dtype}"
    return None if width <= provider.WIDEST else provider.refusal(width, None)


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
    # A result of one row has two bytes a number, and its log-sum-exp four.
    whole, result = heads * width * 4, 2 * width + 4
    backward = whole * (2 * keys + rows + 2 * columns)
    if order(groups, heads, queries, heads, keys).layers <= 1:
        return heads * rows * result, backward
    # Results wait for one another, and are then summed in float32.
    waiting = sum(
        len(group.heads) * band.query.places * band.rectangles for group in groups for band in group.bands
    )
    return whole * queries + waiting * result, backward + whole * queries


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
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output.to(query.dtype)
    grad_sinks, into = None, grad_lse
    silent = None if work.order(query, key).every_row else lse.isneginf()
    if grad_lse is not None and silent is not None:
        into = grad_lse.masked_fill(silent, 0.0)
    if sinks is not None:
        flows = torch.zeros_like(lse) if into is None else into
        grad_sinks = sinks_gradient(grad_output, flows, output, lse, sinks)
    if silent is not None:
        # Of a row that read nothing no call takes anything, so any finite number serves it.
        lse = lse.masked_fill(silent, 0.0)
    sides = (query, key, value, grad_output, output)
    if into is None:
        grads = _contained_gradients(*_taken(*sides), lse, work)
    elif not provider.refusal(
        taken_width(max(side.shape[-1] for side in sides) + 1), provider.capability(query.device)
    ):
        grads = _contained_gradients(*_taken(*with_lse_gradient(sides, into, LANES)), lse, work)
    else:
        grads = _full_gradients(sides, into, lse, work)
    widths = (query.shape[-1], key.shape[-1], value.shape[-1])
    made = [grad[..., :width].to(query.dtype) for grad, width in zip(grads, widths, strict=True)]
    return made[0], made[1], made[2], grad_sinks


def _full_gradients(sides: tuple[Tensor, ...], grad_lse: Tensor, lse: Tensor, work: Work) -> list[Tensor]:
    """Return the gradients where no column is free for that of the log-sum-exp: its share is a pass of its own."""
    query, key, value, grad_output, output = sides
    grads = _contained_gradients(*_taken(*sides), lse, work)
    one, less = torch.zeros_like(grad_output), torch.zeros_like(output)
    one[..., 0], less[..., 0] = 1, -grad_lse
    into_query, into_key, into_value = _contained_gradients(
        *_taken(query, key, torch.zeros_like(value), one, less), lse, work
    )
    # Into values nothing flows from it, so their last column is 0, or no number where the log-sum-exp had none.
    return [grads[0] + into_query, grads[1] + into_key, grads[2] + into_value[..., -1:]]


def _taken(*sides: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one width that the kernel takes, whose rows lie in one piece."""
    sides = alike(*sides)
    width = taken_width(sides[0].shape[-1])
    return sides if sides[0].shape[-1] == width else tuple(widened(side, width) for side in sides)


def taken_width(width: int) -> int:
    """Return what the numbers in a head are made up to."""
    return -(-width // LANES) * LANES


# What is not finite.


def _contained(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, NaN in the rows that read or are what is not finite, and only there."""
    done = work.order(query, key)
    if not done.masked:
        output, lse = _merged(query, key, value, work)
        lost = spoiled(output) | ~lse.isfinite() if done.every_row else spoiled(output)
        return output.masked_fill_(lost.unsqueeze(-1), torch.nan), lse.masked_fill_(lost, torch.nan)
    if not capturing(query):
        output, lse = _merged(query, key, value, work)
        if math.isfinite(output.sum(dtype=lse.dtype).item()):
            return output, lse
    rows, keys = spoiled(query), spoiled(key) | spoiled(value)
    output, lse = _merged(cleared(query, rows), cleared(key, keys), cleared(value, keys), work)
    struck = (rows | _readers(keys, rows, work)) & ~lse.isneginf()
    return output.masked_fill(struck.unsqueeze(-1), torch.nan), lse.masked_fill(struck, torch.nan)


def _contained_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, output: Tensor, lse: Tensor, work: Work
) -> list[Tensor]:
    """Return the gradients, NaN for the rows that are not finite and for the keys that they read, and only there."""
    if not work.order(query, key).masked:
        lost = (spoiled(grad_output) | spoiled(output)).unsqueeze(-1)
        return _accumulated(query, key, value, grad_output.masked_fill(lost, torch.nan), output, lse, work)
    sides = (query, key, value, grad_output, output)
    if not capturing(query):
        grads = _accumulated(*sides, lse, work)
        sums = [grad.sum(dtype=lse.dtype) for grad in grads]
        if math.isfinite((sums[0] + sums[1] + sums[2]).item()):
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
    for step, view in _views(rows, keys, work):
        band = step.band
        first, last = _stretches(band, band.query.places, band.low, band.high, band.key.places, keys.device)
        some = _some(view.keys(keys), first, last)
        some = some.repeat_interleave(len(view.heads) // len(view.key_heads), dim=2)
        view.add_queries(found, some, torch.Tensor.logical_or_)
    return found


def _read(rows: Tensor, keys: Tensor, work: Work) -> Tensor:
    """Return which keys are read by a query that is marked."""
    found = torch.zeros_like(keys)
    for step, view in _views(rows, keys, work):
        band = step.band
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
    done = work.order(query, key)
    exact = torch.promote_types(query.dtype, torch.float32)
    output = lses = None
    parts = []
    for step, view in _views(query, key, work):
        part, part_lse = _forward(query, key, value, step, view, work.scale)
        if len(done.steps) == 1 and view.all_queries(query):
            return part.transpose(1, 2), part_lse.transpose(1, 2)
        if lses is None:
            # Each layer has a log-sum-exp of its own.
            lses = query.new_full((done.layers, *query.shape[:-1]), -torch.inf, dtype=exact)
        view.once.queries(lses[step.layer]).copy_(part_lse)
        if done.layers > 1:
            parts.append((step.layer, view.once, part))
            continue
        if output is None:
            output = _room(query, query.dtype, written=done.rows_written)
        view.once.queries(output).copy_(part)
    if lses is None:
        return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=exact)
    if output is not None:
        return output, lses[0]
    output, lse = _room(query, exact, written=done.rows_written), torch.logsumexp(lses, dim=0)
    # A query that a layer does not touch has no part there, so it matters not that its share may be no number.
    shares = lses.sub_(lse).exp_().unsqueeze(-1)
    for layer, view, part in parts:
        whole, share = view.queries(output), view.queries(shares[layer])
        if layer == 0:
            torch.mul(part, share, out=whole)
        else:
            whole.addcmul_(part, share)
    return output, lse


def _accumulated(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, output: Tensor, lse: Tensor, work: Work
) -> list[Tensor]:
    """Return the gradients of query, key and value, summed over what every band contributes."""
    done = work.order(query, key)
    capability = provider.capability(query.device)
    grads: list[Tensor] = []
    for step, view in _views(query, key, work):
        asked = _asked(query, key, value, step, view, work.scale)
        library = provider.chosen(step.band, query.shape[-1], capability)
        given = (view.queries(grad_output), view.queries(output), view.queries(lse).transpose(1, 2))
        into_query, *into = library.backward(asked, *given)
        if len(done.steps) == 1 and view.all_queries(query) and view.all_keys(key):
            return [grad.transpose(1, 2) for grad in (into_query, *into)]
        if not grads:
            # What is written once is written as it is to be; what is added to is summed in more digits.
            kinds = [query.dtype if done.layers <= 1 else lse.dtype]
            kinds += 2 * [query.dtype if done.keys_once else lse.dtype]
            written = (done.rows_written, done.keys_written, done.keys_written)
            grads = [
                _room(side, kind, written=all_of_it)
                for side, kind, all_of_it in zip((query, key, value), kinds, written, strict=True)
            ]
        if view.again:
            into_query = into_query.sum(dim=0, keepdim=True, dtype=grads[0].dtype)
        copy, add = torch.Tensor.copy_, torch.Tensor.add_
        view.once.add_queries(grads[0], into_query, add if step.layer else copy)
        for whole, part in zip(grads[1:], into, strict=True):
            view.add_keys(whole, part, copy if step.first else add)
    return grads or [torch.zeros_like(side) for side in (query, key, value)]


def _room(side: Tensor, dtype: torch.dtype, *, written: bool) -> Tensor:
    """Return room for a result, cleared where not all of it is to be written; heads lie beside one another."""
    room = torch.empty if written else torch.zeros
    turned = side.transpose(1, 2)
    return room(turned.shape, dtype=dtype, device=side.device).transpose(1, 2)


def _views(query: Tensor, key: Tensor, work: Work) -> Iterator[tuple[Step, View]]:
    """Yield what each call reads."""
    if not query.numel():
        return
    for step in work.order(query, key).steps:
        for view in views(step.band, query.shape[0], step.heads, step.key_heads):
            yield step, view


def _forward(
    query: Tensor, key: Tensor, value: Tensor, step: Step, view: View, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output `[rectangles, rows, heads, width]` and log-sum-exp `[rectangles, rows, heads]` of one call; of
    rectangles with the same queries, one for all."""
    library = provider.chosen(step.band, query.shape[-1], provider.capability(query.device))
    output, lse = library.forward(_asked(query, key, value, step, view, scale))
    lse = lse.transpose(1, 2)
    if view.again:
        parts = zip(output.to(lse.dtype).unbind(0), lse.unbind(0), strict=True)
        output, lse = (side.unsqueeze(0) for side in merge(list(parts)))
    return output, lse


def _asked(query: Tensor, key: Tensor, value: Tensor, step: Step, view: View, scale: float) -> Asked:
    return Asked(view.queries(query), view.keys(key), view.keys(value), step.band, scale)
