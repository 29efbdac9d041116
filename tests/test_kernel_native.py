"""The native kernel beyond the matrix: what it says where it is not there, its instruction sets, its threads."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_kernel_matrix import check, tensors

from longspan import attend, attend_with_lse, plan
from longspan.errors import PlanError
from longspan.kernel import plan as plan_module
from longspan.kernel.native import compiler, native
from longspan.pattern import (
    SDA,
    BigBird,
    Causal,
    Longformer,
    LongMixed,
    LongNet,
    Pattern,
    PerHead,
    SlidingWindow,
)
from longspan.score import ALiBi, SoftCap

CPU = torch.device("cpu")
needed = pytest.mark.skipif(bool(native.MISSING), reason=f"native {native.MISSING}")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Plans that are not kept for others, and a way to say whether the kernel is there."""
    plan_module._plan.cache_clear()
    yield monkeypatch
    plan_module._plan.cache_clear()


def test_where_it_was_not_built_the_plan_says_so(plans: pytest.MonkeyPatch):
    plans.setattr(native, "MISSING", native.NOT_BUILT)
    assert (
        "  kernel     sdpa\n"
        "  refused    native: was not built from this version's source; where there is a C++ compiler, "
        "`python -m longspan.kernel.native.compiler` builds it\n"
    ) in str(plan(SlidingWindow(512), length=8192, heads=8))


@pytest.mark.parametrize(
    ("dtype", "scores", "why"),
    [
        (torch.float64, (), "takes float32 or bfloat16, got float64"),
        (torch.float32, SoftCap(5.0), "cannot cap scores softly"),
        (torch.float32, ALiBi(), "knows no distances, which ALiBi needs"),
    ],
    ids=["float64", "cap", "ALiBi"],
)
def test_what_it_cannot_is_refused(dtype: torch.dtype, scores: object, why: str):
    given = tensors(31, 31, dtype, CPU)
    with pytest.raises(PlanError) as raised:
        attend(*given, Causal(), scores=scores, kernel="native")
    assert f"  refused  native  {why}\n" in str(raised.value)
    attend(*given, Causal(), scores=scores)


def test_few_queries_are_taken_where_it_is_asked_for(plans: pytest.MonkeyPatch):
    plans.setattr(native, "MISSING", "")
    made = plan(Causal(), length=99, queries=range(95, 99))
    assert (made.kernel, made.refused[0]) == ("sdpa", ("native", "is taken from 16 queries on, got 4"))
    assert plan(Causal(), length=99, queries=range(95, 99), kernel="native").kernel == "native"
    assert plan(Causal(), length=99, queries=range(80, 99)).kernel == "native"


def test_where_there_is_no_compiler_nothing_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiler.build() == ([], "no C++ compiler was found: tried CXX, g++, c++ and clang++")


def test_what_the_compiler_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source = tmp_path / "cpp"
    source.mkdir()
    (source / compiler.MAIN).write_text("no C++")
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho it is not C++ >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(compiler, "SOURCE", source)
    monkeypatch.setenv("CXX", str(failing))
    assert compiler.build() == ([], f"{failing} for plain: it is not C++")
    assert list(tmp_path.glob("*.so")) == []


