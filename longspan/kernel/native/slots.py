"""Slots: what a few queries read of keys and values that a cache holds.

A matrix product is made for many queries. One new token is done when its keys have come from memory once, so on CPU the
native library reads them where they lie and as they are: in one buffer or in pages, as float32, bfloat16 or in eight
bits. Elsewhere PyTorch reads those that lie in one buffer.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.kernel.native import native

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Bytes of keys that are worth a thread of their own.
_PER_THREAD = 1 << 21


class _Slots(Structure):
    """Where keys and values lie; the order is that of `Slots` in cpp/slots.hpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("key", "value", "key_scale", "value_scale", "table")),
        *((name, c_int64) for name in ("batch", "heads", "share", "width", "value_width", "size", "pages")),
    ]


class _Bias(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("query", c_int64)]


_NONE = _Bias()


def _functions() -> tuple[Any, Any]:
    """Return what the library reads and takes in with, or None for both."""
    if native._library is None:
        return None, None
    weigh, put = native._library.longspan_weigh, native._library.longspan_put
    weigh.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int64, c_int64, c_void_p]
    put.argtypes, put.restype = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64], None
    return weigh, put


_weigh, _put = _functions()


class Slots:
    """Keys and values where they lie, for as long as they lie there.

    Args:
        key, value: `[rows, heads, slots, width]`, or `[pages, slots, width]` with a table; contiguous.
        scales: of key and value in eight bits, float32 of their shapes with width 1; None for numbers as they are.
        table: pages of every row and head, int64 `[rows, heads, pages]`, contiguous; None for one buffer. More may be
            written into it later.

    Attributes:
        end: nothing is written from this slot on, whoever counted wrong.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        *,
        scales: tuple[Tensor, Tensor] | None = None,
        table: Tensor | None = None,
    ) -> None:
        # What is pointed to is held here, so that it outlives what points to it.
        self._sides, self._others = (key, value), (scales, table)
        batch, heads = (key if table is None else table).shape[:2]
        self._slots = _Slots(
            key.data_ptr(),
            value.data_ptr(),
            *((None, None) if scales is None else (side.data_ptr() for side in scales)),
            None if table is None else table.data_ptr(),
            batch,
            heads,
            1,
            key.shape[-1],
            value.shape[-1],
            key.shape[-2],
            0 if table is None else table.shape[2],
        )
        self._kind, self._at = _KINDS.get(key.dtype), ctypes.addressof(self._slots)
        self.end = key.shape[-2] * (1 if table is None else table.shape[2])
        self._bytes = batch * heads * (key.shape[-1] + value.shape[-1]) * key.element_size()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies lie elsewhere.
        return _laid, (*self._sides, *self._others, self.end)

    def put(self, key: Tensor, value: Tensor, slot: int) -> bool:
        """Write one token of every row, `[rows, heads, 1, width]`, into a slot, or say that PyTorch has to."""
        if key.shape[2] != 1 or not readable(key, self._sides[0]) or key.dtype != value.dtype:
            return False
        if not 0 <= slot < self.end:
            return False
        whole = self._kind == _KINDS[torch.int8]
        if not whole and key.dtype != self._sides[0].dtype:
            return False
        key, value = key.contiguous(), value.contiguous()
        _put(self._at, key.data_ptr(), value.data_ptr(), slot, key.dtype == torch.bfloat16, whole)
        return True

    def weigh(self, query: Tensor, bias: Tensor | None, scale: float, begin: int, end: int) -> Tensor:
        """Return what queries read in the slots from `begin` up to `end`, `[rows, heads, queries, value width]`.

        Pages and eight bits are for those who have asked whether they are `readable`.

        Args:
            query: `[rows, heads, queries, width]`.
            bias: what is added to scores, as it broadcasts against them; None for nothing.
            scale: what scores are multiplied by before.
        """
        if not readable(query, self._sides[0]):
            key, value = (side.narrow(2, begin, end - begin) for side in self._sides)
            bias = bias if bias is None else bias.to(query.dtype)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        slots, added = self._slots, _NONE
        asked = query.float().contiguous()
        batch, heads, slots.share, _ = asked.shape
        output = torch.empty((batch, heads, slots.share, slots.value_width))
        if bias is not None:
            bias = bias.float().contiguous()
            strides = (
                0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)
            )
            added = _Bias(bias.data_ptr(), *list(strides)[:3])
        threads = min(torch.get_num_threads(), 1 + self._bytes * (end - begin) // _PER_THREAD)
        given = (self._at, asked.data_ptr(), ctypes.addressof(added), begin, end, scale, self._kind, threads)
        if _weigh(*given, output.data_ptr()):
            raise MemoryError(f"The native kernel found no memory for {list(query.shape)}.")
        return output.to(query.dtype)


def _laid(key: Tensor, value: Tensor, scales: Any, table: Any, end: int) -> Slots:
    slots = Slots(key, value, scales=scales, table=table)
    slots.end = end
    return slots


def readable(query: Tensor, key: Tensor) -> bool:
    """Say whether the native library reads such keys for such queries, in slots of any kind."""
    return (
        _weigh is not None
        and key.dtype in _KINDS
        and query.dtype in (torch.float32, torch.bfloat16)
        and key.is_cpu
        and query.is_cpu
    )
