"""Documents: where the text comes from, and which part of it is held out."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from longspan.errors import InputError, message

# Folders of the standard library that hold data tables or tests rather than sources and prose.
_NOT_SOURCES = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}

# What counts as text inside a folder: prose, then sources. A file named by the user is read whatever its ending.
_PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm"}
_SOURCES = {
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".rb",
    ".sh",
}
_ENDINGS = _PROSE | _SOURCES

# From this many documents on, whole documents are held out by name; below, the end of each.
MANY = 100

# A dataset is read until it has given this many characters.
DATASET_CHARACTERS = 64_000_000

_DATASET = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Document:
    """A text with a name."""

    name: str
    text: str


def documents(source: str | Path | None = None, *, column: str | None = None) -> list[Document]:
    """Read the documents of a source of text.

    A file is one document. A folder gives one document per text or source file below it, in the order of
    their names; hidden files and files without text are left out. A dataset gives one document per row, read
    from the network row by row until there are 64 million characters.

    Args:
        source: None for the sources of this Python's standard library, a file, a folder, or the id of a
            dataset, `owner/name`, with `/config` and `:split` after it where they are needed.
        column: the column of a dataset that holds the text; by default `text`, or the only column of strings.

    Returns:
        At least one document, each with text in it.

    Raises:
        InputError: the source does not exist, is empty, is not UTF-8 text, or cannot be fetched.

    Example:
        >>> [document.name for document in documents()[:2]]
        ['__future__.py', '__hello__.py']
    """
    if source is None:
        return standard_library()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return [_file(path, path.name)]
    asked = _DATASET.fullmatch(str(source))
    # A name with the ending of a text file, or below a folder that exists, was meant as a file.
    if asked is None or path.suffix in _ENDINGS or Path(path.parts[0]).is_dir():
        raise InputError(
            message(
                "There is no such file or folder.",
                {"asked": f"the text {str(source)!r}", "looked": str(path.absolute())},
                fix="the path of a text file, of a folder of text files, or a dataset id like owner/name:split",
            )
        )
    return _dataset(str(source), asked.groupdict(), column)


def standard_library() -> list[Document]:
    """Return the sources of this Python's standard library, a text that every installation has.

    Tests, tables of character encodings and third-party packages are left out. Documents come in the order
    of their names.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_SOURCES.isdisjoint(name.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                documents.append(Document(name.as_posix(), text))
    return documents


def held_out(document: Document) -> bool:
    """Say whether a document is kept for evaluation: one in twelve, by its name, the same everywhere."""
    return hashlib.sha256(document.name.encode()).digest()[0] % 12 == 0


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Divide documents into those to train on and those held out for evaluation.

    The same documents are divided the same way everywhere. One hundred documents or more are held out whole,
    one in twelve by their names. Of fewer documents the last tenth of each is held out, cut at a line end
    where one is near.

    Args:
        documents: what `documents` returned.

    Returns:
        The training documents and the held-out documents.

    Example:
        >>> training, held = split([Document("a novel", "word " * 200)])
        >>> len(training[0].text), len(held[0].text)
        (900, 100)
    """
    if len(documents) >= MANY:
        kept = [held_out(document) for document in documents]
        if any(kept):
            return (
                [document for document, held in zip(documents, kept, strict=True) if not held],
                [document for document, held in zip(documents, kept, strict=True) if held],
            )
    training, held = [], []
    for document in documents:
        cut = _cut(document.text)
        training.append(Document(document.name, document.text[:cut]))
        held.append(Document(document.name, document.text[cut:]))
    return training, held


def _cut(text: str) -> int:
    """Return where the last tenth of a text begins: at the next line end, if it comes within a percent."""
    cut = len(text) * 9 // 10
    line = text.find("\n", cut, cut + len(text) // 100)
    return cut if line < 0 else line + 1


def _folder(root: Path) -> list[Document]:
    found = sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    texts = [path for path in found if path.suffix.lower() in _ENDINGS and path.stat().st_size > 0]
    kept = [_file(path, path.relative_to(root).as_posix(), blank=True) for path in texts]
    kept = [document for document in kept if document.text.strip()]
    if not kept:
        endings = sorted({path.suffix or path.name for path in found})
        raise InputError(
            message(
                "There is no text in this folder.",
                {
                    "asked": f"the text {str(root)!r}",
                    "found": _files(len(found)) + (f", named {', '.join(endings[:6])}" if endings else ""),
                    "wanted": "files with text in them that end in .txt, .md, .rst, .html, .py or the like",
                },
                fix="name one of its files, which is read whatever its ending",
            )
        )
    return kept


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"


def _file(path: Path, name: str, *, blank: bool = False) -> Document:
    """Read one file, which may be blank if asked so."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(
            message(
                "A text file cannot be read.",
                {"asked": f"the text {str(path)!r}", "because": error.strerror or str(error)},
                fix="check that you may read this file",
            )
        ) from error
    nul = raw.find(b"\0")
    if nul >= 0:
        raise _binary(path, f"byte {nul:,} of {len(raw):,} is NUL, which no text contains")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start:,} of {len(raw):,} (0x{raw[error.start]:02x}) is not UTF-8"
        raise _binary(path, reason) from error
    if not blank and not text.strip():
        raise InputError(
            message(
                "A text file is empty.",
                {"asked": f"the text {str(path)!r}", "found": f"{len(raw):,} bytes, nothing to read in them"},
                fix="a file with text in it",
            )
        )
    return Document(name, text.replace("\r\n", "\n"))


