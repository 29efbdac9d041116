"""The native kernel: attention over the parts of a pattern in one pass, by a small library of our own for CPU.

Blocks of queries go through all their keys with the softmax kept online, 16 queries at a time, and of what a mask leaves
out nothing is computed but what one of 16 queries reads. The library is C++ behind three
pointers and a table of numbers (`native.cpp`), so it depends on no version of Python or PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from ctypes import Structure, c_float, c_int64, c_void_p
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longspan.kernel import compiler
from longspan.kernel.calls import HeadGroup
from longspan.kernel.frame import Frame, Work
from longspan.kernel.parts import Lattice, Part
from longspan.score import Scores

# Queries in a block; in a strip, which is what is skipped or computed as one; unread keys that a strip skips at least.
ROWS, STRIP, GAP = 64, 16, 16
# Keys in a chunk, forward and backward, and in what lies ready for all strips of a block.
DEPTH, CHUNK, PIECE = 144, 96, 288
NOT_BUILT = (
    "was not built from this version's source; where there is a C++ compiler, "
    "`python -m longspan.kernel.compiler` builds it"
)
# Tensors that the library takes as they lie.
SIDES = ("query", "key", "value", "grad_output", "result")
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


def workspace(heads: int, queries: int, keys: int, width: int) -> tuple[int, int]:
    """Return the bytes that are taken beside inputs, outputs and gradients, forward and backward, on one thread.

    Each further thread takes some hundred kilobytes more, and its own gradients of keys where there are fewer heads than
    threads.
    """
    wide = _whole(width)
    forward = 4 * (2 * ROWS * (wide + 1) + STRIP * (2 * wide + DEPTH) + 2 * PIECE * wide)
    backward = 4 * ROWS * (5 * wide + 2 * CHUNK + 3)
    rows = 4 * heads * queries
    filled = 2 * 4 * heads * keys * (wide - width)
    return forward + rows, backward + 3 * rows + filled


class _Side(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class _Work(Structure):
    """What the library is asked; the order is that of `Work` in native.cpp."""

    _fields_ = [
        *((name, _Side) for name in SIDES),
        *((name, c_void_p) for name in ("output", "lse", "grad_lse", "grad_query", "grad_key", "grad_value")),
        *((name, c_void_p) for name in ("heads", "parts")),
        *((name, c_int64) for name in ("batch", "heads_read", "heads_all", "share", "queries", "keys")),
        *((name, c_int64) for name in ("width", "value_width", "parts_number", "brief", "threads", "splits")),
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
    """Return parts as the library takes them, a row of numbers each in the order of `Part` in native.cpp, and the masks that they point to."""
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
    **others: Tensor,
) -> bool:
    """Call the library for every group of heads, and say whether all outputs or gradients of queries are finite.

    `others` are contiguous float32 tensors that it reads or fills.
    """
    query, key, value = sides[:3]
    assert _library is not None
    finite = True
    if not query.numel() or not key.shape[2]:
        return finite
    for members, parts in _joined(work.groups):
        table, _ = _table(parts)
        heads = (c_int64 * len(members))(*members)
        asked = _Work(
            **{
                name: _Side(side.data_ptr(), *side.stride()[:3])
                for name, side in zip(SIDES, sides, strict=False)
            },
            **{name: other.data_ptr() for name, other in others.items()},
            heads=ctypes.cast(heads, c_void_p),
            parts=table.ctypes.data,
            batch=query.shape[0],
            heads_read=len(heads),
            heads_all=query.shape[1],
            share=query.shape[1] // key.shape[1],
            queries=query.shape[2],
            keys=key.shape[2],
            width=query.shape[3],
            value_width=value.shape[3],
            parts_number=len(table),
            brief=query.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            splits=splits,
            scale=work.scale,
        )
        if getattr(_library, f"longspan_{direction}")(ctypes.byref(asked)):
            raise MemoryError(f"The native kernel found no memory for {list(query.shape)}.")
        finite &= not asked.odd
    return finite


def _fresh(*shape: int) -> Tensor:
    """Return memory for float32 numbers, whatever they are."""
    made = torch.empty(shape, dtype=torch.float32)
    if made.nbytes > MAPPED:
        assert _library is not None
        _library.longspan_large(c_void_p(made.data_ptr()), c_int64(made.nbytes))
    return made


def _covered(work: Work, query: Tensor, key: Tensor) -> bool:
    """Say whether the library comes by every row of every head, and not only by those of heads that read something."""
    read = sum(len(members) for members, _ in _joined(work.groups))
    return bool(query.numel() and key.shape[2]) and read == query.shape[1]


def _sums(query: Tensor, key: Tensor, value: Tensor, work: Work) -> tuple[Tensor, Tensor, bool]:
    """Return output and log-sum-exp over all parts in float32, and whether they are finite."""
    query, key, value = map(_rowed, (query, key, value))
    output = _fresh(*query.shape[:3], value.shape[3])
    lse = _fresh(*query.shape[:3])
    if not _covered(work, query, key):
        output.zero_()
        lse.fill_(-torch.inf)
    finite = _run("forward", work, (query, key, value), output=output, lse=lse)
    return output, lse, finite


def _slopes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    work: Work,
) -> tuple[list[Tensor], bool]:
    """Return the gradients of query, key and value in float32, and whether they are finite.

    Those of key and value are filled up to whole strips. What is not finite anywhere makes the gradient of a query so.
    """
    sides = [_rowed(side) for side in (query, key, value, grad_output, output)]
    # Heads that share keys are done by one thread; where there are too few of them, each thread sums up its own.
    apart = max(1, query.shape[0] * key.shape[1])
    splits = max(1, -(-torch.get_num_threads() // apart))
    grads = [_fresh(splits, *side.shape[:3], _whole(side.shape[3])).zero_() for side in (key, value)]
    into = _fresh(*query.shape)
    if not _covered(work, query, key):
        into.zero_()
    finite = _run(
        "backward",
        work,
        sides,
        splits=splits,
        lse=lse.contiguous(),
        grad_lse=grad_lse.contiguous(),
        grad_query=into,
        grad_key=grads[0],
        grad_value=grads[1],
    )
    return [into, *(grad[0] if splits == 1 else grad.sum(dim=0) for grad in grads)], finite


_frame = Frame(_sums, _slopes, torch.float32)
attend, forward, backward = _frame.attend, _frame.forward, _frame.backward
