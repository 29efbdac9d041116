"""What holds for every test: memory that was not written is NaN, and examples are the same on every run.

Tests that need a CUDA device are marked `cuda` when they are collected, and those of them that look once at each kernel and
each family of patterns `brief`, too.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

if shutil.which("nvidia-smi") is None:
    # Without a GPU, programs run in Triton's interpreter. Triton reads this when torch imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

# What a test says that is skipped where there is no device, and the files whose tests are few.
NO_DEVICE = "no CUDA device on this machine"
BRIEF = ("test_cuda.py", "test_kernel_triton.py", "test_hf_compile.py")

settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", settings.get_profile("fixed"), derandomize=False, max_examples=2000)
settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in marks(item):
            item.add_marker(name)


def marks(item: pytest.Item) -> list[str]:
    """Return the markers of a test: what it says of itself decides, so that a new test has them by existing."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    skipped = any(mark.kwargs.get("reason") == NO_DEVICE for mark in item.iter_markers("skipif"))
    # Its programs run on the device that there is.
    own = item.path.name == "test_kernel_triton.py"
    if not (skipped or own or given.get("device") == "cuda"):
        return []
    return ["cuda", "brief"] if item.path.name in BRIEF or not given else ["cuda"]


def _spoiled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def spoil(*arguments: object, **options: object) -> torch.Tensor:
        tensor = allocate(*arguments, **options)
        if tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    return spoil


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is often zero, which hides a kernel that forgets to write a row."""
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(place, name, _spoiled(getattr(place, name)))
    yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_DEVICE)
    return torch.device(request.param)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command line: exit code, output, errors."""
    # What the command line is made of need not be there where it is not run.
    from longspan import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["longspan", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "110")
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return run
