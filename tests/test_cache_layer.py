"""A cache changes nothing: read in pieces of any size, ragged or not, a text gives what it gives as a whole."""

from __future__ import annotations

import pytest
import torch

from longspan import attend
from longspan.cache import Cache, Pool, reading
from longspan.derive.lifetime import live, most_live
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Chunk,
    Longformer,
    LongMixed,
    LongNet,
    Pattern,
    PerHead,
    Prefix,
    SlidingWindow,
    Streaming,
    Window,
)

HEADS, KEY_HEADS, WIDTH, LENGTH = 8, 4, 16, 97
PATTERNS = [
    Causal(),
    SlidingWindow(20),
    Streaming(18, sinks=3),
    Longformer(6, dilation=3, global_tokens=2),
    LongNet((16, 48), (1, 2)),
    S2(22),
    SCCA(19),
    SCCA(12, flow=4),
    SDA(4),
    SDA(4, rows="selected"),
    LongMixed(18),
    Causal() & (Chunk(13) | Prefix(5)),
    (Causal() & Window(9)) + Chunk(14),
    PerHead([SlidingWindow(11), Causal(), Streaming(7, sinks=1), SDA(3)]),
]
STORAGES = {
    "plain": lambda: None,
    "pages": lambda: Pool(4 * KEY_HEADS * 40, size=7, width=WIDTH, dtype=torch.float64),
}


def text(batch: int, length: int = LENGTH, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [
        torch.randn(batch, heads, length, WIDTH, generator=random, dtype=dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def whole(sides: list[torch.Tensor], pattern: Pattern) -> torch.Tensor:
    return attend(*sides, pattern & Causal(), kernel="reference")


def in_pieces(cache: Cache, sides: list[torch.Tensor], size: int, first: int = 0) -> torch.Tensor:
    length = sides[0].shape[2]
    pieces = [slice(0, first)] if first else []
    pieces += [slice(begin, min(begin + size, length)) for begin in range(first, length, size)]
    return torch.cat([cache.attend(*(side[:, :, piece] for side in sides)) for piece in pieces], dim=2)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_pieces_of_any_size_give_the_whole(pattern, storage):
    sides = text(2)
    wanted = whole(sides, pattern)
    # In pieces below and above a block, as a whole, and a prompt with tokens after it.
    for block, size, first in ((16, 7, 0), (5, 7, 0), (5, LENGTH, 0), (5, 1, 70)):
        cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=block, storage=STORAGES[storage]())
        torch.testing.assert_close(in_pieces(cache, sides, size, first), wanted)
        assert cache.lengths == [LENGTH, LENGTH]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_many_queries_are_read_by_plans_of_the_runs_that_are_held(pattern, monkeypatch):
    monkeypatch.setattr(reading, "_UNPLANNED", 0)
    sides = text(1)
    # What is held for undoing begins where no chunk does.
    cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=5, undo=8)
    torch.testing.assert_close(in_pieces(cache, sides, 40), whole(sides, pattern))


@pytest.mark.parametrize("pattern", PATTERNS[::2], ids=str)
def test_token_by_token_in_float32(pattern):
    sides = text(1, dtype=torch.float32)
    cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=8)
    torch.testing.assert_close(in_pieces(cache, sides, 1), whole(sides, pattern))


@pytest.mark.parametrize("pattern", PATTERNS[::2], ids=str)
@pytest.mark.parametrize(("storage", "block"), [("plain", 4), ("pages", 64)])
def test_rows_of_different_lengths(pattern, storage, block):
    """Each row is read as if it were alone: padded at first, then token by token, then in a padded piece."""
    lengths, columns = [3, 40, 17], 40
    real = torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]
    sides = text(3)
    cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=block, storage=STORAGES[storage]())
    pieces = [(slice(0, columns), real), *((slice(t, t + 1), None) for t in range(columns, 60))]
    holes = torch.ones(3, LENGTH - 60, dtype=torch.bool)
    holes[0, ::3] = holes[2, :9] = False
    pieces.append((slice(60, LENGTH), holes))
    outputs = [cache.attend(*(side[:, :, piece] for side in sides), real=mask) for piece, mask in pieces]
    output = torch.cat(outputs, dim=2)
    everything = torch.cat([real, torch.ones(3, 20, dtype=torch.bool), holes], dim=1)
    for row, mask in enumerate(everything):
        alone = whole([side[row : row + 1, :, mask] for side in sides], pattern)
        torch.testing.assert_close(output[row : row + 1, :, mask], alone)
        assert (output[row, :, ~mask] == 0).all()
    assert cache.lengths == everything.sum(1).tolist()


@pytest.mark.parametrize("pattern", PATTERNS[::2], ids=str)
def test_held_is_live_and_at_most_a_block_more(pattern):
    sides, block = text(1), 8
    cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=block)
    causal = pattern & Causal()
    singles = [causal.at_head(head, HEADS) for head in range(HEADS)]
    once = {single: [live(single, at=t) for t in range(LENGTH + 1)] for single in set(singles)}
    kept = [once[single][t] for t in range(LENGTH + 1) for single in singles]
    for t in range(LENGTH):
        cache.attend(*(side[:, :, t : t + 1] for side in sides))
        for head in range(HEADS):
            # A key head holds what any of its query heads may read.
            group = range(head - head % 2, head - head % 2 + 2)
            needed = {k for h in group for part in kept[(t + 1) * HEADS + h] for k in part}
            held = set(cache.held(head=head))
            assert needed <= held
            since = max(0, t + 1 - block)
            allowed = {k for h in group for part in kept[since * HEADS + h] for k in part}
            assert len(held - allowed) <= block
    token = KEY_HEADS * 2 * WIDTH * 8
    most = max(sum(map(len, kept[t * HEADS + h])) for t in range(LENGTH) for h in range(HEADS))
    if len(set(singles)) == 1:
        assert cache.nbytes <= (most + block) * token
        assert most <= most_live(singles[0], length=2 * LENGTH)


