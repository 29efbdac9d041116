"""The command line: what `longspan eval` prints and writes, how it refuses, and how it leaves."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
from rich.console import Console
from tiny import byte_tokenizer, llama

from longspan.cli.eval import parse_measures
from longspan.cli.lengths import parse_length, parse_lengths
from longspan.cli.output import check_output
from longspan.cli.progress import Progress
from longspan.errors import InputError
from longspan.evaluate.evaluation import GROUPS, MEASURES
from longspan.evaluate.task import TASKS

QUICK = ["--lengths", "128,256", "--stride", "64", "--segments", "2", "--depths", "0,1", "--trials", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "novel.txt"
    file.write_text("Some text to read on and on.\n" * 200)
    return str(file)


def test_eval_prints_a_table_and_writes_figures_and_curves(run, model, text, tmp_path):
    figures, curves = tmp_path / "figures.json", tmp_path / "curves.png"
    code, out, err = run("eval", model, model, "--text", text, *QUICK, "--json", figures, "--picture", curves)
    assert code == 0
    assert "Perplexity by context length (the last 64 tokens of 2 windows)" in out
    assert "Passkeys retrieved by length (of 2 prompts)" in out
    assert f"text: {text}, 1 held-out document" in out
    assert out.endswith(f"figures in {figures}\ncurves in {curves}\n")
    saved = json.loads(figures.read_text())
    assert saved["protocol"]["lengths"] == [128, 256]
    first, second = saved["models"]
    assert first["source"] == second["source"] == model
    assert first["perplexity"] == second["perplexity"]
    assert curves.read_bytes().startswith(b"\x89PNG")
    # Off a terminal every task ends with a plain line.
    assert [line.split(", ")[1].split(" tokens")[0] for line in err.splitlines()] == [
        "perplexity: 768 of 768",
        "passkey: 768 of 768",
    ] * 2


def test_a_pattern_takes_the_place_of_dense_attention(run, model, text):
    def losses(*arguments):
        code, out, _ = run("eval", model, "--text", text, *QUICK, *arguments)
        assert code == 0
        return out

    dense, causal, narrow = losses(), losses("--pattern", "Causal()"), losses("--pattern", "SlidingWindow(8)")
    assert causal.replace("attention: Causal()\n", "") == dense
    assert narrow.splitlines()[4] != dense.splitlines()[4]
    assert "attention: SlidingWindow(8)" in narrow


def test_the_dtype_asked_for_is_computed_in(run, model, text, tmp_path):
    """Without it, float32 on the CPU."""
    found = {}
    for asked in ([], ["--dtype", "bfloat16"]):
        code, _, err = run("eval", model, "--text", text, *QUICK, "--json", tmp_path / "f.json", *asked)
        assert code == 0, err
        [one] = json.loads((tmp_path / "f.json").read_text())["models"]
        found[one["dtype"]] = one["loss"]["128"]
    assert set(found) == {"float32", "bfloat16"}
    assert found["float32"] != found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)
    code, _, err = run("eval", model, "--text", text, *QUICK, "--dtype", "half")
    assert code == 2 and err.splitlines()[-1] == "  try    one of float32, bfloat16, float16"


def test_the_tasks_asked_for_go_into_a_report(run, model, text, tmp_path):
    pages = [tmp_path / "report.html", tmp_path / "report.md"]
    asked = ["eval", model, "--text", text, "--lengths", "256", "--depths", "1", "--trials", "1"]
    for page in pages:
        code, out, err = run(
            *asked, "--tasks", "needle,speed", "--pattern", "SlidingWindow(8)", "--report", page
        )
        assert code == 0
        assert out.endswith(f"report in {page}\n") and "Perplexity" not in out
        assert "Answers found by length (of 1 prompts for each task)" in out
        assert [line.split(":")[0] for line in err.splitlines()] == ["tiny, needle", "tiny, speed"]
        written = page.read_text()
        assert "Which keys each query reads" in written and "tiny as measured, 256 tokens" in written
        assert f"longspan eval {model} --text {text} --lengths 256" in written


def test_a_report_draws_the_pattern_that_a_recipe_beside_the_model_names(run, model, text, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(model, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text("length: 128\npattern: SlidingWindow({1/4})\n")
    page = tmp_path / "report.md"
    asked = ["eval", folder, "--text", text, *QUICK, "--tasks", "speed", "--report", page]
    assert run(*asked)[0] == 0
    assert "trained while training, 128 tokens" in page.read_text()
    assert "Plan\n" in page.read_text() and "SlidingWindow(32)" in page.read_text()
    recipe.write_text("length: [1\n")
    page.unlink()
    code, out, err = run(*asked)
    assert (code, out) == (2, "") and err.startswith("The file of settings cannot be read.\n  asked")
    assert not page.exists()


def refused(problem, *arguments):
    return pytest.param(arguments, problem, id=problem)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        refused("There is no such file or folder.", "--text", "missing.txt"),
        refused("A text file is empty.", "--text", "EMPTY"),
        refused("A file holds binary data instead of text.", "--text", sys.executable),
        refused("There is too little text for one window.", "--lengths", "128,4k"),
        refused("This is not a length.", "--lengths", "128,4q"),
        refused("This is not a depth.", "--depths", "0,2"),
        refused("A context must be longer than the tokens it predicts.", "--stride", "128"),
        refused("A length is too short for a passkey prompt.", "--lengths", "100"),
        refused("There is no pattern called SlidingWindo.", "--pattern", "SlidingWindo(8)"),
        refused("There is no such device.", "--device", "abacus"),
        refused("A file of this kind cannot be written.", "--picture", "curves.bmp"),
        refused("A file cannot be written.", "--json", "no/such/folder/figures.json"),
        refused("A file of this kind cannot be written.", "--report", "report.pdf"),
        refused("A file cannot be written.", "--report", "/proc/report.html"),
        refused("There is no task called 'neddle'.", "--tasks", "perplexity,neddle"),
        refused("A length is too short for this task.", "--tasks", "variables"),
        refused("A picture shows perplexity and passkeys.", "--tasks", "speed", "--picture", "curves.png"),
    ],
)
def test_bad_input_gets_one_message_and_code_2(run, model, text, tmp_path, arguments, problem):
    empty = tmp_path / "empty.txt"
    empty.touch()
    arguments = [str(empty) if part == "EMPTY" else part for part in arguments]
    code, out, err = run("eval", model, "--text", text, *QUICK, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(problem + "\n  asked")
    assert "Traceback" not in err


def test_a_missing_model_is_refused_before_any_work(run, text, tmp_path):
    code, out, err = run("eval", tmp_path / "none", "--text", text)
    assert (code, out) == (2, "")
    assert err.startswith("There is no model folder at this path.\n")


def test_a_mistyped_option_or_command_is_answered_with_the_likely_one(run):
    code, _, err = run("eval", "--length", "4k")
    assert code == 2 and "No such option: --length" in err and "--lengths" in err
    code, _, err = run("evl")
    assert code == 2 and "No such command 'evl'. Did you mean 'eval'?" in err


def test_control_c_leaves_with_code_130(run, model, text, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("longspan.evaluate.evaluation.evaluate", interrupted)
    code, _, err = run("eval", model, "--text", text, *QUICK)
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "length"), [("512", 512), ("4k", 4096), (" 128K ", 131072), ("1m", 1 << 20), ("16_384", 16384)]
)
def test_lengths_are_read_as_people_write_them(text, length):
    assert parse_length(text) == length


@pytest.mark.parametrize("text", ["", "0", "-1", "4.5k", "k", "4kb", "four"])
def test_what_is_not_a_length_is_refused(text):
    with pytest.raises(InputError) as refusal:
        parse_lengths(f"512,{text}")
    assert str(refusal.value) == (
        "This is not a length.\n"
        f"  asked   a length of {text!r}\n"
        "  wanted  a positive number of tokens, with k or m\n"
        "  try     4096, or 4k"
    )


def test_what_is_not_a_depth_is_refused(run, model, text):
    _, _, err = run("eval", model, "--text", text, "--depths", "0, half")
    assert err == (
        "This is not a depth.\n"
        "  asked   a depth of 'half'\n"
        "  wanted  0 (the beginning) to 1 (the end)\n"
        "  try     --depths 0,0.5,1\n"
    )


def test_an_unknown_task_is_answered_with_the_likely_one(run, model, text):
    known = ", ".join([*MEASURES, *GROUPS])
    for asked, likely in [
        ("neddle", "needle"),
        ("common-word", "common-words"),
        ("ppl", "some of these, between commas"),
        ("", "some of these, between commas"),
    ]:
        _, _, err = run("eval", model, "--text", text, "--tasks", f"speed,{asked}")
        assert err == (
            f"There is no task called {asked!r}.\n"
            f"  asked      --tasks speed,{asked}\n"
            f"  there are  {known}\n"
            f"  try        {likely}\n"
        )


def test_groups_stand_for_several_measures():
    assert parse_measures("ruler", MEASURES, GROUPS) == TASKS
    assert parse_measures("speed, ALL", MEASURES, GROUPS) == MEASURES
    assert parse_measures("speed,perplexity", MEASURES, GROUPS) == ("perplexity", "speed")


def test_checking_an_output_leaves_no_trace(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    for path in (new, old):
        check_output(path, (".json",))
    assert not new.exists() and old.read_text() == "kept"


def test_outputs_that_cannot_be_written_are_refused(run, model, text, tmp_path):
    _, _, err = run("eval", model, "--text", text, "--picture", "curves.bmp")
    assert err == (
        "A file of this kind cannot be written.\n"
        "  asked   to write 'curves.bmp'\n"
        "  wanted  a name that ends in .png or .svg or .pdf\n"
        "  try     curves.png\n"
    )
    (tmp_path / "folder.json").mkdir()
    for path, reason in [
        (tmp_path / "none" / "a.json", f"there is no folder '{tmp_path}/none'"),
        (tmp_path / "folder.json", "it is a folder"),
    ]:
        _, _, err = run("eval", model, "--text", text, "--json", path)
        assert err == (
            f"A file cannot be written.\n  asked    to write '{path}'\n  because  {reason}\n  try      another path\n"
        )


def test_progress_off_a_terminal_is_a_line_now_and_then_and_at_the_end():
    written = io.StringIO()
    seconds = iter([0.0, 4.0, 11.0, 15.0, 20.0])
    with Progress(Console(file=written), clock=seconds.__next__) as progress:
        task = progress.task("training", done=1000)
        task(2000, 6000, loss=4.0)
        task(3200, 6000, loss=3.0)
        task(4000, 6000, loss=2.5)
        task(6000, 6000, loss=2.25, length="4,096")
        progress.note("saved [here]")
    assert written.getvalue() == (
        "training: 3,200 of 6,000 tokens, loss 3.000, 200 tokens/s, 0:14 left\n"
        "training: 6,000 of 6,000 tokens, loss 2.250, length 4,096, 250 tokens/s, took 0:20\n"
        "saved [here]\n"
    )


def test_progress_on_a_terminal_is_a_bar():
    written = io.StringIO()
    seconds = iter([0.0, 10.0])
    console = Console(file=written, force_terminal=True, width=100)
    with Progress(console, clock=seconds.__next__) as progress:
        progress.task("training")(500, 1000, loss=2.5)
    assert "50%" in written.getvalue()
    assert "loss 2.500, 50 tokens/s, 0:10 left" in written.getvalue()
