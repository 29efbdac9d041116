"""Rows: datasets of Hugging Face and files of tables, of which one column is text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from longspan.errors import InputError, message

# A source is read until it has given this many characters.
CHARACTERS = 64_000_000

# Files of rows by their endings, and what the package calls them.
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


def dataset_named(source: str) -> Mapping[str, str | None] | None:
    """Return the id, config and split in the name of a dataset, None where it cannot be one.

    Example:
        >>> dataset_named("owner/name:test")["split"]
        'test'
    """
    found = _DATASET.fullmatch(source)
    return found and found.groupdict()


def dataset(source: str, column: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each row of a dataset, from the network row by row.

    Args:
        source: `owner/name`, with `/config` and `:split` after it where they are needed.
        column: that holds the text; by default `text`, or the only column of strings.

    Raises:
        InputError: it cannot be fetched, has no such column, or no text.
    """
    asked = dataset_named(source)
    part = asked["split"] or "train"
    facts = {"asked": f"the text {source!r}", "looked": "no file or folder of that name"}
    fix = (
        "check the name (owner/name, then /config and :split if needed) and the network, or name a text file"
    )
    return _texts(
        lambda datasets: datasets.load_dataset(asked["id"], asked["config"], split=part, streaming=True),
        f"{asked['id']}:{part}",
        column,
        "A dataset cannot be fetched.",
        facts,
        fix,
    )


def table(path: Path, name: str, column: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each row of a file of rows: JSON lines, a JSON list, or Parquet.

    Args:
        path: of the file, with one of the endings in `TABLES`.
        name: what to call it.
        column: as for `dataset`.

    Raises:
        InputError: it cannot be read as rows, has no such column, or no text.
    """
    kind = TABLES[path.suffix.lower()]
    return _texts(
        lambda datasets: datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True),
        name,
        column,
        "A file of rows cannot be read.",
        {"asked": f"the text {str(path)!r}"},
        f"a file of rows in {kind}; or, to read it as it stands, a copy that ends in .txt",
    )


def _texts(
    load: Callable[[Any], Iterable[Mapping[str, Any]]],
    name: str,
    column: str | None,
    what: str,
    facts: dict[str, str],
    fix: str,
) -> Iterator[tuple[str, str]]:
    """Yield what is text in rows, until there is enough of it."""
    try:
        # An optional package, wanted only here.
        datasets = import_module("datasets")
    except ImportError as error:
        reason = {"because": "the package that reads datasets is not installed"}
        raise InputError(
            message(what, facts | reason, fix="pip install datasets, or name a text file")
        ) from error
    characters = 0
    chosen = None
    try:
        for number, row in enumerate(load(datasets)):
            chosen = chosen or _column(facts["asked"], row, column)
            text = row[chosen] or ""
            if text.strip():
                characters += len(text)
                yield f"{name}#{number}", text
                if characters >= CHARACTERS:
                    break
    except (InputError, GeneratorExit):
        raise
    # Whatever a dataset does wrong (no network, no such name, no such split, a bad file) is one kind of event here;
    # the package raises a dozen types for it.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(message(what, facts | {"because": reason}, fix=fix)) from error
    if not characters:
        found = {"asked": facts["asked"], "found": "no row with text in it"}
        raise InputError(message("A dataset is empty.", found, fix="another split, or another dataset"))


def _column(asked: str, row: Mapping[str, Any], column: str | None) -> str:
    """Return the column that holds the text, judged by the first row."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if column is None and "text" in strings:
        return "text"
    if column is None and len(strings) == 1:
        return strings[0]
    if column is not None and column in strings:
        return column
    raise InputError(
        message(
            "It is not clear which column of a dataset holds the text.",
            {
                "asked": asked + (f", column {column!r}" if column else ""),
                "found": f"columns of text: {', '.join(strings) or 'none'}",
            },
            fix="name one of these columns" if strings else "a dataset with a column of text",
        )
    )
