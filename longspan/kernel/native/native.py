"""The native kernel: attention over the parts of a pattern in one pass, by a small library of our own for CPU.

Blocks of queries go through all their keys with the softmax kept online, 16 queries at a time, and of what a mask leaves
out nothing is computed but what one of 16 queries reads. The library is C++ (the
folder `cpp`) behind three pointers and a table of numbers, so it depends on no version of Python or PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import Structure, c_float, c_int64, c_void_p
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longspan.kernel.lattice.calls import HeadGroup
from longspan.kernel.lattice.parts import Lattice, Part
from longspan.kernel.native import compiler
from longspan.kernel.softmax.frame import Frame, Work
from longspan.score import Scores

# Queries in a block; in a strip, which is what is skipped or computed as one; unread keys that a strip skips at least.
ROWS, STRIP, GAP = 64, 16, 16
# Blocks that go through the same keys together, forward.
TEAM = 2
# Keys in a chunk, forward and backward, and in what lies ready for all strips of a block.
DEPTH, CHUNK, PIECE = 144, 96, 288
NOT_BUILT = (
    "was not built from this version's source; where there is a C++ compiler, "
    "`python -m longspan.kernel.native.compiler` builds it"
)
# Tensors that the library takes as they lie.
SIDES = ("query", "key", "value", "grad_output", "result")
# In bfloat16, bytes for all threads together: for gradients of keys, and for what rounding leaves out of rows that are
# added to later.
HOLDING, LEFT = 3 * 2**25, 2**26
# Memory above this is mapped for itself by any allocator, and given back when it is free.
MAPPED = 32 * 2**20
# Fewer queries than this leave most of a strip empty.
FEWEST = STRIP


def able(name: str) -> bool:
    """Say whether this processor has an instruction set."""
    has = torch.cpu.get_capabilities()
    wanted = {"avx512": [f"avx512_{part}" for part in ("f", "bw", "dq", "vl")], "avx2": ["avx2", "fma3"]}
    return all(has.get(part, False) for part in wanted.get(name, []))


def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """Return the best library for this processor, or why there is none."""
    for name in compiler.SETS:
        if compiler.library(name).exists() and able(name):
            with suppress(OSError):
                return ctypes.CDLL(str(compiler.library(name))), ""
    return None, NOT_BUILT


_library, MISSING = _loaded()


def refusal(query: Tensor, changes: Scores, *, asked: bool) -> str | None:
    """Say why this kernel cannot take these tensors and changes of scores, or None where it can.

    Very few queries it takes for those who ask for it by name.
    """
    why = None
    if changes.limit is not None:
        why = "cannot cap scores softly"
    elif changes.slopes is not None:
        why = "knows no distances, which ALiBi needs"
    dtype = str(query.dtype).removeprefix("torch.")
    return plan_refusal(dtype, str(query.device), query.shape[2], asked=asked, else_why=why)


def plan_refusal(
    dtype: str, device: str, queries: int, *, asked: bool, else_why: str | None = None
) -> str | None:
    """Say why this kernel cannot run on a device, in a dtype, on so many queries, or None where it can.

    What `else_why` says comes before what only this machine or this length would have to say.
    """
    if device != "cpu":
        return f"runs on cpu, got {device}"
    if dtype not in ("float32", "bfloat16"):
        return f"takes float32 or bfloat16, got {dtype}"
    if else_why:
        return else_why
    if queries < FEWEST and not asked:
        return f"is taken from {FEWEST} queries on, got {queries}"
    return MISSING or None


def area(part: Part) -> int:
    """Return the pairs of a part that this kernel computes forward, those it masks away included."""
    rows, columns = part.query.places, part.key.places
    if part.causal:
        last = np.minimum(np.arange(STRIP, rows + STRIP, STRIP), rows)
        return int((np.diff(last, prepend=0) * np.minimum(last, columns)).sum()) * part.rectangles
    if part.allowed is None:
        return part.area
    read = np.logical_or.reduceat(part.allowed, range(0, rows, STRIP), axis=0)
    heights = np.diff(range(0, rows, STRIP), append=rows)
    computed = 0
    for strip, height in zip(read, heights, strict=True):
        keys = np.flatnonzero(strip)
        gaps = np.diff(keys) - 1
        computed += int(height) * (len(keys) + int(gaps[gaps < GAP].sum()))
    return computed * part.rectangles


def workspace(heads: int, queries: int, keys: int, width: int, dtype: str) -> tuple[int, int]:
    """Return the bytes that are taken at most beside inputs, outputs and gradients, forward and backward, on one thread.

    Law: what grows with the length is a number for each query. In bfloat16 gradients of keys are summed up in float32 for
    as many keys at once as there is room for; and where a row is added to more than once, what rounding leaves out of it
    in between takes a byte for each of its numbers, on one head, as long as there is room.
    Each further thread takes some hundred kilobytes more, and in float32 its own gradients of keys where there are
    fewer heads than threads.
    """
    wide = _whole(width)
    forward = 4 * (2 * TEAM * ROWS * (wide + 1) + STRIP * (2 * wide + DEPTH) + 2 * PIECE * wide)
    backward = 4 * ROWS * (5 * wide + 2 * CHUNK + 3)
    rows = 4 * heads * queries
    if dtype == "bfloat16":
        left = min(queries * wide, LEFT)
        return forward + rows + left, backward + rows + left + min(8 * wide * keys, HOLDING)
    filled = 2 * 4 * heads * keys * (wide - width)
    return forward + rows, backward + rows + filled


class _Side(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class _Work(Structure):
    """What the library is asked; the order is that of `Work` in cpp/work.hpp."""

    _fields_ = [
        *((name, _Side) for name in SIDES),
        *((name, c_void_p) for name in ("output", "lse", "grad_lse", "sinks")),
        *((name, c_void_p) for name in ("grad_query", "grad_key", "grad_value", "heads", "parts")),
        *((name, c_int64) for name in ("batch", "heads_read", "heads_all", "share", "queries", "keys")),
        *((name, c_int64) for name in ("width", "value_width", "parts_number", "brief", "threads", "splits")),
        *((name, c_int64) for name in ("holding", "left")),
        ("odd", c_int64),
        ("scale", c_float),
    ]


def _bits(part: Part) -> np.ndarray | None:
    """Return the mask of a part as words, one bit a query, `[keys, words of 64 queries]`."""
    if part.allowed is None:
        return None
    rows, columns = part.allowed.shape
    wide = np.zeros((columns, -(-rows // ROWS) * ROWS), dtype=bool)
    wide[:, :rows] = part.allowed.T
    return np.packbits(wide, axis=1, bitorder="little")


@lru_cache(maxsize=256)
def _table(parts: tuple[Part, ...]) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Return parts as the library takes them, a row of numbers each in the order of `Part` in cpp/work.hpp, and the masks that they point to."""
    masks = [_bits(part) for part in parts]
    rows = [
        _rows(part, 0 if mask is None else mask.ctypes.data) for part, mask in zip(parts, masks, strict=True)
    ]
    return np.ascontiguousarray(np.concatenate(rows)), masks


