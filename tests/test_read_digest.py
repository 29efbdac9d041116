"""Digests: which tokens a model is given in every round, and that rounds end."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from tiny import byte_tokenizer, llama

from longspan.errors import InputError
from longspan.evaluate import digest as module
from longspan.evaluate.digest import digest

TEXT = "".join(f"{number:03} " for number in range(100))
ASKED = "\n\nQuestion: Q?\nAnswer:"


@pytest.fixture
def prompts(monkeypatch):
    """Replace what a model writes by the first four letters of the prompt, and keep the prompts."""
    tokenizer, seen = byte_tokenizer(), []

    def written(model, rows, budgets):
        texts = [tokenizer.decode(row.tolist()) for row in rows]
        seen.append(texts)
        return [
            tokenizer(text[:4])["input_ids"][:budget] for text, budget in zip(texts, budgets, strict=True)
        ]

    monkeypatch.setattr(module, "written", written)
    return seen


@pytest.mark.parametrize(("chunk", "overlap"), [(40, 0), (40, 8), (100, 99), (33, 1), (1000, 0)])
def test_chunks_cover_the_text_and_overlap(prompts, chunk, overlap):
    found = digest(
        llama(positions=2000), byte_tokenizer(), TEXT, "Q?", chunk=chunk, overlap=overlap, budget=4
    )
    parts = [prompt.removesuffix(ASKED) for prompt in prompts[0]]
    assert all(prompt.endswith(ASKED) for prompts_of_round in prompts for prompt in prompts_of_round)
    joined = parts[0]
    for before, part in pairwise(parts):
        assert len(before) == chunk and before[chunk - overlap :] == part[:overlap]
        assert len(part) > overlap
        joined += part[overlap:]
    assert joined == TEXT
    assert found.answer == "000" and len(found.rounds[-1]) == 1


def test_answers_are_joined_in_order_until_they_fit(prompts):
    found = digest(llama(positions=2000), byte_tokenizer(), TEXT, "Q?", chunk=40, budget=4)
    assert [len(answers) for answers in found.rounds] == [10, 1]
    assert prompts[1][0] == "".join(f"{number:03}\n" for number in range(0, 100, 10)) + ASKED
    found = digest(llama(positions=2000), byte_tokenizer(), TEXT, "Q?", chunk=10, budget=4)
    assert [len(answers) for answers in found.rounds] == [40, 20, 10, 5, 3, 2, 1]


def test_a_model_answers():
    model, tokenizer = llama(positions=96), byte_tokenizer(opening=True)
    found = digest(model, tokenizer, TEXT, "Q?", overlap=5, budget=6)
    assert found.rounds[-1] == (found.answer,) and len(found.rounds[0]) > 4
    # The same by hand, for a text of one chunk: nothing but the text, the question, and greedy decoding.
    row = torch.tensor([[256, *tokenizer(TEXT[:20] + ASKED, add_special_tokens=False)["input_ids"]]])
    options = {
        "attention_mask": torch.ones_like(row),
        "do_sample": False,
        "max_new_tokens": 6,
        "pad_token_id": 256,
    }
    wanted = model.generate(row, **options)[0, row.shape[1] :]
    said = " ".join(tokenizer.decode(wanted, skip_special_tokens=True).split("\nQuestion:")[0].split())
    assert digest(model, tokenizer, TEXT[:20], "Q?", budget=6).answer == said


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        (" \n", {}, "There is no text"),
        (TEXT, {"chunk": 9, "budget": 4}, "must hold two answers"),
        (TEXT, {"chunk": 0}, "must hold two answers"),
        (TEXT, {"chunk": 40, "budget": 0}, "must hold two answers"),
        (TEXT, {"chunk": 40, "budget": 4, "overlap": 40}, "overlap by less"),
        (TEXT, {"chunk": 40, "budget": 4, "overlap": -1}, "overlap by less"),
        (TEXT, {"chunk": 250, "budget": 4}, "cannot read a chunk"),
    ],
)
def test_bad_input_is_refused(text, options, problem):
    with pytest.raises(InputError, match=problem):
        digest(llama(), byte_tokenizer(), text, "Q?", **options)


def test_the_command_merges_until_one_answer_is_left(run, tmp_path):
    """The model of the package itself, on a text of eight chunks."""
    text, figures = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("def read(file):\n    return file\n" * 80)
    options = ("--question", "What is read?", "--chunk", "340", "--overlap", "20", "--answer", "12")
    code, out, err = run("digest", text, *options, "--json", figures)
    assert code == 0, err
    saved = json.loads(figures.read_text())
    assert [len(answers) for answers in saved["rounds"]] == [8, 1]
    assert saved["rounds"][-1] == [saved["answer"]] and saved["question"] == "What is read?"
    assert "text.txt: 8, then 1 answers" in out and "What is read?" in out
    assert err.splitlines()[0].startswith("round 1: 2,700 of 2,700 tokens")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--chunk", "9"), "A chunk must hold two answers, or rounds would never end."),
        (("--chunk", "340", "--overlap", "340"), "Chunks overlap by less than their size."),
        (("--chunk", "600"), "The model cannot read a chunk, the question and its answer together."),
        (("--model", "no/such/folder"), "There is no model folder at this path."),
        (("--json", "figures.txt"), "A file of this kind cannot be written."),
    ],
)
def test_the_command_refuses_with_one_message_and_code_2(run, tmp_path, options, problem):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    code, out, err = run("digest", text, *options)
    assert (code, out) == (2, "") and err.startswith(problem) and "\n  try " in err
