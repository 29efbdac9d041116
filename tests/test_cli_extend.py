"""`longspan extend` on the command line: bad input gets one message and code 2, and nothing is lost."""

from __future__ import annotations

import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from tiny import byte_tokenizer, llama
from transformers import BertConfig, BertModel

from longspan import cli
from longspan.cli.extend import described
from longspan.extend.recipe import CHOICES, FAR, NEAR, RATE, RATES, SHORTEST, STAGES, WHOLE, Recipe

# Of a recipe, what has no number or word of its own by default.
SAID_IN_WORDS = {"model", "text", "column", "window", "stages", "rate", *NEAR}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama(positions=64).save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    llama(positions=64, vocabulary=100).save_pretrained(folder / "foreign")
    byte_tokenizer().save_pretrained(folder / "foreign")
    small = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(small).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def place(tmp_path):
    (tmp_path / "novel.txt").write_text("It was the best of times.\n" * 400)
    (tmp_path / "short.txt").write_text("It was the worst of times.\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"text\0more")
    (tmp_path / "unknown.yaml").write_text("stepps: 10\n")
    (tmp_path / "list.yaml").write_text("- steps\n- 10\n")
    (tmp_path / "kind.yaml").write_text("steps: many\n")
    (tmp_path / "place.yaml").write_text("output: 7\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    return tmp_path


def refused(problem, *arguments):
    return pytest.param(arguments, problem, id=problem)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        refused("There is no such file or folder.", "--text", "{place}/missing.txt"),
        refused("A text file is empty.", "--text", "{place}/empty.txt"),
        refused("A file holds binary data instead of text.", "--text", "{place}/binary.txt"),
        refused("There is too little text for one window.", "--text", "{place}/short.txt"),
        refused("There is no pattern called LongMixt.", "--pattern", "LongMixt(64)"),
        refused("This text is no pattern.", "--pattern", "LongMixed(64, dilaton=2)"),
        refused("The new length is not longer than the model's own.", "--length", "32"),
        refused("The output folder is not empty.", "--output", "{place}/full"),
        refused("No RoPE scaling has this name.", "--rope", "yarm"),
        refused("This model is not a causal language model.", "{models}/bert"),
        refused("There is no model folder at this path.", "{place}/none"),
        refused("This is not a length.", "--length", "long"),
        refused("An option of the recipe is out of range.", "--steps", "0"),
        refused(
            "The heads cannot be divided equally", "--pattern", "PerHead([Causal(), Causal(), Causal()])"
        ),
        refused("There is no run to resume in this folder.", "--resume"),
        refused("There is no such setting.", "--config", "{place}/unknown.yaml"),
        refused("The file of settings cannot be read.", "--config", "{place}/missing.yaml"),
        refused("The file of settings cannot be read.", "--config", "{place}/list.yaml"),
        refused("An option of the recipe is out of range.", "--config", "{place}/kind.yaml"),
        refused("A setting is out of range.", "--config", "{place}/place.yaml"),
        refused("The tokenizer does not belong to this model.", "{models}/foreign"),
        refused("An option of the recipe has no such choice.", "--method", "lora-plus"),
        refused("A sequence of patterns needs one for each", "--pattern", "Causal(); Window(4); Window(8)"),
        refused("This text is no pattern.", "--pattern", "Window({{1/0}})"),
    ],
)
def test_bad_input_gets_one_message_and_code_2(run, models, place, arguments, problem):
    given = [part.format(place=place, models=models) for part in arguments]
    if "--resume" not in given:
        named = given[0].startswith("--")
        given = [*([str(models / "tiny")] if named else []), *given]
        for option, value in (("--length", 256), ("--text", place / "novel.txt")):
            if option not in given:
                given += [option, str(value)]
    if "--output" not in given:
        given += ["--output", str(place / "out")]
    code, out, err = run("extend", *given)
    assert (code, out) == (2, "")
    told = [line for line in err.splitlines() if not line.startswith("extending ")]
    assert told[0].startswith(problem)
    assert any(line.startswith("  try") for line in told) and "Traceback" not in err
    assert [path.name for path in (place / "full").iterdir()] == ["thesis.txt"]
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["extend", "eval", "read"])
def test_what_does_not_go_together_or_fit_is_refused(run, models, place, command, monkeypatch):
    """A tokenizer of another model, and weights that no memory holds: before any work, by every command."""
    model, text = [models / "foreign"], ["--text", place / "novel.txt"]
    if command == "read":
        model, text = ["--model", *model], [place / "novel.txt"]
    options = {"extend": ["--length", 256, "--output", place / "out"], "eval": ["--lengths", "256,512"]}
    asked = [command, *model, *text, *options.get(command, [])]
    code, out, err = run(*asked)
    assert (code, out) == (2, "")
    assert err.partition("The tokenizer")[2].splitlines() == [
        " does not belong to this model.",
        "  model      LlamaForCausalLM with embeddings of 100 tokens",
        # The end token, which is not put after a text that is read on.
        f"  tokenizer  writes this text with token {220 if command == 'read' else 256}",
        "  try        the tokenizer that the model was trained with, in the model's folder",
    ]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    code, out, err = run(*asked)
    assert (code, out) == (2, "")
    if command == "extend":
        assert "This recipe does not fit into memory.\n  needs     memory " in err
    else:
        assert err.splitlines() == [
            "This model does not fit into memory.",
            f"  model     {models}/foreign",
            "  needs     87.7 kB for its weights in float32",
            "  there is  1.0 kB on cpu",
            "  try       a smaller model, or a machine with more memory",
        ]