def _rows(part: Part, bits: int) -> np.ndarray:
    """Return a part as the library takes it, or the rectangles of one whose keys lie at no regular distances."""
    query, key = _numbers(part.query), _numbers(part.key)
    if part.key.at is None:
        return np.array([[*query, *key, *part.shape, part.causal, bits]], dtype=np.int64)
    rows = np.tile(np.array([*query, *key, 1, 1, part.causal, bits], dtype=np.int64), (part.rectangles, 1))
    rows[:, 0] += np.arange(part.rectangles) * part.query.inner
    rows[:, len(query)] += part.key.at
    return rows


@lru_cache(maxsize=256)
def _joined(groups: tuple[HeadGroup, ...]) -> tuple[tuple[range, tuple[Part, ...]], ...]:
    """Return the parts of each range of heads, in one piece: the library joins them without a merge in between."""
    found: dict[range, tuple[Part, ...]] = {}
    for group in groups:
        found[group.heads] = found.get(group.heads, ()) + group.parts
    return tuple((heads, parts) for heads, parts in found.items() if parts)


def _numbers(side: Lattice) -> tuple[int, ...]:
    return side.start, side.step, side.places, side.outer, side.inner


def _whole(width: int) -> int:
    """Return a width filled up to whole strips."""
    return -(-width // STRIP) * STRIP


def _rowed(side: Tensor) -> Tensor:
    """Return a tensor whose rows lie in one piece."""
    return side if side.stride(-1) == 1 or side.shape[-1] == 1 else side.contiguous()


def _run(
    direction: str,
    work: Work,
    sides: Sequence[Tensor],
    *,
    splits: int = 1,
    **others: Tensor | None,
) -> bool:
    """Call the library for every group of heads, and say whether all outputs or gradients of queries are finite.

    `others` are contiguous tensors that it reads or fills: float32, or outputs and gradients as wide as the query.
    """
    query, key, value = sides[:3]
    assert _library is not None
    if not query.numel() or not key.shape[2]:
        return True
    brief = query.dtype == torch.bfloat16
    share = query.shape[1] // key.shape[1]
    asked, kept, read = [], [], []
    for members, parts in _joined(work.groups):
        table, _ = _table(parts)
        heads = (c_int64 * len(members))(*members)
        kept.append((table, heads))
        read.append({head // share for head in members})
        asked.append(
            _Work(
                **{
                    name: _Side(side.data_ptr(), *side.stride()[:3])
                    for name, side in zip(SIDES, sides, strict=False)
                },
                **{name: other.data_ptr() for name, other in others.items() if other is not None},
                heads=ctypes.cast(heads, c_void_p),
                parts=table.ctypes.data,
                batch=query.shape[0],
                heads_read=len(heads),
                heads_all=query.shape[1],
                share=share,
                queries=query.shape[2],
                keys=key.shape[2],
                width=query.shape[3],
                value_width=value.shape[3],
                parts_number=len(table),
                brief=brief,
                threads=torch.get_num_threads(),
                splits=splits,
                holding=HOLDING,
                left=LEFT,
                scale=work.scale,
            )
        )
    # Where no two have a key head in common, none adds to what another does.
    apart = sum(map(len, read)) == len(set().union(*read))
    if direction == "backward" and brief:
        shared = [[each] for each in asked] if apart else [asked]
        called = [(_library.longspan_backward_brief, (_Work * len(some))(*some)) for some in shared]
        failed = [call(some, c_int64(len(some))) for call, some in called]
        asked = [each for _, some in called for each in some]
    else:
        call = getattr(_library, f"longspan_{direction}")
        abreast = _abreast(query.shape[0], read) if direction == "backward" and apart else 1
        for each in asked:
            each.threads = max(1, each.threads // abreast)
        pointers = [ctypes.byref(each) for each in asked]
        if abreast == 1:
            failed = list(map(call, pointers))
        else:
            with ThreadPoolExecutor(abreast) as pool:
                failed = list(pool.map(call, pointers))
    if any(failed):
        raise MemoryError(f"The native kernel found no memory for {list(query.shape)}.")
    return not any(each.odd for each in asked)


def _abreast(batch: int, read: list[set[int]]) -> int:
    """Return how many works are best done at a time: each shares out its key heads to threads, and may have few."""
    busy = batch * min(map(len, read), default=1)
    return max(1, min(len(read), torch.get_num_threads() // max(1, busy)))


def _fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for numbers, whatever they are."""
    made = torch.empty(shape, dtype=dtype)
    if made.nbytes > MAPPED:
        assert _library is not None
        _library.longspan_large(c_void_p(made.data_ptr()), c_int64(made.nbytes))
    return made


def _covered(work: Work, query: Tensor, key: Tensor) -> bool:
    """Say whether the library comes by every row of every head, and not only by those of heads that read something."""
    read = sum(len(members) for members, _ in _joined(work.groups))
    return bool(query.numel() and key.shape[2]) and read == query.shape[1]


def _sums(
    query: Tensor, key: Tensor, value: Tensor, work: Work, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Return output and log-sum-exp over all parts, and whether they are finite."""
    query, key, value = map(_rowed, (query, key, value))
    output = _fresh(*query.shape[:3], value.shape[3], dtype=query.dtype)
    lse = _fresh(*query.shape[:3])
    if sinks is not None:
        sinks = sinks.detach().to(torch.float32).contiguous()
    if not _covered(work, query, key):
        output.zero_()
        lse.copy_(torch.tensor(-torch.inf) if sinks is None else sinks[:, None])
    finite = _run("forward", work, (query, key, value), output=output, lse=lse, sinks=sinks)
    return output, lse, finite


def _slopes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    work: Work,
) -> tuple[list[Tensor], bool]:
    """Return the gradients of query, key and value, and whether they are finite.

    In float32 those of key and value are filled up to whole strips. What is not finite anywhere makes the gradient of a
    query so.
    """
    sides = [_rowed(side) for side in (query, key, value, grad_output, output)]
    covered = _covered(work, query, key)
    into = _fresh(*query.shape, dtype=query.dtype)
    if query.dtype == torch.bfloat16:
        splits = 1
        grads = [_fresh(1, *side.shape, dtype=side.dtype) for side in (key, value)]
        if not covered:
            for grad in grads:
                grad.zero_()
    else:
        # Heads that share keys are done by one thread; where there are too few of them, each thread sums up its own.
        splits = max(1, -(-torch.get_num_threads() // max(1, query.shape[0] * key.shape[1])))
        grads = [_fresh(splits, *side.shape[:3], _whole(side.shape[3])).zero_() for side in (key, value)]
    if not covered:
        into.zero_()
    finite = _run(
        "backward",
        work,
        sides,
        splits=splits,
        lse=lse.contiguous(),
        grad_lse=None if grad_lse is None else grad_lse.contiguous(),
        grad_query=into,
        grad_key=grads[0],
        grad_value=grads[1],
    )
    return [into, *(grad[0] if splits == 1 else grad.sum(dim=0) for grad in grads)], finite


_frame = Frame(_sums, _slopes, torch.float32, sinks=True)
attend, forward, backward = _frame.attend, _frame.forward, _frame.backward
