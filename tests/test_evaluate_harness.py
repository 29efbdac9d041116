"""The adapter for lm-eval: by it, lm-eval's own tasks run with patterns, without a network. How it is refused without lm-eval."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, llama

from longspan.evaluate import harness
from longspan.hf import load_model, set_pattern
from longspan.pattern import Streaming, parse

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
import nltk
import wonderwords
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

# Tokens of an answer.
WRITTEN = 12
TASKS = Path(lm_eval.__file__).parent / "tasks"


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(SystemExit) as leaving:
        harness.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "lm-eval is not installed.",
        "  asked    its tasks, such as RULER and LongBench",
        "  because  import of lm_eval.api.registry halted; None in sys.modules",
        '  try      pip install "lm_eval[hf,ruler,longbench]"',
    ]


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def measured(folder):
    """Return a function that runs one task of a folder of tasks and returns what lm-eval found."""

    def measured(task, tasks, *, metadata=None, limit=None, **arguments):
        harness.register()
        given = {"pretrained": folder, **arguments}
        return lm_eval.simple_evaluate(
            model="longspan",
            model_args=given,
            tasks=[task],
            task_manager=TaskManager(
                include_path=str(tasks), include_defaults=False, metadata=given | (metadata or {})
            ),
            device="cpu",
            batch_size=1,
            limit=limit,
            gen_kwargs={"max_gen_toks": WRITTEN},
            bootstrap_iters=0,
        )

    return measured


def test_a_local_task_runs_with_a_pattern(measured, tmp_path):
    lines = [json.dumps({"text": "Some text to read. " * number}) for number in (3, 9)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\ntest_split: train\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: byte_perplexity\n    higher_is_better: false\n"
    )

    def perplexity(**arguments):
        found = measured("local", tmp_path / "tasks", **arguments)
        return found["results"]["local"]["byte_perplexity,none"]

    dense = perplexity()
    assert perplexity(pattern="Causal()") == pytest.approx(dense, rel=1e-5)
    assert perplexity(pattern="SlidingWindow(4)") != pytest.approx(dense, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher:UserWarning")
# Python warns of another one where no installer has compiled it.
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_the_commands_of_the_readme_name_what_there_is(monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^python -m longspan\.evaluate\.harness (.*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 2
    there = TaskManager(include_path=[str(TASKS / "ruler"), str(TASKS / "longbench")], include_defaults=False)
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["lm-eval", *shlex.split(command)])
        asked = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
        assert asked.model == harness.NAME and set(asked.tasks) <= set(there.all_groups)
        arguments = dict(asked.model_args)
        assert arguments.pop("pretrained") == "out/longer"
        if asked.tasks == ["ruler"]:
            # Each of a prompt's tokens fits, and those that open the answer and are not counted.
            assert arguments["max_length"] > max(asked.metadata["max_seq_lengths"])
        else:
            assert parse(arguments["pattern"]) == Streaming(1020, sinks=4)


def written(folder, prompt):
    """Return what the model writes after a prompt that it reads by a pattern, asked without lm-eval."""
    model, tokenizer = load_model(folder)
    set_pattern(model, Streaming(12, sinks=4))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=WRITTEN, do_sample=False)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_task_of_ruler_is_asked_at_the_length_named_and_answered_by_the_pattern(
    folder, measured, monkeypatch
):
    # What splits essays would be fetched; this task has none. All pairs of words take a gigabyte and half a minute.
    monkeypatch.setattr(nltk, "download", lambda name: True)
    words = {"nouns": ["king", "tale"], "adjectives": ["old", "long"], "verbs": ["read"]}
    monkeypatch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=words))
    found = measured(
        "niah_single_1",
        TASKS / "ruler",
        metadata={"max_seq_lengths": [640]},
        pattern="Streaming(12, sinks=4)",
        max_length=1024,
        limit=1,
    )
    assert found["results"]["niah_single_1"]["640,none"] == 0
    [sample] = found["samples"]["niah_single_1"]
    prompt = sample["arguments"][0][0]
    # No letter of it is cut off, so that the needle is there.
    assert len(prompt) <= 640 and sample["doc"]["outputs"][0] in prompt
    assert sample["resps"] == [[written(folder, prompt)]]


# The package that compares texts asks for a faster one.
@pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher:UserWarning")
# Python warns of another one where no installer has compiled it.
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_a_task_of_longbench_runs_on_data_of_its_form(folder, measured, tmp_path):
    line = {"context": "A tale of a king. " * 40, "question": "Who is it about?", "answers": ["a king"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    (tmp_path / "tasks").mkdir()
    # Everything but where the data lies is the task's own.
    (tmp_path / "tasks" / "local.yaml").write_text(
        f"include: {TASKS}/longbench/qasper.yaml\ntag: null\ntask: local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\ntest_split: train\n"
    )
    found = measured("local", tmp_path / "tasks", pattern="Streaming(12, sinks=4)", max_length=2048)
    assert found["results"]["local"]["score,none"] == 0
    [sample] = found["samples"]["local"]
    prompt = sample["arguments"][0][0]
    assert line["context"] in prompt
    assert sample["resps"] == [[written(folder, prompt)]]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"pattern": "SlidingWindo(4)"}, "There is no pattern called SlidingWindo."),
        ({"dtype": "float8"}, "There is no such dtype for a model."),
        ({"pretrained": "no/such/folder"}, "There is no model folder at this path."),
        ({"device": "cuda:99"}, "There is no such device."),
    ],
)
def test_bad_arguments_get_a_message(folder, arguments, problem):
    with pytest.raises(Exception, match=problem):
        harness.register()(**({"pretrained": folder} | arguments))


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_the_device_that_nobody_asked_for_is_one_that_is_there(folder, device):
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert harness.register()(pretrained=folder, device=device).device.type == there
