"""Tasks: models that write the right answer, half of it or none, decoding, and the effective length."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, llama
from transformers import GPT2Config, GPT2LMHeadModel

from longspan.errors import InputError
from longspan.evaluate.evaluation import MEASURES, Protocol, check, evaluate
from longspan.evaluate.forward import check_positions, written
from longspan.evaluate.speed import speed
from longspan.evaluate.task import TASKS, THRESHOLD, Scores, drawn, effective_length, means, scores
from longspan.text.corpus import Corpus

TOKENIZER = byte_tokenizer()
TEXT = Corpus.from_ids([TOKENIZER("some text to hide in, " * 400, verbose=False)["input_ids"]], separator=256)
OPTIONS = {"lengths": [600, 460], "depths": [0.0, 1.0], "trials": 2, "seed": 3}


class Writer:
    """A model that writes what it is told for each prompt, and remembers the prompts."""

    def __init__(self, answer) -> None:
        self.answer, self.seen = answer, []
        self.device, self.training = torch.device("cpu"), True
        self.generation_config = SimpleNamespace(pad_token_id=256, eos_token_id=256)

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(self, ids, *, max_new_tokens, do_sample, attention_mask, **_):
        assert not self.training and not do_sample and attention_mask.all()
        rows = []
        for row in ids:
            self.seen.append(row)
            said = TOKENIZER(self.answer(TOKENIZER.decode(row)))["input_ids"][:max_new_tokens]
            rows.append([*row.tolist(), *said, *[256] * (max_new_tokens - len(said))])
        return torch.tensor(rows)


@pytest.mark.parametrize("task", TASKS)
def test_right_half_right_and_wrong_answers(task):
    known = {}
    for length in (460, 600):
        for prompt in drawn(TOKENIZER, TEXT, task, length=length, depths=(0.0, 1.0), trials=2, seed=3):
            known[TOKENIZER.decode(prompt.ids)] = prompt.answers
    right = scores(Writer(lambda text: " " + ", ".join(known[text])), TOKENIZER, TEXT, task, **OPTIONS)
    assert right.lengths == (460, 600) and right.by_length == (1.0, 1.0) and right.prompts == 4
    assert right.depths == ((0.0, 1.0) if task == "needle" else ())
    part = scores(Writer(lambda text: " " + known[text][0]), TOKENIZER, TEXT, task, **OPTIONS)
    answers = {len(answers) for answers in known.values()}
    assert part.by_length == pytest.approx([1 / answers.pop()] * 2)
    wrong = scores(Writer(lambda text: " nothing"), TOKENIZER, TEXT, task, **OPTIONS)
    assert wrong.by_length == (0.0, 0.0)


def test_shares_of_a_needle_belong_to_their_depth():
    def late(text):
        value = text.split(" is ")[1][:7]
        return value if text.index(value) > 100 else ""

    found = scores(Writer(late), TOKENIZER, TEXT, "needle", **OPTIONS)
    assert found.shares == ((0.0, 1.0), (0.0, 1.0))


def test_prompts_depend_on_nothing_else_measured():
    def seen(**options):
        model = Writer(lambda text: "")
        scores(model, TOKENIZER, TEXT, "multikey", **(OPTIONS | options))
        assert model.training
        return [row.tolist() for row in model.seen]

    assert seen(lengths=[600]) == seen()[4:] == seen(lengths=[600, 700])[:4]
    assert seen(lengths=[600]) != seen(lengths=[600], seed=4)


def test_greedy_decoding_with_a_cache_equals_a_plain_loop():
    model = llama()
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, size) for size in (31, 31, 31, 40, 31)]
    budgets = [9, 9, 4, 9, 9]
    for row, budget, found in zip(rows, budgets, written(model, rows, budgets), strict=True):
        ids = torch.from_numpy(row)[None]
        expected = []
        with torch.no_grad():
            while len(expected) < budget and 256 not in expected:
                expected.append(int(model(ids).logits[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
        assert found[: len(expected)] == expected and set(found[len(expected) :]) <= {256}


def found(task, *shares):
    lengths = tuple(512 << number for number in range(len(shares)))
    return Scores(task, lengths, (), tuple((share,) for share in shares), prompts=4, seed=0)


@pytest.mark.parametrize(
    ("shares", "length"),
    [
        (([1, 1, 1], [1, 0.8, 0.7]), 1024),
        (([0.856, 0.856, 0.855], [0.856, 0.856, 0.855]), 1024),
        (([1, 0.5, 1], [1, 0.5, 1]), 512),
        (([0.8, 1, 1], [0.9, 1, 1]), None),
        (([1, 1, 1], [1, 1, 1]), 2048),
    ],
)
def test_the_effective_length_is_where_the_mean_stays_at_the_threshold(shares, length):
    tasks = [found("needle", *shares[0]), found("variables", *shares[1])]
    assert THRESHOLD == 0.856
    assert effective_length(tasks) == length
    assert means(tasks) == pytest.approx(np.mean(shares, axis=0))


def test_speed_counts_keys_and_values_exactly():
    model = llama(positions=512).train()
    heard = []
    measured = speed(model, TEXT, lengths=[129, 64], progress=lambda *so_far: heard.append(so_far))
    assert model.training
    assert measured.lengths == (64, 129)
    # Two layers of two key heads of width 8, keys and values, four bytes each; before anything is written.
    assert measured.cache == (64 * 2 * 2 * 8 * 2 * 4, 129 * 2 * 2 * 8 * 2 * 4)
    assert all(seconds > 0 for seconds in measured.reading + measured.writing)
    assert all(peak is None or peak > 10**7 for peak in measured.peak)
    assert measured.tokens_per_second == pytest.approx(np.divide(measured.lengths, measured.reading))
    assert measured.dtype == "float32" and measured.device.startswith("cpu, ")
    assert heard[-1] == (4 * 193, 4 * 193)


def test_an_evaluation_measures_what_is_asked_for_and_no_more():
    parts = []
    protocol = Protocol(
        lengths=(460, 512), depths=(0.0,), trials=1, measures=("variables", "needle", "speed")
    )

    def begin(name):
        parts.append(name)
        return lambda done, total: None

    evaluation = evaluate(
        llama(positions=512), TOKENIZER, TEXT, label="tiny", protocol=protocol, progress=begin
    )
    assert parts == ["tiny, needle", "tiny, variables", "tiny, speed"]
    assert evaluation.perplexity is None and evaluation.passkey is None
    assert [scores.task for scores in evaluation.tasks] == ["needle", "variables"]
    assert evaluation.lengths == (460, 512) and evaluation.effective_length is None
    assert evaluation.tokens == (1 + 1 + 4) * 972


def test_what_cannot_be_measured_is_refused_before_anything_is():
    model = llama()
    with pytest.raises(InputError, match=r"A length is too short for this task\."):
        check(model, TOKENIZER, TEXT, Protocol(lengths=(300, 4096), measures=("common-words",)))
    with pytest.raises(InputError, match=r"There is too little text for one window\."):
        check(model, TOKENIZER, TEXT, Protocol(lengths=(300, 1 << 20), measures=("speed",)))
    with pytest.raises(InputError) as refusal:
        check(model, TOKENIZER, TEXT, Protocol(measures=()))
    assert str(refusal.value) == (
        "There is no such measure.\n"
        "  asked      nothing\n"
        f"  there are  {', '.join(MEASURES)}\n"
        "  try        some of these"
    )


def test_a_length_beyond_a_table_of_positions_is_refused_before_anything_is_measured():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    check_positions(model, 64)
    check_positions(llama(), 10**6)
    with pytest.raises(InputError) as refusal:
        check(model, TOKENIZER, TEXT, Protocol(lengths=(65,)))
    assert str(refusal.value) == (
        "This model cannot read that many tokens.\n"
        "  asked  a window of 65 tokens\n"
        "  model  GPT2LMHeadModel has 64 positions in a table\n"
        "  try    lengths up to 64"
    )
