"""What a recipe says of positions: by name, by a search, by a file, by any frequency; all end in a plain checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import byte_tokenizer, llama
from transformers import AutoModelForCausalLM

from longspan.errors import InputError
from longspan.extend import extension, settings, stretch
from longspan.extend.activations import check_activations, kept
from longspan.extend.recipe import Recipe
from longspan.extend.search import Budget
from longspan.extend.stretch import settled, stretched
from longspan.frequency import DynamicNTK, Linear, LongRoPE, YaRN
from longspan.frequency.expression import parse
from longspan.hf.config import extended, with_frequency, write_config

LENGTH = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama(positions=64).save_pretrained(folder)
    byte_tokenizer(opening=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "novel.txt"
    file.write_text("It was the best of times, it was the worst of times.\n" * 100)
    return str(file)


def rotary(folder):
    return AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_factors_are_searched_written_and_never_searched_again(source, text, tmp_path, monkeypatch):
    small = Budget(population=3, parents=2, mutations=1, crossovers=1, rounds=1)
    monkeypatch.setattr(stretch, "BUDGET", small)
    recipe = Recipe(
        model=source, text=text, length=LENGTH, rope="longrope", passkeys=0.0, steps=1, rank=2, margin=1.0
    )
    told = []

    def progress(name, done):
        told.append(name)
        return lambda done, total, **figures: told.append((done, total))

    first = extension.extend(recipe, tmp_path / "first", progress=progress)
    assert told[:2] == ["searching factors", (4 * LENGTH, 5 * 4 * LENGTH)]
    assert told[-2:] == ["training on 128 tokens", (LENGTH, LENGTH)]
    saved = settings.load(first)
    frequency = parse(saved.rope)
    assert isinstance(frequency, LongRoPE) and frequency.short == frequency.long
    assert (frequency.original, frequency.factor) == (64, 2.0)
    found = rotary(first)
    assert found.config.rope_parameters["rope_type"] == "longrope"
    torch.testing.assert_close(found.inv_freq, frequency.angles_per_token(8), rtol=0, atol=0)
    assert found.attention_scaling == pytest.approx(frequency.scale())
    monkeypatch.setattr(stretch, "search", None)
    again = extension.extend(saved, tmp_path / "again")
    one, two = (load_file(folder / "model.safetensors") for folder in (first, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_search_has_one_process(source, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError) as refused:
        extension.extend(Recipe(model=source, length=LENGTH, rope="longrope"), "nowhere")
    assert str(refused.value).splitlines() == [
        "Factors are searched by one process.",
        "  asked  rope longrope on 2 processes",
        "  try    longspan extend on one device first; then --rope with the rope in its recipe.yaml",
    ]


def test_any_frequency_will_do(source):
    """The object, its text, and a text without what the model says itself, are the same recipe."""
    frequency = YaRN(2.0, original=64, fast=16.0)
    config = llama(positions=64).config
    wanted = with_frequency(config, frequency, length=LENGTH).rope_parameters
    for rope in (frequency, str(frequency), "YaRN(2.0, original=64, fast=16.0)"):
        recipe = Recipe(model=source, length=LENGTH, rope=rope)
        assert isinstance(recipe.rope, str)
        made = stretched(recipe)
        assert made.rope_parameters == wanted and made.max_position_embeddings == LENGTH
    # Dynamic NTK counts from what the configuration says, and a checkpoint with it must say the trained length.
    assert stretched(Recipe(model=source, rope=DynamicNTK(64))).max_position_embeddings == 64
    by_name = stretched(Recipe(model=source, length=LENGTH, rope="llama3", margin=2.0))
    assert (
        by_name.rope_parameters
        == extended(config, method="llama3", length=LENGTH, margin=2.0).rope_parameters
    )


def test_factors_come_from_a_file(source, tmp_path):
    factors = [1.0, 1.5, 2.0, 2.0]
    plain, keys, whole = (tmp_path / name for name in ("factors.json", "rope.yaml", "config.json"))
    plain.write_text(json.dumps(factors))
    keys.write_text(yaml.safe_dump({"rope_type": "linear", "factor": 2.0}))
    write_config(extended(llama(positions=64).config, method="yarn", length=LENGTH), tmp_path)
    wanted = {
        plain: LongRoPE(factors, factors, original=64, factor=2.0),
        keys: Linear(2.0),
        whole: YaRN(2.0, original=64),
    }
    for file, frequency in wanted.items():
        recipe = settled(Recipe(model=source, length=LENGTH, rope=str(file)))
        assert parse(recipe.rope) == frequency
        assert stretched(recipe).max_position_embeddings == LENGTH
    named = Recipe(model=source, rope="ntk")
    assert settled(named) is named


REFUSED = {
    "name": (
        "yarm",
        """No RoPE scaling has this name.
  asked  rope yarm
  known  linear, ntk, yarn, llama3, longrope
  or     a frequency such as YaRN(8, original=4096), or a file of factors
  try    yarn""",
    ),
    "missing": (
        "none.json",
        """The file of factors cannot be read.
  asked    rope none.json
  because  No such file or directory
  try      a file with one number for each pair of a head, such as [1.0, 2.0, 8.0]""",
    ),
    "number": (
        "number.json",
        """The file of factors cannot be read.
  asked    rope number.json
  because  it holds int, not numbers or names with values
  try      a file with one number for each pair of a head, such as [1.0, 2.0, 8.0]""",
    ),
    "pairs": (
        "LongRoPE([1, 2], [1, 2], original=64, factor=2)",
        """LongRoPE needs as many factors as a head has pairs.
  head   8 numbers wide, 4 pairs
  short  2 factors
  try    4 factors""",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, source, tmp_path, run, monkeypatch):
    rope, text = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "number.json").write_text("3")
    code, out, err = run("extend", source, "--length", LENGTH, "--rope", rope)
    assert (code, out) == (2, "")
    assert err.partition("\n")[2] == text + "\n"


def test_a_yaml_that_is_none_is_no_file_of_factors(source, tmp_path):
    (tmp_path / "broken.yaml").write_text("[1, 2")
    with pytest.raises(InputError, match="The file of factors cannot be read"):
        settled(Recipe(model=source, rope=str(tmp_path / "broken.yaml")))


def test_offloading_moves_all_but_the_weights(device):
    """To the same gradients; on the CPU it is the same memory, and is refused on the command line."""
    model, moved = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()).to(device), []
    given = torch.randn(2, 4, device=device)
    model(given).sum().backward()
    wanted, own = model[0].weight.grad.clone(), torch.autograd.graph.save_on_cpu
    model.zero_grad()

    class Watched(own):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda saved: moved.append(tuple(saved.shape)) or pack(saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
        with kept(model, "offloaded"):
            model(given).sum().backward()
    assert moved and (3, 4) not in moved and (4, 3) not in moved
    torch.testing.assert_close(model[0].weight.grad, wanted)
    if device.type == "cpu":
        with pytest.raises(InputError) as refused:
            check_activations("offloaded", device)
        assert str(refused.value).splitlines() == [
            "Activations cannot be moved away from here.",
            "  asked  activations offloaded on cpu",
            "  why    they are in the CPU's memory already",
            "  try    --activations recomputed",
        ]
    check_activations("recomputed", device)
