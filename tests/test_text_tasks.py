"""Prompts of tasks: what is hidden, where, that the answer fits, and what counts as an answer."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from tiny import byte_tokenizer

from longspan.errors import InputError
from longspan.text.corpus import Corpus
from longspan.text.needle import multikey, multiquery, multivalue, needle
from longspan.text.prompt import Prompt
from longspan.text.variable import variables
from longspan.text.wordlist import common_words, frequent_words
from longspan.text.words import words

TOKENIZER = byte_tokenizer()
TEXT = Corpus.from_ids([TOKENIZER("some text to hide in, " * 400, verbose=False)["input_ids"]], separator=256)
HIDDEN = {"needle": needle, "multikey": multikey, "multivalue": multivalue, "multiquery": multiquery}
WOVEN = HIDDEN | {"variables": variables}


def drawn(task, length=600, seed=0, **options):
    return task(TOKENIZER, TEXT, length=length, rng=np.random.default_rng(seed), **options)


def listed(task, length, seed=0):
    prompt = task(TOKENIZER, length=length, rng=np.random.default_rng(seed))
    return prompt, TOKENIZER.decode(prompt.ids).split("\n")[0].split()


@pytest.mark.parametrize("length", [449, 600, 1027])
@pytest.mark.parametrize("task", WOVEN.values(), ids=WOVEN)
def test_prompt_and_answer_fill_the_length(task, length):
    for seed in range(8):
        prompt = drawn(task, length, seed)
        assert len(prompt.ids) + prompt.budget == length
        answer = TOKENIZER(" " + ", ".join(prompt.answers))["input_ids"]
        assert len(answer) * 1.25 < prompt.budget < len(answer) * 2
        assert prompt.ids.dtype == np.int64


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [(needle, 1, 1), (multikey, 4, 1), (multivalue, 4, 4), (multiquery, 4, 4)],
    ids=HIDDEN,
)
def test_needles_answer_the_question(task, needles, answers):
    for seed in range(8):
        prompt = drawn(task, seed=seed)
        shown = TOKENIZER.decode(prompt.ids)
        text, question = shown.rsplit("\n", 1)
        hidden = re.findall(r"\nA magic number of (\w{6}) is (\d{7})\.\n", text)
        assert len(hidden) == needles and len(prompt.answers) == answers
        asked = set(re.findall(r"\b[a-z]{6}\b", question)) & {name for name, _ in hidden}
        assert sorted(value for name, value in hidden if name in asked) == sorted(prompt.answers)


def test_a_needle_stands_at_its_depth():
    for depth in (0, 0.25, 0.5, 1):
        text = TOKENIZER.decode(drawn(needle, 1200, depth=depth).ids)
        begin, end = text.index("\nA magic"), text.index("\nWhat is")
        before = begin - len("Magic numbers are hidden in the text below. Remember them.\n")
        after = end - begin - len("\nA magic number of ...... is 1234567.\n")
        assert before == pytest.approx(depth * (before + after), abs=1)


def test_the_chain_of_variables_leads_from_the_value_to_every_name():
    for seed in range(8):
        prompt = drawn(variables, seed=seed)
        text = TOKENIZER.decode(prompt.ids)
        steps = re.findall(r"\nVAR ([A-Z]{6}) = (?:VAR )?(\w+)\n", text)
        (value,) = re.findall(r"have the value (\d{5})\?", text)
        for name, source in steps:
            assert source == value
            value = name
        assert [name for name, _ in steps] == list(prompt.answers) and len(steps) == 5


@pytest.mark.parametrize(
    ("length", "common", "often", "others"), [(500, 5, 8, {1}), (9000, 10, 30, {1, 2, 3})]
)
def test_common_words_are_the_most_frequent(length, common, often, others):
    prompt, entries = listed(common_words, length)
    counts = Counter(entries)
    assert {counts[word] for word in prompt.answers} == {often} and len(prompt.answers) == common
    rest = Counter(counts[word] for word in counts if word not in prompt.answers)
    assert set(rest) <= others and rest[max(others)] > 5
    # Three times each, but for the last, which may be cut off.
    assert sum(count for times, count in rest.items() if times != max(others)) <= 1
    assert 0.97 * length < len(prompt.ids) + prompt.budget <= length


@pytest.mark.parametrize("length", [450, 1024, 5000])
def test_frequent_words_follow_a_zeta_distribution(length):
    prompt, entries = listed(frequent_words, length)
    ranked = Counter(entries).most_common()
    assert [word for word, _ in ranked[:3]] == list(prompt.answers)
    counts = [count for _, count in ranked]
    assert counts[0] > counts[1] > counts[2] > counts[3]
    for rank in (1, 2, 3):
        assert counts[rank - 1] == int(len(entries) * rank**-2 * 6 / np.pi**2)
    assert 0.97 * length < len(prompt.ids) + prompt.budget <= length
    # They are not sorted.
    assert entries != sorted(entries, key=entries.index)


@pytest.mark.parametrize("task", [*WOVEN.values(), common_words, frequent_words])
def test_what_has_no_room_is_refused(task):
    options = {} if task in (common_words, frequent_words) else {"filler": TEXT}
    with pytest.raises(InputError) as refusal:
        task(TOKENIZER, length=40, rng=np.random.default_rng(0), **options)
    needed = re.search(r"needs  (\d+) tokens", str(refusal.value))[1]
    assert str(refusal.value) == (
        "A length is too short for this task.\n"
        "  asked  a prompt of 40 tokens\n"
        f"  needs  {needed} tokens before any text around it\n"
        f"  try    lengths well above {needed}, or other tasks"
    )


def test_answers_count_as_whole_words_in_any_order():
    prompt = Prompt(np.arange(3), ("1234567", "7654321"), 20)
    assert prompt.score("7654321, 1234567.") == 1
    assert prompt.score(" 1234567 1234567") == 0.5
    assert prompt.score("12345678 x7654321") == 0


def test_words_are_all_different():
    drawn = words(np.random.default_rng(0), 20000)
    assert len(set(drawn)) == 20000 and {len(word) for word in drawn} == {6}