def _binary(path: Path, reason: str) -> InputError:
    return InputError(
        message(
            "A file holds binary data instead of text.",
            {"asked": f"the text {str(path)!r}", "because": reason},
            fix="save it as plain text in UTF-8",
        )
    )


def _dataset(source: str, asked: Mapping[str, str | None], column: str | None) -> list[Document]:
    part = asked["split"] or "train"
    try:
        # An optional package, wanted only here.
        datasets = import_module("datasets")
        rows = datasets.load_dataset(asked["id"], asked["config"], split=part, streaming=True)
        return _rows(rows, f"{asked['id']}:{part}", source, column)
    except InputError:
        raise
    except ImportError as error:
        reason, fix = (
            "the package that reads datasets is not installed",
            "pip install datasets, or name a text file",
        )
        raise _unfetched(source, reason, fix) from error
    # Whatever a remote dataset does wrong (no network, no such name, no such split, a bad file) is one kind of
    # event here; the package raises a dozen types for it.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "check the name (owner/name, then /config and :split if needed) and the network, or name a text file"
        raise _unfetched(source, reason, fix) from error


def _unfetched(source: str, reason: str, fix: str) -> InputError:
    facts = {"asked": f"the text {source!r}", "looked": "no file or folder of that name", "because": reason}
    return InputError(message("A dataset cannot be fetched.", facts, fix=fix))


def _rows(rows: Iterable[Mapping[str, Any]], name: str, source: str, column: str | None) -> list[Document]:
    """Read a dataset row by row until there is enough text."""
    kept: list[Document] = []
    characters = 0
    chosen = None
    for number, row in enumerate(rows):
        chosen = chosen or _column(source, row, column)
        text = row[chosen] or ""
        if text.strip():
            kept.append(Document(f"{name}#{number}", text))
            characters += len(text)
            if characters >= DATASET_CHARACTERS:
                break
    if not kept:
        facts = {"asked": f"the text {source!r}", "found": "no row with text in it"}
        raise InputError(message("A dataset is empty.", facts, fix="another split, or another dataset"))
    return kept


def _column(source: str, row: Mapping[str, Any], column: str | None) -> str:
    """Return the column of a dataset that holds the text, judged by its first row."""
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
                "asked": f"the text {source!r}" + (f", column {column!r}" if column else ""),
                "found": f"columns of text: {', '.join(strings) or 'none'}",
            },
            fix="name one of these columns" if strings else "a dataset with a column of text",
        )
    )
