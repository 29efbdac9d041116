"""Documents: where the text comes from, and which part of it is held out."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Folders of the standard library that hold data tables or tests rather than sources and prose.
_NOT_SOURCES = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A text with a name."""

    name: str
    text: str


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