@needed
def test_a_library_of_another_source_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What it takes may lie elsewhere in memory, which nothing but its name would tell."""
    source = tmp_path / "cpp"
    shutil.copytree(compiler.SOURCE, source)
    for name in compiler.SETS:
        if compiler.library(name).exists():
            shutil.copy(compiler.library(name), tmp_path)
    monkeypatch.setattr(compiler, "SOURCE", source)
    assert native._loaded()[1] == ""
    for file in (compiler.MAIN, "work.hpp"):
        text = (source / file).read_text()
        (source / file).write_text(text + "// Changed.\n")
        assert native._loaded() == (None, native.NOT_BUILT)
        (source / file).write_text(text)
        assert native._loaded()[1] == ""


def test_building_removes_libraries_of_other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source, building = tmp_path / "cpp", tmp_path / "building"
    source.mkdir()
    building.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "$2" > "$2"\n')
    building.chmod(0o755)
    monkeypatch.setattr(compiler, "SOURCE", source)
    monkeypatch.setenv("CXX", str(building))
    for text in ("one", "other"):
        (source / compiler.MAIN).write_text(text)
        made, problem = compiler.build()
        assert problem == ""
        assert set(tmp_path.glob("*.so")) == set(made)
        written = {path: path.read_text() for path in made}
        assert compiler.build() == (made, "")
        assert {path: path.read_text() for path in made} == written
    # Other options make another library too.
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-g"))
    assert not set(compiler.build()[0]) & set(made)


@needed
@pytest.mark.parametrize("name", compiler.SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_keeps_to_the_formula(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    if not native.able(name) or not compiler.library(name).exists():
        pytest.skip(f"{platform.machine()} has no {name} here")
    monkeypatch.setattr(native, "_library", ctypes.CDLL(str(compiler.library(name))))
    for pattern in (SlidingWindow(70), BigBird(16), PerHead([LongNet((32, 128), (1, 4)), Causal()])):
        check(pattern, tensors(201, 201, dtype, CPU, width=20, batch=1), "native")


@needed
@pytest.mark.parametrize("name", compiler.SETS)
@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_every_instruction_set_tells_what_is_no_number(
    name: str, worst: float, monkeypatch: pytest.MonkeyPatch
):
    if not native.able(name) or not compiler.library(name).exists():
        pytest.skip(f"{platform.machine()} has no {name} here")
    monkeypatch.setattr(native, "_library", ctypes.CDLL(str(compiler.library(name))))
    query, key, value = tensors(40, 40, torch.float32, CPU)
    key[0, 0, 12, 3] = worst
    struck = torch.zeros(query.shape[:3], dtype=torch.bool)
    struck[0, :2, 12:] = True
    output, lse = attend_with_lse(query.abs() + 0.1, key, value, Causal(), kernel="native")
    assert torch.equal(output.isnan().all(-1), struck) and torch.equal(output.isnan().any(-1), struck)
    assert torch.equal(lse.isnan(), struck)


@needed
def test_a_single_key_is_given_whole():
    query, key, value = tensors(1, 1, torch.float32, CPU)
    output, lse = attend_with_lse(query, key, value, Causal(), kernel="native")
    key, value = (side.repeat_interleave(2, dim=1) for side in (key, value))
    torch.testing.assert_close(output, value)
    torch.testing.assert_close(lse, (query * key).sum(-1) / query.shape[-1] ** 0.5)


@needed
@pytest.mark.parametrize(
    "pattern",
    [SlidingWindow(40), LongNet((32, 128), (1, 4)), BigBird(16), LongMixed(16, dilation=8)],
    ids=str,
)
def test_threads_change_no_number(pattern: Pattern, monkeypatch: pytest.MonkeyPatch):
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        leaves = [side.requires_grad_() for side in tensors(300, 300, torch.float32, CPU)]
        output, lse = attend_with_lse(*leaves, pattern, kernel="native")
        results.append([output, lse, *torch.autograd.grad([output.sum() + lse.sum()], leaves)])
    for made in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(made, results[0], strict=True))


@needed
@pytest.mark.parametrize(("key_heads", "abreast"), [(4, [2]), (1, [])])
def test_heads_of_their_own_patterns_go_side_by_side(
    key_heads: int, abreast: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Backward, where each has keys of its own; those that share keys add to the same gradients, one after the other."""
    asked = []

    def pool(workers: int) -> ThreadPoolExecutor:
        asked.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(native, "ThreadPoolExecutor", pool)
    check(BigBird(16), tensors(300, 300, torch.float32, CPU, heads=4, key_heads=key_heads, batch=1), "native")
    assert asked == abreast


@needed
def test_more_threads_than_key_heads_keep_to_the_formula(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for pattern in (SlidingWindow(40), LongNet((32, 128), (1, 4))):
        check(pattern, tensors(300, 300, torch.float32, CPU, heads=4, key_heads=1, batch=1), "native")


STRETCHED = [
    SlidingWindow(40),
    BigBird(16, length=301, causal=False),
    Longformer(9, global_tokens=5, causal=False),
    SDA(8),
    LongMixed(16, dilation=8),
    LongNet((32, 128), (1, 4)),
    PerHead([SlidingWindow(9), Causal(), SDA(4), LongNet((4, 16), (1, 2))]),
]


@needed
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("keys", [16, 40, 200])
@pytest.mark.parametrize("pattern", STRETCHED, ids=str)
def test_gradients_of_bfloat16_are_the_same_in_any_room(
    pattern: Pattern, keys: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    """Room for the sums of some keys at a time, with and without room for what rounding leaves out in between."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for key_heads in (1, 2, 4):
        given = tensors(301, 301, torch.bfloat16, CPU, key_heads=key_heads, batch=1, width=20)
        into = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)

        def gradients(given: list[torch.Tensor] = given, into: torch.Tensor = into) -> list[torch.Tensor]:
            leaves = [side.detach().requires_grad_() for side in given]
            output = attend(*leaves, pattern, kernel="native")
            return [output, *torch.autograd.grad(output, leaves, into)]

        truth = gradients()
        with monkeypatch.context() as changed:
            changed.setattr(native, "HOLDING", keys * 8 * 32 * threads)
            for got, right in zip(gradients(), truth, strict=True):
                # One unit in the last place, and a 256th of one for each stretch before.
                torch.testing.assert_close(got, right, rtol=2**-7, atol=1e-4)
            changed.setattr(native, "LEFT", 0)
            check(pattern, given, "native")


@needed
def test_what_bfloat16_leaves_out_between_levels_is_kept(monkeypatch: pytest.MonkeyPatch):
    """Rounded at every level, an output would be one unit in the last place off now and then."""
    pattern = LongNet((32, 128, 301), (1, 2, 4))
    given = tensors(301, 301, torch.bfloat16, CPU, batch=1)
    exact = attend(*(side.float() for side in given), pattern, kernel="native").to(torch.bfloat16)
    assert (attend(*given, pattern, kernel="native") != exact).float().mean() < 0.01
    monkeypatch.setattr(native, "LEFT", 0)
    assert (attend(*given, pattern, kernel="native") != exact).float().mean() > 0.05
