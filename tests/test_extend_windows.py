"""Windows: positions that skip, documents that are packed, stages that double."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, llama

from longspan.errors import InputError
from longspan.extend.positions import restarting, skipping
from longspan.extend.recipe import Recipe
from longspan.extend.windows import TrainingWindows, readable_depths
from longspan.hf.attention import set_pattern
from longspan.pattern import Causal, Streaming, Window
from longspan.text.corpus import Corpus

CORPUS = Corpus.from_ids([list(range(1, 200))] * 10, separator=256)


def test_windows_of_long_lengths_are_a_quarter_unless_positions_must_count():
    windows = {length: Recipe(length=length).window for length in (512, 4096, 5000, 16384, 32768)}
    assert windows == {512: 512, 4096: 4096, 5000: 4096, 16384: 4096, 32768: 8192}
    for options in (
        {"positions": "counted"},
        {"documents": "packed"},
        {"sequence_ranks": 2},
        {"window": 32768},
    ):
        assert Recipe(length=32768, **options).window == 32768


def windows(**options) -> TrainingWindows:
    recipe = Recipe(**{"steps": 8, "passkeys": 0.0} | options)
    return TrainingWindows(CORPUS, byte_tokenizer(), recipe, heads=4)


@pytest.mark.parametrize(("length", "reach"), [(2, 2), (2, 9), (9, 9), (7, 24)])
def test_positions_skip_as_in_the_paper(length, reach):
    """Both draws are uniform over all they may be, and independent: a chi-square test at one in a million."""
    rng = np.random.default_rng(0)
    halves, skips = -(-length // 2), reach - length + 1
    counts = np.zeros((halves, skips))
    draws = 100 * halves * skips
    for _ in range(draws):
        positions = skipping(length, reach=reach, rng=rng)
        steps = np.diff(positions)
        assert positions[0] == 0 and len(positions) == length and positions[-1] < reach
        assert (steps != 1).sum() <= 1 and (steps >= 1).all()
        skip = positions[-1] - (length - 1)
        if skip:
            first = int(np.argmax(steps)) + 1
            assert first <= halves
            counts[first - 1, skip] += 1
        else:
            counts[:, 0] += 1 / halves
    expected = draws / counts.size
    free = counts[:, 1:]
    if free.size:
        square = ((free - expected) ** 2 / expected).sum()
        assert square < free.size + 6 * np.sqrt(2 * free.size)
    assert abs(counts[:, 0].sum() - draws / skips) <= 6 * np.sqrt(draws / skips)


def test_a_short_window_reaches_over_the_whole_length():
    short = windows(length=1024, window=64, steps=200)
    item = short[3]
    assert item["input_ids"].shape == item["position_ids"].shape == (64,)
    # Without a mask, attention would take the jump for the beginning of another document.
    assert torch.equal(item["attention_mask"], torch.ones(64, dtype=torch.long))
    ends = [int(short[number]["position_ids"][-1]) for number in range(200)]
    # Half as far again as the length, which is the margin.
    assert max(ends) > 1450 and min(ends) < 150 and max(ends) < 1536


def test_positions_that_skip_are_one_text():
    """The last token still reads the first one, over the jump."""
    model = llama(positions=1024).eval()
    set_pattern(model, Causal())
    item = windows(length=1024, window=32)[1]
    inputs = {name: item[name][None] for name in ("input_ids", "position_ids", "attention_mask")}
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 0] = 17
    with torch.no_grad():
        moved = model(**other).logits[0, -1] - model(**inputs).logits[0, -1]
    assert moved.abs().max() > 1e-4


def test_packed_documents_are_read_alone():
    model = llama(positions=512).eval()
    set_pattern(model, Causal())
    item = windows(length=450, documents="packed")[0]
    ids, positions, labels = item["input_ids"], item["position_ids"], item["labels"]
    begins = (positions == 0).nonzero().flatten().tolist()
    assert begins[0] == 0 and 2 <= len(begins) <= 4
    assert [int(ids[begin - 1]) for begin in begins[1:]] == [256] * (len(begins) - 1)
    assert [int(labels[begin]) for begin in begins[1:]] == [-100] * (len(begins) - 1)
    assert int((labels == -100).sum()) == len(begins) - 1
    with torch.no_grad():
        packed = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        for begin, end in zip(begins, [*begins[1:], 450], strict=True):
            alone = model(input_ids=ids[None, begin:end]).logits[0]
            torch.testing.assert_close(packed[begin:end], alone, rtol=1e-4, atol=1e-5)


def test_documents_count_from_zero():
    assert restarting(np.array([], dtype=np.int64), 3).tolist() == [0, 1, 2]
    assert restarting(np.array([1, 2]), 4).tolist() == [0, 0, 0, 1]


def test_stages_double_the_window_and_its_pattern():
    options = {"positions": "counted", "pattern": "SlidingWindow({1/4})"}
    staged = windows(length=256, stages=3, steps=7, batch=2, accumulate=2, **options)
    sizes = [len(staged[number]["input_ids"]) for number in range(len(staged))]
    steps = [sizes[4 * step] for step in range(7)]
    assert steps == sorted(steps) == [64, 64, 64, 128, 128, 256, 256]
    assert sizes == [size for size in steps for _ in range(4)]
    assert staged.recipe.patterns(64) == ("SlidingWindow(16)",)
    assert staged.recipe.tokens(7) == sum(sizes)
    assert all("position_ids" not in staged[number] for number in range(len(staged)))


def test_positions_skip_in_stages_whose_windows_are_short():
    staged = windows(length=256, stages=3, steps=60)
    items = [staged[number] for number in range(len(staged))]
    ends = [int(item["position_ids"][-1]) if "position_ids" in item else None for item in items]
    assert 320 < max(ends[:20]) < 384 and 320 < max(ends[20:40]) < 384
    assert ends[40:] == [None] * 20


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"length": 64, "window": 128}, "window 128"),
        ({"length": 64, "stages": 7}, "stages 7"),
        ({"stages": 9, "steps": 8}, "stages 9"),
        ({"length": 64, "window": 32, "documents": "packed"}, "do not go together"),
        ({"length": 64, "stages": 2, "documents": "packed"}, "do not go together"),
        ({"documents": "boxed"}, "documents boxed"),
        ({"method": "lora++"}, r"try\s+lora\+"),
        ({"steps": 1.5}, "steps 1.5"),
        ({"steps": True}, "steps True"),
        ({"rate": "fast"}, "rate 'fast'"),
        ({"rate": float("nan")}, "rate nan"),
        ({"passkeys": float("nan")}, "repeats and passkeys"),
        ({"model": 7}, "model 7"),
    ],
)
def test_recipes_that_cannot_be(options, problem):
    with pytest.raises(InputError, match=problem):
        Recipe(**options)


def test_windows_of_a_step_are_of_one_kind_and_one_that_hides_a_passkey_teaches_nothing_else():
    mixed = windows(length=400, steps=60, batch=2, accumulate=2, repeats=0.3, passkeys=0.4)
    decode, kinds = byte_tokenizer().decode, [mixed.kind(step) for step in range(60)]
    assert {kind: 8 < kinds.count(kind) < 34 for kind in ("segments", "passkey", "text")} == dict.fromkeys(
        ("segments", "passkey", "text"), True
    )
    depths, different = [], []
    for number in range(len(mixed)):
        ids, labels = mixed[number]["input_ids"], mixed[number]["labels"]
        taught = labels != -100
        if kinds[number // 4] == "passkey":
            answer = decode(ids[taught])
            assert re.fullmatch(r" \d{5}", answer) and decode(ids).endswith(f"The pass key is{answer}")
            assert decode(ids).count(answer.strip()) == 3
            different.append(len(set(answer.strip())))
            depths.append(decode(ids).index(answer.strip()) / len(ids))
        else:
            assert taught.all() and "pass key" not in decode(ids)
        assert torch.equal(labels[taught], ids[taught])
    assert min(different) <= 2 and max(different) == 5
    # What kind a step is of says nothing of the depth at which its windows hide a key.
    assert min(depths[::4]) < 0.3 and max(depths[::4]) > 0.6


def test_a_window_too_short_for_a_passkey_is_text():
    short = windows(length=40, passkeys=1.0)
    assert "pass key" not in byte_tokenizer().decode(short[0]["input_ids"])
    assert short.kind(0) == "text" and torch.equal(short[0]["input_ids"], short[0]["labels"])


@pytest.mark.parametrize(
    ("own", "patterns", "first"),
    [
        # Three windows of 101 pass on what stands up to 300 tokens back.
        ((101, 101, 101), [Causal()], 100),
        ((51, 201, 51), [Causal()], 100),
        ((101, 101, 101), [Window(51)], 250),
        ((500, 101, 101), [Causal()], 0),
        # Where a layer of the model reads everything, its pattern must let it.
        ((None, 101, 101), [Causal()], 0),
        ((None, 101, 101), [Window(201)], 200),
        ((101, None, 101), [Causal(), Window(151), Causal()], 250),
    ],
)
def test_passkeys_stand_where_the_windows_of_the_model_reach(own, patterns, first):
    """Of 401 tokens; depths are ten tokens apart."""
    depths = readable_depths(patterns, length=401, heads=2, own=own)
    assert (np.round(depths * 400) == np.arange(first, 401, 10)).all()


def test_sinks_are_read_directly_or_not_at_all():
    sinks = Streaming(51, sinks=11)
    found = readable_depths([sinks], length=401, heads=2, own=(None, None))
    assert np.round(found * 400).tolist() == [0, 10, *range(350, 401, 10)]
    # A window of the model's own has no sinks.
    found = readable_depths([sinks], length=401, heads=2, own=(51, 51))
    assert np.round(found * 400).tolist() == list(range(300, 401, 10))


def test_windows_hide_passkeys_where_the_model_reaches_only():
    recipe = Recipe(length=401, steps=40, passkeys=1.0, pattern="Causal()")
    near = TrainingWindows(CORPUS, byte_tokenizer(), recipe, heads=4, own=(101, 101))
    found = []
    for number in range(len(near)):
        item = near[number]
        answer = byte_tokenizer().decode(item["input_ids"][item["labels"] != -100]).strip()
        found.append(byte_tokenizer().decode(item["input_ids"]).index(answer))
    assert min(found) > 100 and near.kind(0) == "passkey"
    # The last token reads nothing but what is asked.
    short = TrainingWindows(CORPUS, byte_tokenizer(), recipe, heads=4, own=(2, 2))
    assert len(short.depths(401)) == 1