def test_an_unknown_setting_gets_the_nearest_known_one(run, place):
    code, out, err = run("extend", "--config", place / "unknown.yaml")
    assert (code, out) == (2, "")
    assert err.splitlines()[1] == f"  asked  stepps in {place}/unknown.yaml"
    assert err.splitlines()[-1] == "  try    steps"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_file_of_settings_repeats_a_run(run, models, place):
    """Every option by a file; the command line wins; what is saved beside the result gives it again."""
    settings = {
        "model": str(models / "tiny"),
        "text": str(place / "novel.txt"),
        "length": "256",
        "window": 64,
        "pattern": ["LongMixed(16)", "Causal()"],
        "method": "lora",
        "rate": "1e-3",
        "steps": 2,
        "seed": 3,
        "activations": "recomputed",
        "output": str(place / "first"),
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(settings))
    assert run("extend", "--config", place / "mine.yaml", "--length", "128", "--rank", "2")[0] == 0
    saved = yaml.safe_load((place / "first" / "recipe.yaml").read_text())
    assert (saved["length"], saved["rank"], saved["seed"], saved["rate"]) == (128, 2, 3, 0.001)
    assert saved["window"] == 64
    assert saved["pattern"] == "LongMixed(16); Causal()"
    again = run("extend", "--config", place / "first" / "recipe.yaml", "--output", place / "again")
    assert again[0] == 0
    one, two = (load_file(place / name / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (place / "again" / "recipe.yaml").read_text() == (place / "first" / "recipe.yaml").read_text()


def test_resuming_keeps_the_recipe(run, place):
    code, out, err = run("extend", "--resume", "--steps", "10", "--output", place / "full")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "A run goes on by the recipe it began with.",
        "  asked   --resume with steps",
        f"  recipe  {place}/full/recipe.yaml",
        f"  try     longspan extend --resume --output {place}/full",
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_says_what_it_does_and_where_the_result_is(run, models, place):
    torch.manual_seed(0)
    code, out, err = run(
        *("extend", models / "tiny", "--length", "256", "--text", place / "novel.txt"),
        *("--pattern", "LongMixed(64)", "--steps", "2", "--batch", "1", "--output", place / "out"),
    )
    assert code == 0
    # Read again with another length, the window follows it.
    assert yaml.safe_load((place / "out" / "recipe.yaml").read_text())["window"] is None
    assert err.splitlines()[0] == (
        f"extending {models}/tiny to 256 tokens: yarn, LongMixed(64), 2 steps of 1 x 256 tokens of {place}/novel.txt"
    )
    assert err.splitlines()[-1].startswith("training on 256 tokens: 512 of 512 tokens, loss ")
    assert out == (
        f"the extended model is in {place}/out; compare: longspan eval {models}/tiny {place}/out\n"
    )


@pytest.mark.parametrize(("together", "windows"), [(1, 12), (2, 6), (0, 3)])
def test_all_windows_of_a_step_are_counted_whichever_process_reads_them(together, windows):
    recipe = Recipe(length=2048, batch=3, sequence_ranks=together, steps=9)
    assert f", 4 processes, 9 steps of {windows} x 2,048 tokens of the" in described(recipe, 4)


def test_what_is_shown_as_the_default_is_the_recipe_s():
    """Every field of the recipe is an option, shown with the value that a recipe without it has."""
    commands = typer.main.get_command(cli.app).commands
    options = {option.name: option for option in commands["extend"].params}
    assert options.keys() - {field.name for field in fields(Recipe)} == {
        *("config", "output", "resume", "device", "timeout")
    }
    for field in fields(Recipe):
        option = options[field.name]
        assert option.default is None
        if field.name not in SAID_IN_WORDS:
            value = field.default
            assert option.show_default == (f"{value:g}" if isinstance(value, float) else str(value))
    for option in commands["plan"].params:
        if option.name not in ("devices", "memory", "speed"):
            same = options[option.name]
            assert (option.opts, option.help) == (same.opts, same.help)
            assert (option.default, option.show_default) == (same.default, same.show_default)
    for name, known in CHOICES.items():
        assert options[name].metavar.split("|") == list(known)


def test_what_follows_from_other_options_is_shown_as_it_is_chosen():
    shown = {
        option.name: option.show_default
        for option in typer.main.get_command(cli.app).commands["extend"].params
    }
    numbers = {
        name: re.findall(r"[\d,.e-]*\d", text) for name, text in shown.items() if isinstance(text, str)
    }
    assert numbers["rate"] == [f"{Recipe().rate:g}", f"{Recipe(method='full').rate:g}"] and RATES.keys() == {
        "full"
    }
    assert numbers["window"] == [f"{WHOLE:,}"]
    assert (Recipe(length=WHOLE).window, Recipe(length=8 * WHOLE).window) == (WHOLE, 2 * WHOLE)
    assert numbers["stages"] == [str(STAGES), f"{SHORTEST:,}"]
    assert Recipe(length=8 * WHOLE).stages == STAGES
    assert min(Recipe(length=2 * SHORTEST).windows) == SHORTEST
    # What the recipe says of itself are the same numbers.
    told = " ".join(Recipe.__doc__.split())
    assert NEAR.keys() == FAR.keys()
    for name in NEAR:
        values = (getattr(Recipe(length=length), name) for length in (WHOLE, WHOLE + 1))
        near, far = (f'"{value}"' if isinstance(value, str) else f"{value:g}" for value in values)
        assert f"None is {near}, and {far} for more than {WHOLE:,} tokens." in told
        assert shown[name] == f"{near}, {far} for more than {WHOLE:,} tokens".replace('"', "")
    assert (Recipe(repeats=0.75).passkeys, Recipe(passkeys=1.0, length=WHOLE + 1).repeats) == (0.25, 0.0)
    assert f"`length` up to {WHOLE:,}" in told and f"whose windows have {SHORTEST:,} tokens" in told
    assert [float(rate) for rate in re.findall(r"[\d.]+e-\d+", told)] == [RATES["full"], RATE]