@pytest.mark.parametrize("pattern", [SlidingWindow(20), Streaming(16, sinks=4)], ids=str)
@pytest.mark.parametrize("size", [1, 30])
def test_bytes_stay_once_the_window_is_full(pattern, size):
    cache, seen = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=6), set()
    sides = text(2, 60)
    for step in range(12):
        in_pieces(cache, sides, size)
        if step:
            seen.add(cache.nbytes)
    assert seen == {2 * (19 + 6) * KEY_HEADS * 2 * WIDTH * 8}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("pattern", PATTERNS[1::4], ids=str)
def test_cropped_text_is_read_as_if_it_had_ended_there(storage, pattern):
    sides, other = text(2), [side.flip(2) for side in text(2)]
    cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=4, undo=5, storage=STORAGES[storage]())
    in_pieces(cache, [side[:, :, :50] for side in other], 50)
    cache.crop(45)
    begun = [torch.cat([b[:, :, :45], a[:, :, 45:]], 2) for a, b in zip(sides, other, strict=True)]
    pieces = []
    for begin in range(45, 90, 3):
        # Five guesses, of which three are right.
        piece = [
            torch.cat([a[:, :, begin : begin + 3], b[:, :, :2]], 2) for a, b in zip(begun, other, strict=True)
        ]
        pieces.append(cache.attend(*piece)[:, :, :3])
        cache.crop(begin + 3)
    wanted = whole([side[:, :, :90] for side in begun], pattern)[:, :, 45:]
    torch.testing.assert_close(torch.cat(pieces, 2), wanted)


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_cropped_to_different_lengths(storage):
    sides = text(2)
    cache = Cache(PATTERNS[2], heads=HEADS, key_heads=KEY_HEADS, block=4, undo=9, storage=STORAGES[storage]())
    in_pieces(cache, [side[:, :, :50] for side in sides], 50)
    cache.crop([42, 49])
    assert cache.lengths == [42, 49]
    rest = [torch.stack([side[0, :, 42:90], side[1, :, 49:97]]) for side in sides]
    output = in_pieces(cache, rest, 1)
    wanted = whole(sides, PATTERNS[2])
    torch.testing.assert_close(output[0], wanted[0, :, 42:90])
    torch.testing.assert_close(output[1], wanted[1, :, 49:97])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("pattern", PATTERNS[::3], ids=str)
def test_branches_and_rows_go_their_own_ways(storage, pattern):
    sides, other = text(2), [side.flip(2) for side in text(2)]
    trunk = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=4, storage=STORAGES[storage]())
    trunk.attend(*(side[:, :, :40] for side in sides))
    branch = trunk.fork()
    branch.select(torch.tensor([1, 0, 1]))
    mixed = [torch.cat([a[:, :, :40], b[:, :, 40:]], 2)[[1, 0, 1]] for a, b in zip(sides, other, strict=True)]
    both = []
    for t in range(40, 70):
        both.append(
            (
                trunk.attend(*(side[:, :, t : t + 1] for side in sides)),
                branch.attend(*(side[:, :, t : t + 1] for side in mixed)),
            )
        )
    for outputs, told in zip(zip(*both, strict=True), (sides, mixed), strict=True):
        wanted = whole([side[:, :, :70] for side in told], pattern)[:, :, 40:]
        torch.testing.assert_close(torch.cat(outputs, 2), wanted)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("pattern", PATTERNS[2:4], ids=str)
def test_one_row_left_of_a_ragged_batch_has_no_gaps_that_are_read(storage, pattern):
    sides = text(3)
    real = torch.ones(3, 50, dtype=torch.bool)
    real[0, ::2] = real[1, 40:] = False
    cache = Cache(pattern, heads=HEADS, key_heads=KEY_HEADS, block=4, undo=6, storage=STORAGES[storage]())
    cache.attend(*(side[:, :, :50] for side in sides), real=real)
    cache.select(torch.tensor([0]))
    cache.crop(23)
    rest = [side[:1, :, 60:90] for side in sides]
    output = in_pieces(cache, rest, 1, 9)
    told = [
        torch.cat([side[:1, :, :50][:, :, real[0]][:, :, :23], end], 2)
        for side, end in zip(sides, rest, strict=True)
    ]
    torch.testing.assert_close(output, whole(told, pattern)[:, :, 23:])
    cache.select(torch.tensor([0, 0]))
    assert cache.lengths == [53, 53]
    more = [side[:2, :, 90:] for side in sides]
    told = [torch.cat([side.expand(2, -1, -1, -1), end], 2) for side, end in zip(told, more, strict=True)]
    torch.testing.assert_close(in_pieces(cache, more, 1), whole(told, pattern)[:, :, 53:])
