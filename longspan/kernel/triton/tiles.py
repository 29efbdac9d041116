"""Tiles: the programs of the triton kernel, over lists of blocks. Imported only where Triton is.

A program has one block of queries (or of keys) on one head, goes through the blocks that its lists name, and looks into
a mask of bits only for those that are partial. Backward is as in FlashAttention-2: scores are made again from the
log-sum-exp, once for the gradient of the queries and once for those of keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Programs have more arguments than lines should hold one each.
# fmt: off


@triton.jit
def _side(base, start, count, stride, S: tl.constexpr, D: tl.constexpr):
    """Load a block of rows, 0 behind the last one."""
    row = tl.arange(0, S)
    # Where a long text with many heads inside ends is no number of 32 bits.
    base += start.to(tl.int64) * stride
    place = row[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(base + place, mask=(start + row)[:, None] < count, other=0.0)


@triton.jit
def _scores(down, across, scale, masks, number, first, count, MASKED: tl.constexpr, S: tl.constexpr):
    """Return the scores of a block, minus infinity for what is not read and what lies behind the end across."""
    scores = tl.dot(down, tl.trans(across), input_precision="ieee") * scale
    column = tl.arange(0, S)[None, :]
    read = first + column < count
    if MASKED:
        words: tl.constexpr = S // 32
        line = masks + number.to(tl.int64) * S * words + tl.arange(0, S) * words
        bits = tl.load(line)[:, None]
        for word in tl.static_range(1, words):
            bits = tl.where(column // 32 == word, tl.load(line + word)[:, None], bits)
        read = read & (((bits >> (column % 32)) & 1) != 0)
    return tl.where(read, scores, float("-inf"))


@triton.jit
def _weighed(
    most, total, sums, q, key, value, k_stride, v_stride, index, number, masks, columns, scale, MASKED:
    tl.constexpr, S: tl.constexpr, D: tl.constexpr,
):
    k = _side(key, index * S, columns, k_stride, S, D)
    v = _side(value, index * S, columns, v_stride, S, D)
    scores = _scores(q, k, scale, masks, number, index * S, columns, MASKED, S)
    larger = tl.maximum(most, tl.max(scores, axis=1))
    # Of a row that has read nothing yet.
    above = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp(scores - above[:, None])
    before = tl.exp(most - above)
    total = total * before + tl.sum(weights, axis=1)
    sums = sums * before[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return larger, total, sums


@triton.jit
def forward(
    query, key, value, output, lse, qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, heads, share, rows,
    columns, scale, blocks, full, fulls, part, parts, numbers, masks, S: tl.constexpr, D: tl.constexpr,
):
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    key += batch * kb + head // share * kh
    value += batch * vb + head // share * vh
    q = _side(query + batch * qb + head * qh, block * S, rows, qn, S, D)
    most = tl.full([S], float("-inf"), tl.float32)
    total = tl.zeros([S], tl.float32)
    sums = tl.zeros([S, D], tl.float32)
    line = head * blocks + block
    for at in range(tl.load(full + line), tl.load(full + line + 1)):
        most, total, sums = _weighed(
            most, total, sums, q, key, value, kn, vn, tl.load(fulls + at), 0, masks, columns, scale, False,
            S, D,
        )
    for at in range(tl.load(part + line), tl.load(part + line + 1)):
        most, total, sums = _weighed(
            most, total, sums, q, key, value, kn, vn, tl.load(parts + at), tl.load(numbers + at), masks,
            columns, scale, True, S, D,
        )
    silent = total == 0.0
    sums = sums / tl.where(silent, 1.0, total)[:, None]
    row = block * S + tl.arange(0, S)
    place = output + batch * ob + head * oh + row.to(tl.int64)[:, None] * on + tl.arange(0, D)[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=row[:, None] < rows)
    found = tl.where(silent, float("-inf"), most + tl.log(tl.where(silent, 1.0, total)))
    tl.store(lse + pair.to(tl.int64) * rows + row, found, mask=row < rows)


@triton.jit
def _into_query(
    sums, q, grad, total, along, key, value, k_stride, v_stride, index, number, masks, columns, scale,
    MASKED: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
):
    k = _side(key, index * S, columns, k_stride, S, D)
    v = _side(value, index * S, columns, v_stride, S, D)
    weights = tl.exp(_scores(q, k, scale, masks, number, index * S, columns, MASKED, S) - total[:, None])
    steep = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - along[:, None]) * scale
    return sums + tl.dot(steep.to(k.dtype), k, input_precision="ieee")


@triton.jit
def backward_query(
    query, key, value, grad, lse, along, made, qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh, gn, heads, share,
    rows, columns, scale, blocks, full, fulls, part, parts, numbers, masks, S: tl.constexpr, D:
    tl.constexpr,
):
    block, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    key += batch * kb + head // share * kh
    value += batch * vb + head // share * vh
    q = _side(query + batch * qb + head * qh, block * S, rows, qn, S, D)
    g = _side(grad + batch * gb + head * gh, block * S, rows, gn, S, D)
    row = block * S + tl.arange(0, S)
    place = pair.to(tl.int64) * rows + row
    total = tl.load(lse + place, mask=row < rows, other=0.0)
    own = tl.load(along + place, mask=row < rows, other=0.0)
    sums = tl.zeros([S, D], tl.float32)
    line = head * blocks + block
    for at in range(tl.load(full + line), tl.load(full + line + 1)):
        sums = _into_query(
            sums, q, g, total, own, key, value, kn, vn, tl.load(fulls + at), 0, masks, columns, scale,
            False, S, D,
        )
    for at in range(tl.load(part + line), tl.load(part + line + 1)):
        sums = _into_query(
            sums, q, g, total, own, key, value, kn, vn, tl.load(parts + at), tl.load(numbers + at), masks,
            columns, scale, True, S, D,
        )
    tl.store(made + place[:, None] * D + tl.arange(0, D)[None, :], sums, mask=row[:, None] < rows)


@triton.jit
def _into_keys(
    into_key, into_value, k, v, query, grad, lse, along, q_stride, g_stride, index, number, masks, rows, scale,
    MASKED: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
):
    q = _side(query, index * S, rows, q_stride, S, D)
    g = _side(grad, index * S, rows, g_stride, S, D)
    row = index * S + tl.arange(0, S)
    total = tl.load(lse + row, mask=row < rows, other=0.0)
    own = tl.load(along + row, mask=row < rows, other=0.0)
    # Keys lie down here and queries across, so that weights are multiplied as they lie.
    weights = tl.exp(_scores(k, q, scale, masks, number, index * S, rows, MASKED, S) - total[None, :])
    into_value += tl.dot(weights.to(g.dtype), g, input_precision="ieee")
    steep = weights * (tl.dot(v, tl.trans(g), input_precision="ieee") - own[None, :]) * scale
    into_key += tl.dot(steep.to(q.dtype), q, input_precision="ieee")
    return into_key, into_value


@triton.jit
def backward_keys(
    query, key, value, grad, lse, along, made_key, made_value, qb, qh, qn, kb, kh, kn, vb, vh, vn, gb, gh,
    gn, heads, share, rows, columns, scale, blocks, full, fulls, part, parts, numbers, masks, S:
    tl.constexpr, D: tl.constexpr,
):
    block, pair = tl.program_id(0), tl.program_id(1)
    key_heads = heads // share
    batch, served = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    k = _side(key + batch * kb + served * kh, block * S, columns, kn, S, D)
    v = _side(value + batch * vb + served * vh, block * S, columns, vn, S, D)
    into_key = tl.zeros([S, D], tl.float32)
    into_value = tl.zeros([S, D], tl.float32)
    for turn in range(0, share):
        head = served * share + turn
        q, g = query + batch * qb + head * qh, grad + batch * gb + head * gh
        own = (batch * heads + head) * rows
        line = head * blocks + block
        for at in range(tl.load(full + line), tl.load(full + line + 1)):
            into_key, into_value = _into_keys(
                into_key, into_value, k, v, q, g, lse + own, along + own, qn, gn, tl.load(fulls + at), 0,
                masks, rows, scale, False, S, D,
            )
        for at in range(tl.load(part + line), tl.load(part + line + 1)):
            into_key, into_value = _into_keys(
                into_key, into_value, k, v, q, g, lse + own, along + own, qn, gn, tl.load(parts + at),
                tl.load(numbers + at), masks, rows, scale, True, S, D,
            )
    column = block * S + tl.arange(0, S)
    place = (pair.to(tl.int64) * columns + column)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(made_key + place, into_key, mask=column[:, None] < columns)
    tl.store(made_value + place, into_value, mask=column[:, None] < columns)
