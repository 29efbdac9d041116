"""`longspan read`: figures, notes, and one clear message for every bad input."""

from __future__ import annotations

import json

import pytest
from tiny import byte_tokenizer, llama

WORDS = "It was the best of times, it was the worst of times. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    llama(positions=32).save_pretrained(place)
    byte_tokenizer(opening=True).save_pretrained(place)
    return place


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text(WORDS * 20)
    return path


def test_memory_is_constant_from_start_to_end(run, folder, text, tmp_path):
    out_file = tmp_path / "figures.json"
    options = ("--question", "Who?", "--answer", "5", "--chunk", "50", "--json", out_file)
    code, out, err = run("read", text, "--model", folder, *options)
    assert code == 0, err
    figures = json.loads(out_file.read_text())
    assert (figures["pattern"], figures["places"]) == ("Streaming(28)", "cache")
    points = figures["checkpoints"]
    # The token that opens a text comes first, and none closes it.
    assert points[-1]["tokens"] == len(WORDS) * 20 + 1
    # Two layers, two key heads, keys and values of eight float32 numbers; 28 + 4 keys, and the first ones again.
    assert {point["cache_bytes"] for point in points} == {2 * 2 * 2 * 8 * 4 * (28 + 4 + 4)}
    assert len(points) == 8 and "places counted in the cache" in out and "Who?" in out
    assert err.startswith("reading: 1,061 of 1,061 tokens, perplexity ")


def test_memory_without_bound_is_allowed_and_said(run, folder, text):
    code, out, _ = run("read", text, "--model", folder, "--pattern", "Causal()", "--answer", "0")
    assert code == 0
    assert "Causal() may read keys from far back for ever: the cache grows with the text." in out
    assert "Keys up to 1,061 tokens back are read at their places in the text, beyond the 32 tokens" in out


def test_places_of_the_text_can_be_asked_for(run, folder, text):
    code, out, _ = run("read", text, "--model", folder, "--places", "text", "--answer", "1")
    assert code == 0
    assert "places counted in the text" in out and "beyond the 32 tokens" in out and "for ever" not in out


def broken(tmp_path, name):
    path = tmp_path / name
    contents = {"empty.txt": b"  \n", "binary.txt": b"abc\0def", "latin.txt": "café".encode("latin-1")}
    if name in contents:
        path.write_bytes(contents[name])
    if name == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing.txt", "There is no such file."),
        ("folder", "There is no such file."),
        ("empty.txt", "A text file is empty."),
        ("binary.txt", "A file holds binary data instead of text."),
        ("latin.txt", "A file holds binary data instead of text."),
    ],
)
def test_what_is_no_text_gets_one_message_and_code_2(run, tmp_path, name, problem):
    code, out, err = run("read", broken(tmp_path, name))
    assert (code, out, err.splitlines()[0]) == (2, "", problem)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--pattern", "Streamin(8)"), "There is no pattern called Streamin."),
        (("--pattern", "Streaming(0)"), ""),
        (("--pattern", "LongMixed(64)", "--places", "cache"), "Places in the cache are counted for a window"),
        (("--places", "moon"), "There is no such place to count from."),
        (("--model", "no/such/folder"), "There is no model folder at this path."),
        (("--json", "no/such/file.json"), "A file cannot be written."),
        (("--json", "figures.txt"), "A file of this kind cannot be written."),
        (("--device", "moon"), "There is no such device."),
    ],
)
def test_bad_options_get_one_message_and_code_2(run, text, options, problem):
    code, out, err = run("read", text, *options)
    assert (code, out) == (2, "")
    assert err.startswith(problem) and "Traceback" not in err and "\n  try " in err


@pytest.mark.parametrize("options", [("--chunk", "0"), ("--chunk", "much"), ("--answer", "-1")])
def test_numbers_out_of_range_get_code_2(run, text, options):
    code, out, err = run("read", text, *options)
    assert (code, out) == (2, "") and options[0] in err
