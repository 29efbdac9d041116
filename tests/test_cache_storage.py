"""Storage, pages, turning, scores: what a cache holds its keys in and what it does to them, and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from longspan import attend
from longspan.cache import Cache, Pool, Rounded
from longspan.errors import PatternError, ShapeError
from longspan.frequency import DynamicNTK, Plain
from longspan.pattern import Causal, PerHead, SlidingWindow, Streaming
from longspan.rope import rotation
from longspan.score import ALiBi, Sinks, SoftCap


def text(batch: int = 1, length: int = 50, *, heads: int = 4, key_heads: int = 2, width: int = 8):
    random = torch.Generator().manual_seed(11)
    return [
        torch.randn(batch, count, length, width, generator=random, dtype=torch.float64)
        for count in (heads, key_heads, key_heads)
    ]


def read(cache: Cache, sides, sizes, **options):
    outputs, begin = [], 0
    for size in sizes:
        outputs.append(cache.attend(*(side[:, :, begin : begin + size] for side in sides), **options))
        begin += size
    return torch.cat(outputs, dim=2)


def turned(frequency):
    def rotate(tensor, positions, length):
        return rotation(positions, frequency, width=tensor.shape[-1], length=length).turn(tensor)

    return rotate


def test_eight_bits_are_as_near_as_they_say():
    key, value = (side.float() for side in text(2)[1:])
    key[0, 0, 3] = 0
    storage = Rounded(key, value)
    storage.keep(torch.zeros((1, 0), dtype=torch.bool), 50)
    storage.append(key, value)
    for side, back in zip((key, value), storage.read(), strict=True):
        allowed = side.abs().amax(-1, keepdim=True) * (1 / 254 + torch.finfo(torch.float32).eps)
        assert ((back - side).abs() <= allowed).all()
    # A byte for every number, and four for every token and head of either side.
    assert storage.nbytes == 2 * 2 * 2 * 50 * (8 + 4)


def test_eight_bits_do_not_depend_on_the_pieces():
    sides = text(2)
    found = [
        read(Cache(Streaming(9, sinks=2), heads=4, key_heads=2, storage="int8", block=4), sides, sizes)
        for sizes in ([50], [20, *[1] * 30])
    ]
    torch.testing.assert_close(*found)


def test_pages_are_shared_until_someone_writes_and_come_back():
    pool = Pool(60, size=4, width=8, dtype=torch.float64)
    sides = text(1, 18)
    cache = Cache(Causal(), heads=4, key_heads=2, storage=pool)
    cache.attend(*sides)
    assert pool.free == 60 - 2 * 5
    branches = [cache.fork() for _ in range(3)]
    assert pool.free == 60 - 2 * 5
    assert cache.nbytes == 2 * 5 * pool.page_bytes == 2 * 5 * 4 * 2 * 8 * 8
    branches[0].attend(*(side[:, :, :1] for side in sides))
    # Only the last page of each key head differs.
    assert pool.free == 60 - 2 * 6
    branches[0].crop(16)
    branches[0].attend(*(side[:, :, :1] for side in sides))
    assert pool.free == 60 - 2 * 6
    for branch in branches:
        branch.reset()
    assert pool.free == 60 - 2 * 5
    del cache, branch, branches
    assert pool.free == 60


@pytest.mark.parametrize("pages", [100, 8])
@pytest.mark.parametrize(("block", "most"), [(4, 4), (64, 19)])
def test_windows_give_their_pages_back(block, most, pages):
    pool = Pool(pages, size=4, width=8, dtype=torch.float64)
    sides = text(1, 400)
    cache = Cache(SlidingWindow(10), heads=4, key_heads=2, storage=pool, block=block)
    taken = []
    for token in range(400):
        cache.attend(*(side[:, :, token : token + 1] for side in sides))
        taken.append(pages - pool.free)
    # Nine keys and one block lie on so many pages of four. A pool that has less room makes dead ones go sooner.
    assert max(taken) == min(pages, 2 * most)


def test_a_text_longer_than_the_pool_leaves_all_unharmed():
    pool = Pool(14, size=4, width=8, dtype=torch.float64)
    pattern, sides = PerHead([Causal(), SlidingWindow(30)]), text(1, 60)
    cache = Cache(pattern, heads=4, key_heads=2, storage=pool)
    first = read(cache, sides, [20])
    free = pool.free
    with pytest.raises(ShapeError) as caught:
        cache.attend(*(side[:, :, 20:] for side in sides))
    assert str(caught.value) == (
        "The pool has no pages left for these tokens.\n"
        "  wanted  10 pages of 4 tokens of one key head\n"
        "  left    4 of 14\n"
        "  try     a larger Pool, shorter texts, or cache.reset() on those that are done"
    )
    with pytest.raises(ShapeError, match="wanted  3 pages of 4 tokens"):
        # The first key head takes its pages, the second one finds too few.
        cache.attend(*(side[:, :, 20:32] for side in sides))
    assert (pool.free, cache.lengths) == (free, [20])
    rest = cache.attend(*(side[:, :, 20:28] for side in sides))
    wanted = attend(*(side[:, :, :28] for side in sides), pattern & Causal())
    torch.testing.assert_close(torch.cat([first, rest], 2), wanted)


def test_keys_are_turned_with_the_length_of_each_reading():
    """At every step all keys are turned by the frequencies of that length, rows of different lengths each by theirs."""
    frequency = DynamicNTK(16, factor=2.0)
    sides = text(2, 40)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :12] = False
    cache = Cache(Streaming(20), heads=4, key_heads=2, rotate=turned(frequency))
    cache.attend(*(side[:, :, :30] for side in sides), real=real)
    for end in range(31, 41):
        found = cache.attend(*(side[:, :, end - 1 : end] for side in sides))
        for row, begin in enumerate((12, 0)):
            turn = rotation(torch.arange(end - begin), frequency, width=8, length=end - begin)
            query, key, value = (side[row : row + 1, :, begin:end] for side in sides)
            wanted = attend(turn.turn(query), turn.turn(key), value, Streaming(20))[:, :, -1:]
            torch.testing.assert_close(found[row : row + 1], wanted)


def test_places_in_the_cache_are_those_of_streaming():
    """StreamingLLM by its words: what a query reads stands at 0, 1, 2, ... and the query at the last place."""
    sides, rotate = text(1, 40), turned(Plain())
    cache = Cache(Streaming(10, sinks=3), heads=4, key_heads=2, rotate=rotate, places="cache", block=5)
    found = read(cache, sides, [17, 1, 1, 21])
    for t in range(40):
        kept = [k for k in range(t + 1) if k < 3 or k > t - 10]
        places = torch.arange(len(kept))
        query, key = rotate(sides[0][:, :, [t]], places[-1:], 0), rotate(sides[1][:, :, kept], places, 0)
        torch.testing.assert_close(found[:, :, [t]], attend(query, key, sides[2][:, :, kept], Causal()))


@pytest.mark.parametrize("pattern", [Streaming(9, sinks=2), PerHead([Causal(), SlidingWindow(7)])], ids=str)
@pytest.mark.parametrize(
    "scores",
    [ALiBi(), SoftCap(1.5), Sinks(torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64))],
    ids=str,
)
def test_scores_are_changed_as_without_a_cache(pattern, scores, monkeypatch):
    sides = text(2)
    wanted = attend(*sides, pattern & Causal(), scores=scores, kernel="reference")
    for unplanned in (1 << 18, 0):
        monkeypatch.setattr("longspan.cache.reading._UNPLANNED", unplanned)
        cache = Cache(pattern, heads=4, key_heads=2, block=4)
        torch.testing.assert_close(read(cache, sides, [20, 19, *[1] * 11], scores=scores), wanted)


MISUSES = {
    "another batch": ({"batch": 2}, {}, "These tensors do not continue what the cache holds."),
    "another width": ({"width": 6}, {}, "These tensors do not continue what the cache holds."),
    "other heads": ({"heads": 2}, {}, "The cache was made for 4 query heads and 2 key heads."),
    "a past position": ({}, {"start": 9}, "Tokens that begin at 9 do not continue a text of [10] tokens."),
    "a wrong mask": (
        {},
        {"real": torch.ones(1, 3)},
        "`real` says of every token of the batch whether it is one.",
    ),
}


@pytest.mark.parametrize(("shape", "options", "problem"), MISUSES.values(), ids=MISUSES)
def test_misuse_leaves_the_cache_unharmed(shape, options, problem):
    sides = text(1, 20)
    cache = Cache(Streaming(6, sinks=1), heads=4, key_heads=2, block=3)
    cache.attend(*(side[:, :, :10] for side in sides))
    with pytest.raises(ShapeError) as caught:
        cache.attend(*text(**({"length": 4} | shape)), **options)
    assert str(caught.value).startswith(problem + "\n  cache  batch 1, widths 8 and 8, float64, cpu\n")
    found = cache.attend(*(side[:, :, 10:] for side in sides))
    torch.testing.assert_close(found, attend(*sides, Streaming(6, sinks=1))[:, :, 10:])


def test_a_first_reading_that_fails_leaves_nothing_behind():
    cache = Cache(Causal(), heads=4, key_heads=2, storage=Pool(1, width=8, dtype=torch.float64))
    with pytest.raises(ShapeError):
        cache.attend(*text(2))
    assert cache.lengths == []
    with pytest.raises(ShapeError):
        cache.attend(*text(1))
    assert (cache.storage.free, cache.nbytes) == (1, 0)


def test_gradients_are_refused():
    query, key, value = text()
    with pytest.raises(ShapeError, match="carries no gradient"):
        Cache(Causal(), heads=4, key_heads=2).attend(query.requires_grad_(), key, value)


def test_a_crop_before_what_is_held_is_refused():
    cache = Cache(SlidingWindow(8), heads=4, key_heads=2, block=4)
    cache.attend(*text(1, 40))
    with pytest.raises(ShapeError) as caught:
        cache.crop(38)
    assert str(caught.value) == (
        "A crop to [38] tokens would read keys that are gone; [40] is possible.\n"
        "  cache  Cache of SlidingWindow(8): 40 tokens read, 7 held, 2,816 bytes\n"
        "  try    Cache(..., undo=tokens), which holds keys that much longer"
    )
    with pytest.raises(ShapeError, match="not a part of what was read"):
        cache.crop(41)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4, "key_heads": 3},
        {"heads": 4, "block": 0},
        {"heads": 4, "undo": -1},
        {"heads": 4, "storage": "int4"},
        {"heads": 4, "places": "here"},
        {"heads": 4, "places": "cache"},
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_is_refused(options):
    with pytest.raises(ShapeError, match="A cache cannot be made so"):
        Cache(Causal(), **options)


def test_heads_that_would_count_places_differently_are_refused():
    with pytest.raises(PatternError, match="cannot count places"):
        Cache(
            PerHead([Causal(), SlidingWindow(4)]),
            heads=2,
            key_heads=1,
            rotate=turned(Plain()),
            places="cache",
        )


def test_pages_of_a_window_go_on_lying_side_by_side():
    """Four caches of four heads in one pool: what each has read is at two or three places however long it goes on."""
    pool = Pool(4 * 4 * 14, size=4, width=8)
    caches = [Cache(SlidingWindow(32), heads=4, block=16, storage=pool) for _ in range(4)]
    stretches = []
    for _ in range(600):
        for one in caches:
            one.attend(*(torch.randn(1, 4, 1, 8) for _ in range(3)))
            table = one._shelves[0].storage.table
            stretches.append((np.diff(table, axis=2) != 1).sum(2) + 1)
    late = np.stack(stretches[400 * 4 :])
    assert late.mean() < 2 and late.max() <= 4


def test_what_a_pool_gives_is_what_it_has():
    pool = Pool(10, size=2, width=8)
    first = pool.take(np.array([0, 0]), 2)
    assert np.diff(first).tolist() == [[1], [1]]
    # Each goes on behind its last page, as far as that is vacant, and elsewhere after.
    second = pool.take(first[:, -1], 3)
    given = np.concatenate([first, second], axis=1)
    assert sorted(given.flatten().tolist()) == list(range(1, 11)) and pool.free == 0
    with pytest.raises(ShapeError, match="no pages left"):
        pool.take(np.array([0]), 1)
    pool.hold(given[0])
    pool.give_back(given)
    assert pool.free == 5 and pool.shared(given).sum() == 0
    pool.give_back(given[0])
    assert pool.free == 10


def test_a_deep_copy_goes_its_own_way_in_a_pool_of_its_own():
    pool = Pool(80, size=2, width=8)
    cache = Cache(SlidingWindow(9), heads=2, block=4, storage=pool)
    sides = [torch.randn(1, 2, 60, 8) for _ in range(3)]
    wanted = attend(*sides, SlidingWindow(9))
    cache.attend(*(side[:, :, :17] for side in sides))
    other = copy.deepcopy(cache)
    cache.attend(*(torch.randn(1, 2, 5, 8) for _ in range(3)))
    for t in range(17, 60):
        found = other.attend(*(side[:, :, t : t + 1] for side in sides))
        torch.testing.assert_close(found, wanted[:, :, t : t + 1])
