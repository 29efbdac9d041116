"""The flex kernel: PyTorch's FlexAttention over blocks that are derived from the pattern.

FlexAttention makes a kernel out of a mask function and a score function, and skips the blocks that its lists leave
out. The lists come from `derive.blocks`, never from a search of all pairs, and the mask function is the formula of the
pattern with its sizes handed in as tensors, so that neither sizes nor lengths are compiled anew.

On cuda it is compiled. On cpu FlexAttention has no backward, and runs its definition, which makes all scores.
"""

from __future__ import annotations

import types
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from longspan.derive.terms import terms
from longspan.kernel.flex.family import Call, Family, groups, rounded
from longspan.kernel.flex.formula import Unknown, answer, formula
from longspan.kernel.softmax.finite import contained
from longspan.kernel.softmax.merge import merge
from longspan.pattern import Pattern
from longspan.score import Scores

# Widths below this are padded: tensor cores multiply nothing smaller.
NARROWEST = 16
# Devices on which FlexAttention runs its definition.
DEFINED = ("cpu",)
CUDA_DTYPES = ("float32", "bfloat16", "float16")
# Compiled kernels find the rows of a head by numbers of 32 bits.
FARTHEST = 2**31 - 1


def refusal(tensors: Sequence[Tensor], pattern: Pattern, changes: Scores, *, asked: bool) -> str | None:
    """Say why this kernel cannot take these tensors, this pattern and these changes, or None where it can.

    On cpu it runs for those who ask for it by name.
    """
    query = tensors[0]
    if query.device.type == "cpu":
        taken = (*tensors, *([] if changes.sinks is None else [changes.sinks]))
        if not asked:
            return "is taken on cpu only where it is asked for"
        if torch.is_grad_enabled() and any(side.requires_grad for side in taken):
            return "has no backward on cpu: FlexAttention gives gradients on cuda only"
    elif query.device.type != "cuda":
        return f"runs on cuda, and forward on cpu, got {query.device}"
    else:
        why = dtype_refusal(str(query.dtype).removeprefix("torch.")) or _span_refusal(*tensors)
        if why:
            return why
    return _unknown(pattern, query.shape[1])


def dtype_refusal(dtype: str) -> str | None:
    """Say why this kernel cannot take a dtype on cuda, or None where it can."""
    return None if dtype in CUDA_DTYPES else f"takes {' or '.join(CUDA_DTYPES)} on cuda, got {dtype}"


def _span_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Say why this kernel cannot take tensors that lie so on cuda, or None where it can.

    The output and its gradient lie as the query does.
    """
    output = query.stride(2) * value.shape[3] // max(1, query.shape[3])
    spans = {
        "queries": query.shape[2] * max(query.stride(2), output),
        "keys": key.shape[2] * key.stride(2),
        "values": value.shape[2] * value.stride(2),
    }
    name = max(spans, key=spans.__getitem__)
    if spans[name] <= FARTHEST:
        return None
    return (
        f"takes heads whose {name} lie within {FARTHEST:,} numbers, got {spans[name]:,}; .contiguous() lays those of "
        "a head side by side, and the kernels flash and triton have no such limit"
    )


@torch.compiler.disable
@lru_cache(maxsize=256)
def _unknown(pattern: Pattern, heads: int) -> str | None:
    """Say what no kernel can be made of, or None."""
    for single in {pattern.at_head(head, heads) for head in range(heads)}:
        for term in terms(single):
            try:
                formula(term, torch.device("cpu"))
            except Unknown as what:
                return f"makes no kernel of `{what}` in the formula of {term}"
    return None


@torch.compiler.disable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    queries: range,
    scale: float,
    changes: Scores,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp; gradients flow through both."""
    keys = range(key.shape[2])
    act = partial(
        _attend,
        pattern=pattern,
        queries=queries,
        keys=keys,
        scale=scale,
        limit=changes.limit,
        slopes=changes.slopes,
    )
    output, lse = contained(query, key, value, act)
    if changes.sinks is None:
        return output, lse
    # A sink is a part of its own: a key that all queries read, of value 0.
    logits = changes.sinks.to(lse.dtype)[:, None].expand(lse.shape)
    return _merged([(output, lse), (torch.zeros_like(output), logits)])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern,
    queries: range,
    keys: range,
    scale: float,
    limit: float | None,
    slopes: tuple[float, ...] | None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over all groups of heads.

    With a `gate`, slopes count as 0, and nothing is read where it is false.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    made, order = [], []
    for group in groups(pattern, query.shape[1], queries, keys, query.device):
        sides = _of_heads(query, key, value, group.heads)
        own = (
            None
            if slopes is None
            else _held(tuple(slopes[head] for head in group.heads), exact, query.device)
        )
        made.append(
            _merged(
                [_part(call, sides, scale, limit, own, gate) for call in group.calls] or [_nothing(sides)]
            )
        )
        order.extend(group.heads)
    if len(made) == 1:
        return made[0]
    place = _places(sorted(range(len(order)), key=order.__getitem__), query.device)
    return tuple(torch.cat(side, dim=1).index_select(1, place) for side in zip(*made, strict=True))


