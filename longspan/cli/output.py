"""Output: the files that commands write, refused before any work is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.errors import InputError, message


def check_output(path: Path | None, endings: Sequence[str]) -> None:
    """Refuse a file that could not be written after the work is done.

    Raises:
        InputError: its folder does not exist, it is a folder itself, or it has another ending.
    """
    if path is None:
        return
    facts = {"asked": f"to write {str(path)!r}"}
    if path.suffix.lower() not in endings:
        raise InputError(
            message(
                "A file of this kind cannot be written.",
                facts | {"wanted": f"a name that ends in {' or '.join(endings)}"},
                fix=str(path.with_suffix(endings[0])),
            )
        )
    reason = _unwritable(path)
    if reason:
        raise InputError(
            message("A file cannot be written.", facts | {"because": reason}, fix="another path")
        )


def _unwritable(path: Path) -> str:
    """Say why a file cannot be written, or nothing: found by opening it, and leaving all as it was."""
    if path.is_dir():
        return "it is a folder"
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r}"
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        return error.strerror or str(error)
    if not there:
        path.unlink()
    return ""


def save(figures: dict[str, Any], path: Path) -> None:
    """Write figures as JSON."""
    path.write_text(json.dumps(figures, indent=2) + "\n")
