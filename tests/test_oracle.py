"""The oracle is held to figures worked out elsewhere, and rejects answers wrong in the usual ways."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch


def drawn(counts: np.ndarray, head: int = 0) -> list[str]:
    return ["".join(".#23456789"[number] for number in row) for row in counts[head].tolist()]


# Published figures and pictures drawn by hand.


def test_window_keeps_its_own_position_and_size_less_one_on_either_side():
    assert drawn(oracle.window(1, 5, 2)) == ["##...", "###..", ".###.", "..###", "...##"]


def test_sliding_window_reads_width_keys_with_its_own():
    assert drawn(oracle.sliding_window(1, 5, 3)) == ["#....", "##...", "###..", ".###.", "..###"]


def test_longformer_has_two_sided_window_and_globals_once():
    assert drawn(oracle.longformer(1, 6, reach=1, anchors=[0])) == [
        "######",
        "###...",
        "####..",
        "#.###.",
        "#..###",
        "#...##",
    ]


def test_longformer_dilation_spreads_the_window():
    assert drawn(oracle.longformer(2, 6, reach=1, dilation=[1, 2], causal=True), head=1) == [
        "#.....",
        ".#....",
        "#.#...",
        ".#.#..",
        "..#.#.",
        "...#.#",
    ]


def test_longnet_counts_a_pair_once_for_each_branch():
    assert drawn(oracle.longnet(2, 8, [2, 4], [1, 2])) == [
        "2.......",
        "##......",
        "#.2.....",
        "..##....",
        "....2...",
        "....##..",
        "....#.2.",
        "......##",
    ]
    assert drawn(oracle.longnet(2, 4, [2, 4], [1, 2]), head=1) == ["#...", "#2..", "..#.", ".##2"]


def test_s2_shifts_the_groups_of_the_second_half_of_the_heads():
    counts = oracle.s2(2, 6, 4)
    assert drawn(counts, 0) == ["#.....", "##....", "###...", "####..", "....#.", "....##"]
    assert drawn(counts, 1) == ["#.....", "##....", "..#...", "..##..", "..###.", "..####"]


def test_streaming_reads_sinks_and_the_last_keys():
    assert drawn(oracle.streaming(1, 6, 1, 2)) == ["#.....", "##....", "###...", "#.##..", "#..##.", "#...##"]


def union_of_heads(counts: np.ndarray) -> int:
    return int((counts > 0).any(axis=0).sum())


@pytest.mark.parametrize(
    ("counts", "covered"),
    [
        (oracle.scca_fixed(8, 32, 8, 4), 240),
        (oracle.scca_fixed(8, 32, 8, 8), 336),
        (oracle.scca_flow(8, 32, 8, 4), 528),
        (oracle.sda(8, 32, 8, rows="selected"), 80),
        (oracle.sda(8, 32, 8, rows="all"), 528),
        (oracle.longmixed(8, 32, 8, 4, 8), 528),
    ],
    ids=["fixed by half a window", "fixed by a window", "flow", "SDA selected", "SDA all", "LongMixed"],
)
def test_heads_together_cover_the_published_number_of_pairs(counts: np.ndarray, covered: int):
    """Causal pairs covered by the union of heads, of 528, at 32 tokens, windows of 8 and 8 heads."""
    assert union_of_heads(counts) == covered
    assert not np.triu(counts, 1).any()


@pytest.mark.parametrize(
    ("shift", "empty"), [(4, 0), (8, 8), (16, 16), (24, 24)], ids=["half", "one", "two", "three"]
)
def test_shifted_rows_that_keep_no_key_read_their_own_window(shift: int, empty: int):
    counts = oracle.scca_fixed(2, 32, 8, shift)
    own, shifted = counts
    fallen = [q for q in range(32) if q // 8 * 8 + 7 - shift < 0]
    assert len(fallen) == empty
    assert all((shifted[q] == own[q]).all() for q in fallen)
    assert counts.any(axis=2).all()


def test_sda_leaves_the_published_number_of_rows_empty():
    selected = oracle.sda(8, 32, 8, rows="selected")
    assert [int((~head.any(axis=1)).sum()) for head in selected] == [28] * 8
    everyone = oracle.sda(8, 32, 8, rows="all")
    assert [int((~head.any(axis=1)).sum()) for head in everyone] == list(range(8))


# Wrong answers.


def rolled(n: int, heads: int, size: int, shifts: list[int]) -> np.ndarray:
    """What a causal kernel sees that knows nothing of the roll: triangles in rolled coordinates."""
    return oracle.tally(
        heads,
        n,
        lambda head, q: [(slot - shifts[head]) % n for slot in range(q - q % size, q + 1)],
    )


@pytest.mark.parametrize(
    ("shifts", "leaks", "covered"),
    [([0] * 4 + [4] * 4, 104, 222), ([0] * 4 + [8] * 4, 144, 252), ([0, 8, 16, 24] * 2, 432, 360)],
    ids=["fixed by half a window", "fixed by a window", "flow"],
)
def test_rolled_masks_leak_as_often_as_published(shifts: list[int], leaks: int, covered: int):
    counts = rolled(32, 8, 8, shifts)
    assert int(np.triu(counts, 1).sum()) == leaks
    assert union_of_heads(np.tril(counts)) == covered


def roll_back_s2(heads: int, n: int, group: int) -> np.ndarray:
    """The pseudo-code of LongLoRA: the last group is joined to the first half group."""

    def reads(head: int, q: int) -> list[int]:
        shift = 0 if head < heads // 2 else group // 2
        place = (q - shift) % n
        return [(slot + shift) % n for slot in range(place - place % group, place + 1)]

    return oracle.tally(heads, n, reads)


def trapped_s2(heads: int, n: int, group: int) -> np.ndarray:
    """The roll back done inside groups: rows of the shifted heads hold the output of a later query."""
    wrong = oracle.s2(heads, n, group)
    for head in range(heads // 2, heads):
        wrong[head] = np.roll(wrong[head], -group // 2, axis=0)
    return wrong


RIGHT = {
    "SlidingWindow": oracle.sliding_window(2, 31, 5),
    "Longformer": oracle.longformer(2, 31, reach=3, anchors=[0, 9]),
    "Longformer causal": oracle.longformer(2, 31, reach=3, anchors=[0, 9], causal=True),
    "Longformer dilated": oracle.longformer(2, 31, reach=3, dilation=2),
    "LongNet": oracle.longnet(4, 31, [4, 8], [1, 2]),
    "S2": oracle.s2(4, 32, 8),
    "SCCA": oracle.scca_fixed(2, 31, 8, 8),
    "SDA": oracle.sda(4, 31, 4),
    "Streaming": oracle.streaming(1, 31, 2, 4),
}
WRONG = {
    "window of one key too many": ("SlidingWindow", oracle.sliding_window(2, 31, 6)),
    "window of one key too few": ("SlidingWindow", oracle.sliding_window(2, 31, 4)),
    "window that looks ahead": ("SlidingWindow", oracle.window(2, 31, 5)),
    "window that starts behind itself": ("SlidingWindow", np.tril(oracle.sliding_window(2, 31, 6), -1)),
    "window that slides too late in one head": (
        "SlidingWindow",
        np.stack([oracle.sliding_window(1, 31, 5)[0], oracle.sliding_window(1, 31, 6)[0]]),
    ),
    "everything transposed": ("SlidingWindow", oracle.sliding_window(2, 31, 5).swapaxes(1, 2)),
    "one-sided reach as the whole window": ("Longformer", oracle.longformer(2, 31, reach=6, anchors=[0, 9])),
    "slice without its last key": (
        "Longformer",
        oracle.tally(2, 31, lambda head, q: range(31) if q in (0, 9) else {*range(q - 3, q + 3), 0, 9}),
    ),
    "globals that nobody reads": (
        "Longformer",
        oracle.tally(2, 31, lambda head, q: range(31) if q in (0, 9) else range(q - 3, q + 4)),
    ),
    "globals that do not read all": (
        "Longformer",
        oracle.tally(2, 31, lambda head, q: {*range(q - 3, q + 4), 0, 9}),
    ),
    "globals counted twice in the window": (
        "Longformer",
        oracle.longformer(2, 31, reach=3) + oracle.longformer(2, 31, reach=0, anchors=[0, 9]),
    ),
    "globals that leak": ("Longformer causal", oracle.longformer(2, 31, reach=3, anchors=[0, 9])),
    "dilated by thinning the window": (
        "Longformer dilated",
        oracle.tally(2, 31, lambda head, q: [k for k in range(q - 3, q + 4) if (q - k) % 2 == 0]),
    ),
    "union in place of the sum": ("LongNet", np.minimum(oracle.longnet(4, 31, [4, 8], [1, 2]), 1)),
    "every head at offset 0": (
        "LongNet",
        np.repeat(oracle.longnet(1, 31, [4, 8], [1, 2]), 4, axis=0),
    ),
    "offsets in contiguous groups of heads": (
        "LongNet",
        oracle.longnet(4, 31, [4, 8], [1, 2])[[0, 2, 1, 3]],
    ),
    "branches that are not causal": ("LongNet", oracle.longnet(4, 31, [4, 8], [1, 2], causal=False)),
    "dilation over the whole sequence": ("LongNet", oracle.longnet(4, 31, [4, 64], [1, 2])),
    "groups rolled around the end": ("S2", roll_back_s2(4, 32, 8)),
    "groups rolled back inside themselves": ("S2", trapped_s2(4, 32, 8)),
    "groups without a shift": ("S2", oracle.s2(8, 32, 8)[:4]),
    "shifts that alternate": ("S2", oracle.s2(4, 32, 8)[[0, 2, 1, 3]]),
    "rolled mask": ("SCCA", rolled(31, 2, 8, [0, 8])),
    "first window left empty": (
        "SCCA",
        np.where(np.arange(31)[None, :, None] < 8, [[[1]], [[0]]], 1) * oracle.scca_fixed(2, 31, 8, 8),
    ),
    "shifted the other way": ("SCCA", oracle.scca_fixed(2, 31, 8, -8)),
    "shifted by half a window": ("SCCA", oracle.scca_fixed(2, 31, 8, 4)),
    "only the rows of its residue": ("SDA", oracle.sda(4, 31, 4, rows="selected")),
    "offset of the wrong sign": (
        "SDA",
        oracle.tally(4, 31, lambda head, q: [k for k in range(q + 1) if (k - q - head) % 4 == 0]),
    ),
    "one sink too few": ("Streaming", oracle.streaming(1, 31, 1, 4)),
    "sinks counted twice": ("Streaming", oracle.streaming(1, 31, 0, 4) + oracle.streaming(1, 31, 2, 0)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_pairs_are_rejected(mistake: str):
    name, wrong = WRONG[mistake]
    oracle.same_pairs(RIGHT[name].copy(), RIGHT[name])
    with pytest.raises(AssertionError, match="pairs differ"):
        oracle.same_pairs(wrong, RIGHT[name])


# Attention.


def tensors(
    *, heads: int = 4, kv: int = 2, rows: int = 5, keys: int = 7, batch: int = 2
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = [(batch, heads, rows, 3), (batch, kv, keys, 3), (batch, kv, keys, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def multiset(heads: int = 4, rows: int = 5, keys: int = 7) -> torch.Tensor:
    """Counts from 0 to 3 with one empty row in each head."""
    counts = torch.randint(0, 4, (heads, rows, keys), generator=torch.Generator().manual_seed(5))
    counts[:, 2] = 0
    return counts


def by_pairs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor):
    output, lse = oracle.attention(query.numpy(), key.numpy(), value.numpy(), counts.numpy(), scale=0.5)
    return torch.from_numpy(output), torch.from_numpy(lse)


def test_whole_matrices_give_the_sums_over_pairs():
    given, counts = tensors(), multiset()
    for got, truth in zip(oracle.dense(*given, counts, scale=0.5), by_pairs(*given, counts), strict=True):
        oracle.within_budget(got, got, truth)


def test_uniform_scores_give_the_weighted_mean_of_the_values():
    query, key, value = tensors()
    counts = multiset()
    output, lse = by_pairs(torch.zeros_like(query), key, value, counts)
    assert torch.equal(output[:, :, 2], torch.zeros(2, 4, 3, dtype=torch.float64))
    assert torch.equal(lse[:, :, 2], torch.full((2, 4), -math.inf, dtype=torch.float64))
    weights = counts[3, 0].double()
    torch.testing.assert_close(lse[0, 3, 0], weights.sum().log())
    torch.testing.assert_close(output[0, 3, 0], weights @ value[0, 1] / weights.sum())


def test_a_pair_counted_twice_equals_a_key_that_stands_twice():
    query, key, value = tensors()
    counts = multiset().clamp(max=1)
    twice = counts.clone()
    twice[:, :, 4] *= 2
    doubled = [torch.cat([tensor, tensor[:, :, 4:5]], dim=2) for tensor in (key, value)]
    truth = by_pairs(query, *doubled, torch.cat([counts, counts[:, :, 4:5]], dim=2))
    for got, expected in zip(by_pairs(query, key, value, twice), truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_large_scores_do_not_overflow():
    query, key, value = tensors()
    output, lse = oracle.dense(query * 1e4, key, value, multiset(), scale=1.0)
    assert output.isfinite().all()
    assert (lse > 709).any()


def test_gradients_are_those_of_finite_differences():
    counts = multiset()
    given = tensors()
    into = [torch.randn_like(part) for part in oracle.dense(*given, counts, scale=0.5)]
    got = oracle.gradients(*given, counts, *into, scale=0.5)

    def loss() -> float:
        output, lse = oracle.dense(*given, counts, scale=0.5)
        return float((output * into[0]).sum() + (lse * into[1])[lse.isfinite()].sum())

    for tensor, gradient in zip(given, got, strict=True):
        flat, slopes = tensor.view(-1), gradient.reshape(-1)
        for place in range(0, len(flat), 5):
            before = flat[place].item()
            flat[place] = before + 1e-5
            above = loss()
            flat[place] = before - 1e-5
            slope = (above - loss()) / 2e-5
            flat[place] = before
            assert abs(slope - slopes[place].item()) < 1e-8


def one_softmax_per_part(given: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    first, second = (oracle.dense(*given, part, scale=0.5)[0] for part in (counts // 2, counts - counts // 2))
    return (first + second) / 2


MISTAKES = {
    "multiplicity forgotten": lambda given, counts: oracle.dense(*given, counts.clamp(max=1), scale=0.5)[0],
    "multiplicity added to the score": lambda given, counts: (
        torch.softmax(
            (given[0] @ given[1].repeat_interleave(2, 1).mT * 0.5 + counts).masked_fill(counts == 0, -1e9), -1
        )
        @ given[2].repeat_interleave(2, 1)
    ),
    "scale forgotten": lambda given, counts: oracle.dense(*given, counts, scale=1.0)[0],
    "key heads dealt out in turn": lambda given, counts: oracle.dense(
        given[0], given[1].repeat(1, 2, 1, 1), given[2].repeat(1, 2, 1, 1), counts, scale=0.5
    )[0],
    "mean of two softmaxes": one_softmax_per_part,
    "empty rows that average all values": lambda given, counts: oracle.dense(
        *given, counts + (counts == 0).all(-1, keepdim=True), scale=0.5
    )[0],
    "empty rows that are not a number": lambda given, counts: oracle.dense(*given, counts, scale=0.5)[
        0
    ].masked_fill((counts == 0).all(-1, keepdim=True), math.nan),
    "heads of the counts in reverse": lambda given, counts: oracle.dense(*given, counts.flip(0), scale=0.5)[
        0
    ],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_outputs_are_rejected(mistake: str, dtype: torch.dtype):
    given = [tensor.to(dtype) for tensor in tensors()]
    counts = multiset()
    truth, _ = oracle.dense(*[tensor.double() for tensor in given], counts, scale=0.5)
    plain, _ = oracle.dense(*given, counts, scale=0.5)
    wrong = MISTAKES[mistake]([tensor.double() for tensor in given], counts).to(dtype)
    oracle.within_budget(truth.to(dtype), plain, truth)
    with pytest.raises(AssertionError):
        oracle.within_budget(wrong, plain, truth)


def test_a_log_sum_exp_of_zero_for_an_empty_row_is_rejected():
    _, truth = oracle.dense(*tensors(), multiset(), scale=0.5)
    with pytest.raises(AssertionError, match="infinities"):
        oracle.within_budget(truth.nan_to_num(neginf=0.0), truth, truth)


def test_gradients_that_forget_the_log_sum_exp_are_rejected():
    given, counts = tensors(), multiset()
    output, lse = (torch.ones_like(part) for part in oracle.dense(*given, counts, scale=0.5))
    truth = oracle.gradients(*given, counts, output, lse, scale=0.5)
    wrong = oracle.gradients(*given, counts, output, torch.zeros_like(lse), scale=0.5)
    for right, without in zip(truth[:2], wrong[:2], strict=True):
        with pytest.raises(AssertionError, match="error"):
            oracle.within_budget(without, right, right)
