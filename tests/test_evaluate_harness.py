"""The adapter for lm-eval: by it, lm-eval's own tasks run with patterns. Without lm-eval, how it is refused."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from tiny import byte_tokenizer, llama

from longspan.evaluate import harness

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


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


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_runs_with_a_pattern(folder, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    harness.register()
    lines = [json.dumps({"text": "Some text to read. " * number}) for number in (3, 9)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\ntest_split: train\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: byte_perplexity\n    higher_is_better: false\n"
    )

    tasks_here = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)

    def measured(**arguments):
        found = simple_evaluate(
            model="longspan",
            model_args={"pretrained": folder, **arguments},
            tasks=["local"],
            task_manager=tasks_here,
            device="cpu",
            batch_size=2,
            bootstrap_iters=0,
        )
        return found["results"]["local"]["byte_perplexity,none"]

    dense = measured()
    assert measured(pattern="Causal()") == pytest.approx(dense, rel=1e-5)
    assert measured(pattern="SlidingWindow(4)") != pytest.approx(dense, rel=1e-3)


@needs_harness
@pytest.mark.filterwarnings("ignore")
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


@needs_harness
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_the_device_that_nobody_asked_for_is_one_that_is_there(folder, device):
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert harness.register()(pretrained=folder, device=device).device.type == there