@lru_cache(maxsize=256)
def _held(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers on a device, to which they are sent once: sending waits, and cannot be captured."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def _places(numbers: Sequence[int], device: torch.device) -> Tensor:
    return _held(tuple(numbers), torch.int64, device)


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge parts in the precision of their log-sum-exps."""
    if len(parts) == 1:
        return parts[0]
    output, lse = merge([(output.to(lse.dtype), lse) for output, lse in parts])
    return output.to(parts[0][0].dtype), lse


def _nothing(sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what queries get that read nothing, as a function of the tensors all the same."""
    query, _, value = sides
    exact = torch.promote_types(query.dtype, torch.float32)
    zero = sum(side[..., :0].sum() for side in sides)
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=exact)
    return query.new_zeros(*query.shape[:-1], value.shape[-1]) + zero, lse + zero


def _of_heads(
    query: Tensor, key: Tensor, value: Tensor, heads: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return some query heads, and the key heads that serve them, in equal shares."""
    share = query.shape[1] // key.shape[1]
    if heads == tuple(range(query.shape[1])):
        return query, key, value
    serving = [head // share for head in heads]
    once = sorted(set(serving))
    shared = [head for head in once for _ in range(len(heads) // len(once))]
    taken = once if shared == serving else serving
    own, shared = _places(heads, query.device), _places(taken, query.device)
    return query.index_select(1, own), key.index_select(1, shared), value.index_select(1, shared)


def _part(
    call: Call,
    sides: Sequence[Tensor],
    scale: float,
    limit: float | None,
    slopes: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of one call for all queries."""
    query, key, value = sides
    if not query.numel():
        return _nothing(sides)
    rows, plain = query[:, :, call.lead : call.lead + call.rows], call.steps == (1, 1)
    taken = (
        [rows, key, value]
        if plain
        else [
            _gathered(side, step, classes, places)
            for side, step, classes, places in zip(
                (rows, key, value),
                (call.steps[0], *[call.steps[1]] * 2),
                (call.classes[0], *[call.classes[1]] * 2),
                (call.places[0], *[call.places[1]] * 2),
                strict=True,
            )
        ]
    )
    output, lse = _flex(call, taken, scale, limit, slopes, gate)
    if not plain:
        output = _scattered(output, call, query.shape[0], 0.0)
        lse = _scattered(lse.unsqueeze(-1), call, query.shape[0], -torch.inf).squeeze(-1)
    if call.rows < query.shape[2]:
        around = (call.lead, query.shape[2] - call.lead - call.rows)
        output, lse = F.pad(output, (0, 0, *around)), F.pad(lse, around, value=-torch.inf)
    return output, lse


def _gathered(side: Tensor, step: int, classes: Tensor, places: int) -> Tensor:
    """Return the residue classes of a side as rows of the batch, `[batch * layouts, heads, places, width]`."""
    whole = F.pad(side, (0, 0, 0, places * step - side.shape[2]))
    apart = whole.unflatten(2, (places, step)).index_select(3, classes)
    return apart.permute(0, 3, 1, 2, 4).flatten(0, 1)


def _scattered(side: Tensor, call: Call, batch: int, nothing: float) -> Tensor:
    """Put what the classes gave back where their queries stand; others get `nothing`."""
    found = side.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4)
    whole = found.new_full((*found.shape[:3], call.steps[0], found.shape[4]), nothing)
    return whole.index_copy(3, call.classes[0], found).flatten(2, 3)[:, :, : call.rows]


