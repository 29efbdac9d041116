"""The states of a training: each is whole or does not count, whatever happened while it was written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

# Lists every file of a state with its size. It is written last, after the files have reached the disk.
SEAL = "whole.json"


def seal(state: Path) -> None:
    """Mark a state as whole: flush its files to the disk, then list them."""
    sizes = {}
    for path in sorted(state.rglob("*")):
        if path.is_file() and path.name != SEAL:
            flush(path)
            sizes[path.relative_to(state).as_posix()] = path.stat().st_size
    unfinished = state / f"{SEAL}.writing"
    unfinished.write_text(json.dumps(sizes), encoding="utf-8")
    flush(unfinished)
    unfinished.replace(state / SEAL)
    flush(state)


def whole(state: Path) -> bool:
    """Say whether every file of a state is there, at its full size."""
    try:
        sizes = json.loads((state / SEAL).read_text(encoding="utf-8"))
        return bool(sizes) and all((state / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def step(state: Path) -> int:
    """Return the step that a state was saved after."""
    return int(state.name.rpartition("-")[2])


def last(training: Path) -> Path | None:
    """Return the last whole state in a folder, None where there is none."""
    return max((state for state in _states(training) if whole(state)), key=step, default=None)


def sweep(training: Path) -> None:
    """Delete the states that are not whole."""
    for state in _states(training):
        if not whole(state):
            shutil.rmtree(state, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, has reached the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Some systems do not open folders; their list of files is not theirs to flush.
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _states(training: Path) -> list[Path]:
    return [
        path
        for path in training.glob("checkpoint-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
