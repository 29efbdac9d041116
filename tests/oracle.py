"""The oracle: who reads whom, key by key, from the papers' words, and attention as sums over pairs.

Nothing here comes from longspan, so that an error in one cannot hide in the other. A method is written as the
keys that one query of one head reads, listed one after another; a key that is listed twice counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

Reads = Callable[[int, int], Iterable[int]]


def tally(heads: int, n: int, reads: Reads) -> np.ndarray:
    """Count the pairs `[heads, n, n]` of `reads(head, query)`; keys before 0 or from `n` on do not exist."""
    counts = np.zeros((heads, n, n), dtype=np.int64)
    for head in range(heads):
        for q in range(n):
            for k in reads(head, q):
                if 0 <= k < n:
                    counts[head, q, k] += 1
    return counts


# Atoms.


def causal(heads: int, n: int) -> np.ndarray:
    """Itself and all before it."""
    return tally(heads, n, lambda head, q: range(q + 1))


def window(heads: int, n: int, size: int) -> np.ndarray:
    """Itself and `size - 1` positions on either side."""
    return tally(heads, n, lambda head, q: range(q - (size - 1), q + size))


def dilated(heads: int, n: int, step: int) -> np.ndarray:
    """All at a distance that is a multiple of `step`, before and after."""
    return tally(heads, n, lambda head, q: {*range(q, -1, -step), *range(q, n, step)})


def chunk(heads: int, n: int, size: int) -> np.ndarray:
    """All of its own chunk, the sequence being cut every `size` positions."""
    starts = range(0, n, size)
    return tally(heads, n, lambda head, q: next(range(s, s + size) for s in starts if s <= q < s + size))


def every(heads: int, n: int, step: int, first: int, *, run: int = 1) -> np.ndarray:
    """The keys `first`, `first + step`, `first + 2 step`, ..., each the first of a run of neighbours."""
    return tally(heads, n, lambda head, q: [k + more for k in range(first, n, step) for more in range(run)])


def sink(heads: int, n: int, size: int) -> np.ndarray:
    """The first `size` keys."""
    return tally(heads, n, lambda head, q: range(size))


# Named methods.


def sliding_window(heads: int, n: int, width: int, *, causal: bool = True) -> np.ndarray:
    """Mistral: `width` keys, the last of them the query's own; as many to the right if not causal."""
    return tally(heads, n, lambda head, q: range(q - width + 1, q + (1 if causal else width)))


def longformer(
    heads: int,
    n: int,
    *,
    reach: int,
    dilation: int | Sequence[int] = 1,
    anchors: Iterable[int] = (),
    causal: bool = False,
) -> np.ndarray:
    """Longformer (2004.05150, section 3): `reach` keys on each side, `dilation` apart, and global positions.

    A global position is read by all and reads all, and is read once even where the window holds it too.
    Causal means that nothing after the query is read, not by global positions either.
    """
    anchors = set(anchors)

    def reads(head: int, q: int) -> set[int]:
        apart = dilation if isinstance(dilation, int) else dilation[head]
        keys = {q + apart * number for number in range(-reach, reach + 1)} | anchors
        if q in anchors:
            keys = set(range(n))
        return {k for k in keys if k <= q} if causal else keys

    return tally(heads, n, reads)


