"""Documents: where the text comes from, and which part of it is held out."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan.errors import InputError, message
from longspan.text import rows

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
# Files of rows that a folder is searched for: others may as well be settings, or figures.
_ROWS = {".jsonl", ".parquet"}

# From this many documents on, whole documents are held out by name; below, the end of each.
MANY = 100


@dataclass(frozen=True)
class Document:
    """A text with a name."""

    name: str
    text: str


def documents(source: str | Path | None = None, *, column: str | None = None) -> list[Document]:
    """Read the documents of a source of text.

    A file is one document, but that of rows (.jsonl, .json, .parquet) gives one per row. A folder gives the
    documents of the text and source files below it, and of those of rows in .jsonl and .parquet, in the order of
    their names; hidden files and files without text are left out. A dataset gives one document per row, read from
    the network row by row. Of rows, no more are read than make 64 million characters.

    Args:
        source: None for the sources of this Python's standard library, a file, a folder, or the id of a
            dataset, `owner/name`, with `/config` and `:split` after it where they are needed.
        column: the column of rows that holds the text; by default `text`, or the only column of strings.

    Returns:
        At least one document, each with text in it.

    Raises:
        InputError: the source does not exist, is empty, is not UTF-8 text, or cannot be fetched; or a column is
            named of what has none.

    Example:
        >>> [document.name for document in documents()[:2]]
        ['__future__.py', '__hello__.py']
    """
    if source is None:
        _check_column(source, column, [])
        return standard_library()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, column)
    if path.exists():
        _check_column(source, column, [path])
        return _of_file(path, path.name, column)
    # A name with the ending of a text file, or below a folder that exists, was meant as a file.
    meant = path.suffix in _ENDINGS | rows.TABLES.keys() or Path(path.parts[0]).is_dir()
    if rows.dataset_named(str(source)) is None or meant:
        raise InputError(
            message(
                "There is no such file or folder.",
                {"asked": f"the text {str(source)!r}", "looked": str(path.absolute())},
                fix="the path of a text file, of a folder of text files, or a dataset id like owner/name:split",
            )
        )
    return [Document(*row) for row in rows.dataset(str(source), column)]


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


def _folder(root: Path, column: str | None) -> list[Document]:
    found = sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    texts = [path for path in found if path.suffix.lower() in _ENDINGS | _ROWS and path.stat().st_size > 0]
    _check_column(root, column, texts)
    kept = [
        document
        for path in texts
        for document in _of_file(path, path.relative_to(root).as_posix(), column, blank=True)
        if document.text.strip()
    ]
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


def _check_column(source: str | Path | None, column: str | None, files: Sequence[Path]) -> None:
    """Refuse a column of what has no rows."""
    if column is not None and not any(path.suffix.lower() in rows.TABLES for path in files):
        raise InputError(
            message(
                "There are no rows here that could have columns.",
                {"asked": f"column {column!r} of {source or 'the standard library'}"},
                fix="no column; or a dataset, or a file of rows that ends in .jsonl, .json or .parquet",
            )
        )


def _of_file(path: Path, name: str, column: str | None, *, blank: bool = False) -> list[Document]:
    """Return the documents of a file: one, or one of each row."""
    if path.suffix.lower() not in rows.TABLES:
        return [_file(path, name, blank=blank)]
    return [Document(*row) for row in rows.table(path, name, column)]


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
