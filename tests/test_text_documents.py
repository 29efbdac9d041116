"""Documents: reading every kind of source, dividing it, and refusing what holds no text."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import pytest

from longspan.errors import InputError
from longspan.text.documents import Document, documents, held_out, split, standard_library


def test_a_file_is_one_document(tmp_path):
    file = tmp_path / "novel.any"
    file.write_bytes("\ufeffCall me Ishmael.\r\nÄ".encode())
    assert documents(file) == documents(str(file)) == [Document("novel.any", "Call me Ishmael.\nÄ")]


def test_a_folder_gives_its_texts_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ["z.txt", "deep/er/a.MD", "deep/code.py", ".git/config.txt", "picture.png"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    assert [document.name for document in documents(tmp_path)] == ["deep/code.py", "deep/er/a.MD", "z.txt"]


def test_without_a_source_there_is_the_standard_library():
    found = standard_library()
    assert documents() == found
    assert {"argparse.py", "json/decoder.py"} <= {document.name for document in found}
    assert not any(document.name.startswith(("test/", "site-packages/", "encodings/")) for document in found)


def test_which_modules_of_the_standard_library_are_held_out_never_changes():
    names = [
        "argparse.py",
        "ast.py",
        "calendar.py",
        "decimal.py",
        "json/decoder.py",
        "pdb.py",
        "uuid.py",
        "this.py",
    ]
    assert [name for name in names if held_out(Document(name, ""))] == ["ast.py", "decimal.py", "uuid.py"]
    training, held = split(standard_library())
    assert held == [document for document in standard_library() if held_out(document)]
    assert len(training) > 5 * len(held)


def test_many_documents_are_divided_by_their_names_whatever_their_order():
    many = [Document(f"{number}.txt", "text") for number in range(1200)]
    training, held = split(many)
    assert held == [document for document in many if held_out(document)]
    assert training == [document for document in many if not held_out(document)]
    assert 70 < len(held) < 130
    shuffled = random.Random(0).sample(many, len(many))
    assert {document.name for document in split(shuffled)[1]} == {document.name for document in held}


def test_of_few_documents_the_last_tenth_of_each_is_held_out():
    few = [Document("a", "one two three\n" * 500), Document("b", "no line end " * 50)]
    training, held = split(few)
    for whole, early, late in zip(few, training, held, strict=True):
        assert early.name == late.name == whole.name
        assert early.text + late.text == whole.text
        assert 0.08 < len(late.text) / len(whole.text) <= 0.1
    assert training[0].text.endswith("\n")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError) as refusal:
        documents(tmp_path / "novel.txt")
    assert str(refusal.value) == (
        "There is no such file or folder.\n"
        f"  asked   the text '{tmp_path}/novel.txt'\n"
        f"  looked  {tmp_path}/novel.txt\n"
        "  try     the path of a text file, of a folder of text files, or a dataset id like owner/name:split"
    )


@pytest.mark.parametrize("name", ["novel", "folder/novel.txt", "tests/novel", "a/b/c/d", "a b/c"])
def test_what_cannot_be_a_dataset_is_not_looked_for_as_one(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"There is no such file or folder\."):
        documents(name)


def test_an_empty_file_is_refused(tmp_path):
    file = tmp_path / "empty.txt"
    for content, found in [(b"", "0 bytes"), (b" \n\n", "3 bytes")]:
        file.write_bytes(content)
        with pytest.raises(InputError) as refusal:
            documents(file)
        assert str(refusal.value) == (
            "A text file is empty.\n"
            f"  asked  the text '{file}'\n"
            f"  found  {found}, nothing to read in them\n"
            "  try    a file with text in it"
        )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x7fELF\0\0more", "byte 4 of 10 is NUL, which no text contains"),
        (b"\xef\xbb\xbfcaf\xe9 noir", "byte 6 of 12 (0xe9) is not UTF-8"),
    ],
)
def test_binary_data_is_refused_with_its_place(tmp_path, content, reason):
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    for source in (file, tmp_path):
        with pytest.raises(InputError) as refusal:
            documents(source)
        assert str(refusal.value) == (
            "A file holds binary data instead of text.\n"
            f"  asked    the text '{file}'\n"
            f"  because  {reason}\n"
            "  try      save it as plain text in UTF-8"
        )


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("text")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(InputError) as refusal:
        documents(file)
    assert str(refusal.value) == (
        "A text file cannot be read.\n"
        f"  asked    the text '{file}'\n"
        "  because  Permission denied\n"
        "  try      check that you may read this file"
    )


def test_a_folder_without_text_is_refused(tmp_path):
    for name in ["a.png", "b.png", "LICENSE"]:
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError) as refusal:
        documents(tmp_path)
    assert str(refusal.value) == (
        "There is no text in this folder.\n"
        f"  asked   the text '{tmp_path}'\n"
        "  found   3 files, named .png, LICENSE\n"
        "  wanted  files with text in them that end in .txt, .md, .rst, .html, .py or the like\n"
        "  try     name one of its files, which is read whatever its ending"
    )


def hub(rows, asked=None):
    """Return a stand-in for the package that fetches datasets, which gives these rows to whoever asks."""

    def load_dataset(name, config, *, split, streaming):
        if asked is not None:
            asked.append((name, config, split, streaming))
        return rows

    return SimpleNamespace(load_dataset=load_dataset)


def test_a_dataset_gives_a_document_per_row_with_text(monkeypatch):
    asked = []
    rows = [
        {"text": text, "title": title} for text, title in [("one", "x"), (" ", ""), (None, None), ("two", "")]
    ]
    monkeypatch.setitem(sys.modules, "datasets", hub(rows, asked))
    assert documents("owner/name") == [
        Document("owner/name:train#0", "one"),
        Document("owner/name:train#3", "two"),
    ]
    assert documents("owner/name/config:test", column="title") == [
        Document("owner/name:test#0", "x"),
    ]
    assert asked == [("owner/name", None, "train", True), ("owner/name", "config", "test", True)]


def test_a_dataset_is_read_only_as_far_as_needed(monkeypatch):
    monkeypatch.setattr("longspan.text.rows.CHARACTERS", 10)
    monkeypatch.setitem(sys.modules, "datasets", hub([{"story": "four"}] * 100))
    assert len(documents("owner/name")) == 3


def test_a_dataset_that_cannot_be_fetched_is_refused(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError) as refusal:
        documents("owner/name:test")
    assert str(refusal.value) == (
        "A dataset cannot be fetched.\n"
        "  asked    the text 'owner/name:test'\n"
        "  looked   no file or folder of that name\n"
        "  because  Couldn't reach 'owner/name' on the Hub\n"
        "  try      check the name (owner/name, then /config and :split if needed) and the network, "
        "or name a text file"
    )


def test_without_the_package_datasets_a_dataset_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError) as refusal:
        documents("owner/name")
    assert str(refusal.value) == (
        "A dataset cannot be fetched.\n"
        "  asked    the text 'owner/name'\n"
        "  looked   no file or folder of that name\n"
        "  because  the package that reads datasets is not installed\n"
        "  try      pip install datasets, or name a text file"
    )


def test_a_dataset_without_text_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", hub([{"text": " "}]))
    with pytest.raises(InputError) as refusal:
        documents("owner/name")
    assert str(refusal.value) == (
        "A dataset is empty.\n"
        "  asked  the text 'owner/name'\n"
        "  found  no row with text in it\n"
        "  try    another split, or another dataset"
    )


@pytest.mark.parametrize(
    ("row", "column", "asked", "found", "fix"),
    [
        ({"a": "x", "b": "y"}, None, "", "a, b", "name one of these columns"),
        ({"a": "x", "b": "y"}, "c", ", column 'c'", "a, b", "name one of these columns"),
        ({"a": 1}, None, "", "none", "a dataset with a column of text"),
    ],
)
def test_an_unclear_column_is_refused(monkeypatch, row, column, asked, found, fix):
    monkeypatch.setitem(sys.modules, "datasets", hub([row]))
    with pytest.raises(InputError) as refusal:
        documents("owner/name", column=column)
    assert str(refusal.value) == (
        "It is not clear which column of a dataset holds the text.\n"
        f"  asked  the text 'owner/name'{asked}\n"
        f"  found  columns of text: {found}\n"
        f"  try    {fix}"
    )


ROWS = [{"text": f"story {number}", "by": "nobody"} for number in range(3)]


def written(path, kind):
    """Write the rows as a file of this kind."""
    if kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(ROWS).to_parquet(path)
    else:
        lines = [json.dumps(row) for row in ROWS]
        path.write_text("\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}]")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_file_of_rows_gives_a_document_per_row(tmp_path, kind):
    pytest.importorskip("datasets")
    file = written(tmp_path / f"stories.{kind}", kind)
    assert documents(file) == [Document(f"stories.{kind}#{number}", f"story {number}") for number in range(3)]
    assert {document.text for document in documents(file, column="by")} == {"nobody"}
    with pytest.raises(InputError, match="It is not clear which column"):
        documents(file, column="author")


def test_rows_in_a_folder_are_read_beside_its_texts(tmp_path):
    pytest.importorskip("datasets")
    written(tmp_path / "b.jsonl", "jsonl")
    (tmp_path / "a.txt").write_text("a novel")
    (tmp_path / "settings.json").write_text("{}")
    assert [document.name for document in documents(tmp_path)] == [
        "a.txt",
        "b.jsonl#0",
        "b.jsonl#1",
        "b.jsonl#2",
    ]


def test_a_file_that_only_looks_like_rows_is_refused(tmp_path):
    pytest.importorskip("datasets")
    file = tmp_path / "broken.jsonl"
    file.write_text('{"text": "a story"}\n{"text": "an\n')
    with pytest.raises(InputError) as refusal:
        documents(file)
    lines = str(refusal.value).splitlines()
    assert lines[:2] == ["A file of rows cannot be read.", f"  asked    the text {str(file)!r}"]
    assert (
        lines[-1]
        == "  try      a file of rows in json; or, to read it as it stands, a copy that ends in .txt"
    )


@pytest.mark.parametrize("named", ["novel.txt", ".", None])
def test_a_column_of_what_has_none_is_refused(tmp_path, named):
    (tmp_path / "novel.txt").write_text("a novel")
    with pytest.raises(InputError, match="There are no rows here that could have columns"):
        documents(named and tmp_path / named, column="text")
