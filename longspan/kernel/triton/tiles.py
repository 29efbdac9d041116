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
    rows = start + tl.arange(0, S)
    return tl.load(
        base + rows[:, None] * stride + tl.arange(0, D)[None, :], mask=rows[:, None] < count, other=0.0
    )


@triton.jit
def _scores(q, k, scale, masks, number, first, columns, MASKED: tl.constexpr, S: tl.constexpr):
    """Return the scores of a block, minus infinity for what is not read."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    column = tl.arange(0, S)
    read = (first + column)[None, :] < columns
    if MASKED:
        words: tl.constexpr = S // 32
        place = number * S * words + tl.arange(0, S)[:, None] * words + column[None, :] // 32
        read = read & (((tl.load(masks + place) >> (column[None, :] % 32)) & 1) != 0)
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
    place = output + batch * ob + head * oh + row[:, None] * on + tl.arange(0, D)[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=row[:, None] < rows)
    found = tl.where(silent, float("-inf"), most + tl.log(tl.where(silent, 1.0, total)))
    tl.store(lse + pair.to(tl.int64) * rows + row, found, mask=row < rows)


@triton.jit
def _steep(
    q, k, v, grad, total, along, number, first, masks, columns, scale, MASKED: tl.constexpr, S: tl.constexpr
):
    """Return the weights of a block, and the gradient of its scores."""
    scores = _scores(q, k, scale, masks, number, first, columns, MASKED, S)
    weights = tl.exp(scores - total[:, None])
    steep = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - along[:, None]) * scale
    return weights, steep


@triton.jit
def _into_query(
    sums, q, grad, total, along, key, value, k_stride, v_stride, index, number, masks, columns, scale,
    MASKED: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
):
    k = _side(key, index * S, columns, k_stride, S, D)
    v = _side(value, index * S, columns, v_stride, S, D)
    _, steep = _steep(q, k, v, grad, total, along, number, index * S, masks, columns, scale, MASKED, S)
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
    into_key, into_value, k, v, query, grad, lse, along, q_stride, g_stride, index, number, first, masks,
    rows, columns, scale, MASKED: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
):
    q = _side(query, index * S, rows, q_stride, S, D)
    g = _side(grad, index * S, rows, g_stride, S, D)
    row = index * S + tl.arange(0, S)
    total = tl.load(lse + row, mask=row < rows, other=0.0)
    own = tl.load(along + row, mask=row < rows, other=0.0)
    weights, steep = _steep(q, k, v, g, total, own, number, first, masks, columns, scale, MASKED, S)
    weights = tl.where(row[:, None] < rows, weights, 0.0)
    into_value += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
    into_key += tl.dot(tl.trans(steep.to(q.dtype)), q, input_precision="ieee")
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
                block * S, masks, rows, columns, scale, False, S, D,
            )
        for at in range(tl.load(part + line), tl.load(part + line + 1)):
            into_key, into_value = _into_keys(
                into_key, into_value, k, v, q, g, lse + own, along + own, qn, gn, tl.load(parts + at),
                tl.load(numbers + at), block * S, masks, rows, columns, scale, True, S, D,
            )
    column = block * S + tl.arange(0, S)
    place = (pair.to(tl.int64) * columns + column)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(made_key + place, into_key, mask=column[:, None] < columns)
    tl.store(made_value + place, into_value, mask=column[:, None] < columns)