def longnet(
    heads: int,
    n: int,
    segments: Sequence[int],
    dilations: Sequence[int],
    *,
    torchscale: bool = False,
    causal: bool = True,
) -> np.ndarray:
    """LongNet (2307.02486, section 3): a mixture of branches, one (segment length, dilation) each.

    A branch cuts the sequence into segments and keeps every r-th row of each, the first of them at the head's
    number modulo r; the kept rows attend among themselves. The mixture weighs branches by their softmax
    denominators, so a pair that stands in several branches counts once for each. In torchscale heads are padded to a
    multiple of r and cut into r runs of neighbours, and the number of its run says where a head's first row is.
    """

    def first(head: int, r: int) -> int:
        if not torchscale:
            return head % r
        padded = next(number for number in range(heads, heads + r) if number % r == 0)
        return next(run for run in range(r) if head in range(run * padded // r, (run + 1) * padded // r))

    def reads(head: int, q: int) -> list[int]:
        keys = []
        for length, r in zip(segments, dilations, strict=True):
            start = q - q % length
            kept = list(range(start + first(head, r), start + length, r))
            if q in kept:
                keys += [k for k in kept if k <= q or not causal]
        return keys

    return tally(heads, n, reads)


def s2(heads: int, n: int, group: int, *, causal: bool = True) -> np.ndarray:
    """S2-Attn (2309.12307, section 3.2), without the leak of its pseudo-code.

    The first half of the heads attend inside groups; for the other half the borders of the groups lie half a
    group earlier, so that the first group is only half as long (and has the middle token of an odd group).
    """

    def reads(head: int, q: int) -> list[int]:
        borders = list(range(0, n + group, group))
        if head >= heads // 2:
            borders = [0, *range(group - group // 2, n + 2 * group, group)]
        first = max(border for border in borders if border <= q)
        end = min(border for border in borders if border > q)
        return list(range(first, q + 1 if causal else end))

    return tally(heads, n, reads)


def _cross_window(q: int, size: int, shift: int, causal: bool, empty: str) -> list[int]:
    """SCCA's keys of one query: its window laid over keys that were rolled by `shift`, in true positions.

    Wrapped keys and keys after the query are dropped; a query that is left with none reads its own window.
    """
    start = q - q % size
    keys = [slot - shift for slot in range(start, start + size)]
    left = [k for k in keys if k >= 0 and (k <= q or not causal)]
    own = list(range(start, start + size)) if empty == "own" else []
    return left or [k for k in own if k <= q or not causal]


def scca(
    heads: int, n: int, size: int, shifts: Sequence[int], *, causal: bool = True, empty: str = "own"
) -> np.ndarray:
    """SCCA (2312.07305): equal groups of heads, and the keys of each roll by a distance of its own."""
    group = heads // len(shifts)
    return tally(heads, n, lambda head, q: _cross_window(q, size, shifts[head // group], causal, empty))


def scca_fixed(heads: int, n: int, size: int, shift: int, *, causal: bool = True) -> np.ndarray:
    """SCCA fixed: half the heads keep their window, the keys of the others roll by `shift`."""
    return scca(heads, n, size, [0, shift], causal=causal)


def scca_flow(
    heads: int, n: int, size: int, windows: int, *, causal: bool = True, empty: str = "own"
) -> np.ndarray:
    """SCCA flow: the keys of head h roll by h windows, beginning again after `windows` heads."""
    return scca(heads, n, size, [h % windows * size for h in range(heads)], causal=causal, empty=empty)


def sda(heads: int, n: int, step: int, *, rows: str = "all", causal: bool = True) -> np.ndarray:
    """SDA (2312.07305): every `step`-th key of the whole sequence, each head at its own offset.

    "all": every query, counted from `head` positions before itself. "selected": only the queries whose
    position is the head's number modulo `step`, among themselves.
    """

    def reads(head: int, q: int) -> list[int]:
        first = (q - head) % step
        if rows == "selected":
            first = head % step
            if q % step != first:
                return []
        return list(range(first, q + 1 if causal else n, step))

    return tally(heads, n, reads)


def longmixed(heads: int, n: int, size: int, step: int, shift: int, *, causal: bool = True) -> np.ndarray:
    """LongMixed (2312.07305): half the heads are SCCA fixed, the other half SDA over all rows."""
    mixed = heads // 2
    return np.concatenate(
        [
            scca_fixed(mixed, n, size, shift, causal=causal),
            sda(heads - mixed, n, step, causal=causal),
        ]
    )


def streaming(heads: int, n: int, sinks: int, width: int) -> np.ndarray:
    """StreamingLLM (2309.17453): the first `sinks` keys and the last `width`, the query's own among them."""
    return tally(heads, n, lambda head, q: {*range(min(sinks, q + 1)), *range(max(0, q - width + 1), q + 1)})


# Attention.


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, counts: np.ndarray, *, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Attention as its sums over pairs, `count * exp(score)` each, in double precision.

    Tensors are `[batch, heads, length, width]`, counts `[heads, queries, keys]`. Query heads share keys in
    runs: with 8 query heads and 2 key heads, heads 0 to 3 read the first. A query without keys gives 0 and
    minus infinity.
    """
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    output = np.zeros((batch, heads, rows, value.shape[-1]))
    lse = np.full((batch, heads, rows), -math.inf)
    for b in range(batch):
        for head in range(heads):
            for q in range(rows):
                total, mixed = 0.0, np.zeros(value.shape[-1])
                for k in range(key.shape[2]):
                    score = scale * math.fsum(query[b, head, q] * key[b, head // group, k])
                    weight = int(counts[head, q, k]) * math.exp(score)
                    total += weight
                    mixed = mixed + weight * value[b, head // group, k]
                if total > 0:
                    output[b, head, q] = mixed / total
                    lse[b, head, q] = math.log(total)
    return output, lse


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sums over whole matrices, in the precision of the tensors, with gradients.

    In float64 it is the truth that kernels are held to; in a low precision it is the plain computation whose
    error is the budget of a kernel.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    counts = counts.to(query.device)
    scores = (query @ key.transpose(-1, -2)) * scale
    scores = scores.masked_fill(counts == 0, -math.inf)
    empty = (counts == 0).all(-1, keepdim=True)
    # The largest score is a constant of the formula: it cancels, in the gradients too.
    peak = scores.detach().amax(-1, keepdim=True).masked_fill(empty, 0)
    weights = counts.to(query.dtype) * (scores - peak).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(empty, 1)
    lse = (peak + total.log()).masked_fill(empty, -math.inf)
    return (weights / total) @ value, lse.squeeze(-1)


def gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    into_output: torch.Tensor,
    into_lse: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `(output * into_output).sum() + (lse * into_lse).sum()` for query, key and value.

    Rows without keys have no gradient, whatever flows into their log-sum-exp.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    output, lse = dense(*leaves, counts, scale=scale)
    loss = (output * into_output).sum() + (lse * into_lse)[lse.isfinite()].sum()
    return torch.autograd.grad(loss, leaves)


# Verdicts.


def same_pairs(claimed: np.ndarray, truth: np.ndarray, asked: str = "") -> None:
    """Reject counts that differ anywhere; the message names the first pair that does."""
    claimed = np.broadcast_to(np.asarray(claimed), truth.shape)
    wrong = np.argwhere(claimed != truth)
    if len(wrong):
        head, q, k = wrong[0]
        raise AssertionError(
            f"{asked} [{truth.shape}]: {len(wrong)} pairs differ, first head={head}, q={q}, k={k}: "
            f"got {claimed[head, q, k]}, should be {truth[head, q, k]}"
        )


def within_budget(
    claimed: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    asked: str = "",
    *,
    lse: torch.Tensor | None = None,
) -> None:
    """Reject a result whose largest error exceeds twice that of the plain computation in the same precision.

    Roundings of the largest true number are added: one for the result itself, and where weights may come from
    a stored log-sum-exp (`lse`, the true one) its own, since `exp(score - lse)` is as far off as `lse` is. In
    float64 there is nothing to compare with and the budget is 1e-10. Infinities must stand where the truth has
    them.
    """
    assert claimed.shape == truth.shape, (
        f"{asked}: shape {list(claimed.shape)}, should be {list(truth.shape)}"
    )
    finite = truth.isfinite()
    got, mean = claimed.detach().double().cpu(), plain.detach().double().cpu()
    assert torch.equal(got[~finite], truth[~finite]), f"{asked}: infinities are not where they should be"
    lost = int((~got[finite].isfinite()).sum())
    assert not lost, f"{asked}: {lost} numbers are not finite"
    if not finite.any():
        return
    error = (got - truth)[finite].abs().max().item()
    budget = 1e-10
    if claimed.dtype != torch.float64:
        roundings = 1.0
        if lse is not None and lse.isfinite().any():
            roundings += lse[lse.isfinite()].abs().max().item()
        band = roundings * torch.finfo(torch.float32).eps * truth[finite].abs().max().item()
        if claimed.dtype != torch.float32:
            band += torch.finfo(claimed.dtype).eps * truth[finite].abs().max().item()
        budget = 2 * (mean - truth)[finite].abs().max().item() + band
    assert error <= budget, f"{asked}: error {error:.3g}, budget {budget:.3g}"
