"""Settings: a recipe as a YAML file, written beside the result and read back to repeat it."""

from __future__ import annotations

import difflib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from longspan.errors import InputError, message
from longspan.extend.recipe import Recipe
from longspan.version import version

FILE = "recipe.yaml"
# What a command line takes beside the recipe.
PLACES = ("output", "device")
_PACKAGES = ("longspan", "torch", "transformers", "peft")
_KINDS = {field.name: str(field.type) for field in fields(Recipe)}


def read(path: str | Path) -> dict[str, Any]:
    """Read a file of settings: any options of the recipe, and `output` and `device`.

    Args:
        path: a YAML file that maps names to values. A list of patterns is one for each layer.

    Returns:
        Values by name, those that are null left out. Numbers written as text (YAML takes 1e-3 for text) are
        numbers; whether they are in range is for the recipe to say.

    Raises:
        InputError: the file cannot be read, is no mapping, or has a key that is not known.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "mine.yaml"
        ...     _ = file.write_text("length: 8192\\nrate: 1e-3\\npattern: [Causal(), LongMixed(64)]\\n")
        ...     read(file)
        {'length': 8192, 'rate': 0.001, 'pattern': 'Causal(); LongMixed(64)'}
    """
    path = Path(path).expanduser()
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _unreadable(path, " ".join(str(error).split())) from error
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise _unreadable(path, f"it holds {type(held).__name__}, not names with values")
    known = (*_KINDS, *PLACES)
    for name in held:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise InputError(
                message(
                    "There is no such setting.",
                    {"asked": f"{name} in {path}", "known": ", ".join(known)},
                    fix=near,
                )
            )
    return {name: _value(name, value) for name, value in held.items() if value is not None}


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe so that `read` gives it back, with the versions that it was carried out with."""
    versions = ", ".join(f"{name} {version(name) or 'not installed'}" for name in _PACKAGES)
    head = f"# {versions}\n# Repeat: longspan extend --config {path.name} --output FOLDER\n"
    values = asdict(recipe)
    for name in ("window", "stages"):
        if getattr(recipe, name) == getattr(replace(recipe, **{name: None}), name):
            # It follows the length, also where the file is read with another one.
            values[name] = None
    text = head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # A file that is there is whole: it is written under another name, and renamed.
    unfinished = path.with_suffix(".writing")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def load(folder: Path) -> Recipe:
    """Return the recipe of the run in a folder.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(
            message(
                "There is no run to resume in this folder.",
                {"asked": str(folder), "because": f"it holds no {FILE}"},
                fix="--output with the folder of an interrupted run, or leave out --resume",
            )
        )
    return Recipe(**{name: value for name, value in read(path).items() if name not in PLACES})


def _value(name: str, value: Any) -> Any:
    kind = _KINDS.get(name, "str")
    if name in PLACES and not isinstance(value, str):
        raise InputError(
            message(
                "A setting is out of range.",
                {"asked": f"{name} {value!r}", "wanted": "text"},
                fix=f'{name}: "{value}"',
            )
        )
    if name == "pattern" and isinstance(value, list):
        return "; ".join(map(str, value))
    if kind.startswith("float") and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        message(
            "The file of settings cannot be read.",
            {"asked": str(path), "because": reason},
            fix="a YAML file such as recipe.yaml beside an extended model, with lines like `length: 8192`",
        )
    )
