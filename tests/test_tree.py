"""The shape of the tree: who may import whom, how long a file may be, and which names are promised."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import longspan

ROOT = Path(longspan.__file__).parent
TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
MODULES = sorted(ROOT.rglob("*.py"))
CPP = sorted(ROOT.rglob("*.[ch]pp"))

# What a part may import besides itself. Imports point down this list only.
LAYERS = [
    {"errors", "size", "version"},
    {"layout", "frequency", "score", "text", "pattern"},
    {"derive"},
    {"kernel"},
    {"attention"},
    {"rope"},
    {"cache", "ring"},
    {"hf"},
    {"extend", "evaluate"},
    {"cli"},
]
BELOW = {part: set().union(*LAYERS[:level]) for level, layer in enumerate(LAYERS) for part in layer}
# What a folder or file of `kernel` may import of the others, in the same way.
KERNEL = [
    {"lattice"},
    {"softmax"},
    {"reference", "native", "sdpa", "flash", "flex"},
    # It takes the lists of blocks that FlexAttention takes.
    {"triton"},
    {"rates", "heads"},
    {"plan"},
    {"choice", "sides"},
    {"operation"},
]
OPTIONAL = {
    "accelerate",
    "datasets",
    "flash_attn",
    "flash_attn_interface",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
}
MAY_USE_OPTIONAL = {"hf", "extend", "evaluate", "cli"}
# The one file below them that may, once it is called.
PICTURES = "derive/png.py", "matplotlib"

NAMES = [
    "Causal",
    "Chunk",
    "Dilated",
    "Every",
    "LongMixed",
    "LongNet",
    "Longformer",
    "PerHead",
    "Prefix",
    "S2",
    "SCCA",
    "SDA",
    "Sink",
    "SlidingWindow",
    "Streaming",
    "Window",
    "attend",
    "attend_with_lse",
    "plan",
]


def part_of(module: Path) -> str:
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything that a module imports, inside functions too."""
    package = ["longspan", *module.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def named(module: Path) -> str:
    return str(module.relative_to(ROOT))


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_imports_point_down(module: Path):
    part = part_of(module)
    if part in ("__init__", "__main__"):
        return
    assert part in BELOW, f"{part} has no place in the order of imports"
    for line, name in imports(module):
        if name.startswith("longspan."):
            other = name.split(".")[1]
            assert other == part or other in BELOW[part], f"{named(module)}:{line} imports {name}"


@pytest.mark.parametrize("module", sorted((ROOT / "kernel").rglob("*.py")), ids=named)
def test_kernels_never_import_one_another(module: Path):
    """Each has a folder or a file of its own; what they share lies below them, and what chooses one of them above."""
    part = module.relative_to(ROOT).parts[1].removesuffix(".py")
    if part == "__init__":
        return
    level = next(n for n, parts in enumerate(KERNEL) if part in parts)
    below = set().union(*KERNEL[:level])
    for line, name in imports(module):
        if name.startswith("longspan.kernel."):
            other = name.split(".")[2]
            assert other == part or other in below, f"{named(module)}:{line} imports {name}"


def test_headers_include_without_circles():
    """And every one is included, from the file that a compiler is given down."""
    includes = {
        path.name: re.findall(r'^#include "(.+)"$', path.read_text(), flags=re.MULTILINE) for path in CPP
    }
    order = list(TopologicalSorter(includes).static_order())
    assert order[-1] == "library.cpp"
    assert sorted(order) == sorted(includes)


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_optional_packages_stay_above(module: Path):
    if part_of(module) not in MAY_USE_OPTIONAL:
        for line, name in imports(module):
            package = name.split(".")[0]
            allowed = package not in OPTIONAL or (named(module), package) == PICTURES
            assert allowed, f"{named(module)}:{line} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_nothing_is_evaluated_from_text(module: Path):
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile"), f"{named(module)}:{node.lineno}"


@pytest.mark.parametrize(
    "module",
    [*MODULES, *CPP, *sorted(TESTS.glob("*.py")), *sorted(BENCHMARKS.glob("*.py"))],
    ids=lambda module: module.name,
)
def test_files_have_one_job(module: Path):
    assert len(module.read_text().splitlines()) <= 400
    assert module.stem not in ("utils", "util", "common", "helpers", "helper", "misc")


def test_promised_names_are_frozen():
    assert sorted(longspan.__all__) == NAMES
    assert len(NAMES) <= 20
    for name in NAMES:
        assert hasattr(longspan, name)


def test_optional_packages_stay_unimported():
    assert OPTIONAL.isdisjoint(loaded("from longspan import *"))


def test_names_are_loaded_when_they_are_used():
    """Type checkers read imports that do not run: these are the promised names, from where they come."""
    block = next(
        node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If)
    )
    read = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(read) == NAMES
    for name, module in read.items():
        assert getattr(longspan, name) is getattr(import_module(module), name)
    assert set(NAMES) <= set(dir(longspan))
    assert "torch" not in loaded("import longspan; dir(longspan)")
    # Parts are found, too, and `attend` stays the function once its module is loaded.
    assert "torch" in loaded("import longspan; longspan.pattern.Window; assert callable(longspan.attend)")
    with pytest.raises(AttributeError, match="module 'longspan' has no attribute 'nothing'"):
        _ = longspan.nothing


def test_help_does_not_wait_for_torch():
    """Of the command and of each of its commands, whatever they load once they run."""
    program = """
from longspan.cli import app
for name in ("", "extend", "eval", "plan", "read", "digest", "show", "demo"):
    try:
        app([*filter(None, [name]), "--help"])
    except SystemExit as left:
        assert not left.code
"""
    commands = {path.stem for path in (ROOT / "cli").glob("*.py") if "def command(" in path.read_text()}
    assert commands == {"extend", "eval", "plan", "read", "digest", "show", "demo"}
    assert {"torch", "numpy", "transformers", "matplotlib"}.isdisjoint(loaded(program))


def loaded(program: str) -> set[str]:
    """Return the modules that a fresh process holds after a program."""
    report = f"{program}\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())
