"""The README is true: its programs run and print what it says, its commands and files exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from longspan.cli import app
from longspan.kernel.native import native

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```(\w+)\n(.*?)```\n", README, flags=re.DOTALL)
PROGRAMS = [
    (code, FENCED[number + 1] if number + 1 < len(FENCED) else ("", ""))
    for number, (language, code) in enumerate(FENCED)
    if language == "python"
]
LINES = [line for language, code in FENCED if language == "sh" for line in code.splitlines()]


@pytest.mark.parametrize(
    ("code", "follows"), PROGRAMS, ids=[f"program {n}" for n in range(1, len(PROGRAMS) + 1)]
)
def test_programs_print_what_follows(
    code: str, follows: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    language, expected = follows
    if language == "text":
        assert _everywhere(printed.getvalue()) == _everywhere(expected)


def _everywhere(text: str) -> str:
    """Leave out of a plan what the native kernel says where it was not built."""
    if not native.MISSING:
        return text
    differs = ("computed", "workspace", "kernel", "refused")
    return "".join(line for line in text.splitlines(keepends=True) if not line.strip().startswith(differs))


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("longspan ")])
def test_commands_take_these_options(line: str):
    group: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(line, comments=True)[1:]
    # Parses without running anything.
    group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_targets_are_made(line: str):
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(link: str):
    assert (ROOT / link).exists()


def test_tree_names_every_file():
    tree = next(code for language, code in FENCED if language == "text" and code.startswith("longspan/\n"))
    named, folders = set(), []
    for line in tree.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 2
        name, *clause = line.split(maxsplit=1)
        assert clause, f"{name} has no clause"
        folders = [*folders[: depth - 1], name.rstrip("/")]
        if not name.endswith("/"):
            named.add("/".join(folders))
    package = ROOT / "longspan"
    files = {
        path.relative_to(package).as_posix()
        for ending in ("py", "hpp", "cpp")
        for path in package.rglob(f"*.{ending}")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert {name for name in named if name.endswith((".py", ".hpp", ".cpp"))} == files