def _flex(
    call: Call,
    sides: Sequence[Tensor],
    scale: float,
    limit: float | None,
    slopes: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run one call on tensors that are laid out for it."""
    query, key, value = sides
    times = query.shape[0] // len(call.classes[0])
    origins, listed = (), call.lists.tensors
    if call.family.classes:
        origins = tuple(rounded(side.repeat(times)) for side in call.origins)
        listed = tuple(part.repeat(times, *[1] * (part.dim() - 1)) for part in listed)
    if gate is not None:
        # Numbers of blocks stand before the blocks themselves.
        listed = tuple(part * gate.to(part.dtype) if at % 2 == 0 else part for at, part in enumerate(listed))
        # What is compiled takes slopes still, and far pairs would weigh nothing by them.
        slopes = None if slopes is None else torch.zeros_like(slopes)
    family = replace(call.family, limit=limit, sloped=slopes is not None)
    given = (query, key, value, listed, call.numbers, origins, call.tables, slopes)
    if query.device.type in DEFINED:
        with _uncompiled():
            return _kernel(family, scale)(*given)
    query, key, value = (_wide(side) for side in sides)
    facts = (
        query.dtype,
        *((side.shape[1], side.shape[3], side.requires_grad) for side in (query, key, value)),
        # Sizes of 1 are compiled for themselves.
        *(size == 1 for part in (query, key, listed[0], listed[4]) for size in part.shape),
        torch.is_grad_enabled(),
    )
    for side in (query, key, value):
        torch._dynamo.maybe_mark_dynamic(side, (0, 2))
    for part in listed:
        torch._dynamo.maybe_mark_dynamic(part, (0, *range(2, part.dim())))
    output, lse = _compiled(family, scale, facts)(query, key, value, *given[3:])
    return output[..., : sides[2].shape[-1]], lse


def _wide(side: Tensor) -> Tensor:
    """Return a side as wide as compiled kernels want it at least, with columns of 0."""
    short = NARROWEST - side.shape[-1]
    return F.pad(side, (0, short)) if short > 0 else side


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Let FlexAttention run its definition, which makes all scores; PyTorch's own switch for it."""
    before = flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


@cache
def _compiled(family: Family, scale: float, facts: tuple[Any, ...]) -> Any:
    """Return the kernel of a family, compiled for all lengths; `facts` are what each compilation has of its own."""
    run = _kernel(family, scale)
    # What was compiled, and which sizes change, is remembered by code and by its name: so each has its own.
    name = f"flex_{zlib.crc32(repr((family, scale, facts)).encode()):08x}"
    code = run.__code__.replace(co_name=name)
    own = types.FunctionType(code, run.__globals__, name, None, run.__closure__)
    return torch.compile(own, fullgraph=True)


def _kernel(family: Family, scale: float) -> Any:
    """Return the function that calls FlexAttention for a family."""
    each = family.constants

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        listed: tuple[Tensor, ...],
        numbers: Tensor,
        origins: tuple[Tensor, Tensor],
        tables: tuple[Tensor, ...],
        slopes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        def positions(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            last = h * each + each
            first = (
                (side[b] for side in origins) if family.classes else (numbers[last - 2], numbers[last - 1])
            )
            apart = numbers[last - 5], numbers[last - 4]
            return tuple(at + place * step for at, place, step in zip(first, (q, k), apart, strict=True))

        def read(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q, k = positions(b, h, q, k)
            found = answer(family.operations, q, k, lambda place: numbers[h * each + place], tables)
            return found & (k <= numbers[h * each + each - 3]) if family.classes else found

        def score(plain: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if family.limit is not None:
                plain = family.limit * torch.tanh(plain / family.limit)
            if family.sloped:
                q, k = positions(b, h, q, k)
                plain = plain - slopes[h] * torch.abs(q - k).to(plain.dtype)
            return plain

        mask = flex.BlockMask(
            (query.shape[2], key.shape[2]), *listed, BLOCK_SIZE=(family.size,) * 2, mask_mod=read
        )
        output, more = flex.flex_attention(
            query,
            key,
            value,
            score_mod=score if family.sloped or family.limit is not None else None,
            block_mask=mask,
            scale=scale,
            enable_gqa=True,
            return_aux=flex.AuxRequest(lse=True),
            kernel_options={"BACKEND": "TRITON"} if query.is_cuda else None,
        )
        return output, more.lse

    return run
