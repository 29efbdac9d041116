"""The flash attentions behind the flash kernel: what each is called with, which is chosen, and that all are exact."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from flash_stand_in import Calls, cudnn_on_cpu, flash_on_cpu, four_on_cpu, three_on_cpu, two_on_cpu
from test_kernel_matrix import check, tensors
from torch import Tensor

from longspan import plan
from longspan.errors import PlanError
from longspan.kernel import rates, reference
from longspan.kernel.flash import flash, libraries, provider
from longspan.kernel.flash.bands import band_groups
from longspan.kernel.plan import _plan, head_groups
from longspan.pattern import (
    S2,
    Causal,
    Chunk,
    LongMixed,
    LongNet,
    Pattern,
    SlidingWindow,
    Streaming,
    Window,
)
from longspan.score import Scores

CPU = torch.device("cpu")
STAND_INS = {
    "cuDNN": cudnn_on_cpu,
    "FlashAttention 3": three_on_cpu,
    "FlashAttention 4": four_on_cpu,
    "PyTorch": flash_on_cpu,
    "FlashAttention 2": two_on_cpu,
}
# Causal, plain and windows; one part and several; heads that read alike and heads that do not.
PATTERNS = (
    Causal(),
    Chunk(32),
    Chunk(32) & Causal(),
    SlidingWindow(9),
    Window(9),
    Streaming(20),
    S2(32),
    LongMixed(9),
    LongNet((8, 32), (1, 4)),
    Causal() + Chunk(32),
)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Forget what was found out about libraries, before and after."""

    def forget() -> None:
        for library in (libraries.Three, libraries.Four, libraries.Two):
            library.missing.cache_clear()
        _plan.cache_clear()

    forget()
    yield
    forget()


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Say of every device that it is one of CUDA, with PyTorch's own kernel."""
    monkeypatch.setattr(provider, "capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


@contextmanager
def taking(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[tuple[Calls, Calls]]:
    """Leave one provider, however small the calls, and PyTorch's own for what that does not take, with stand-ins behind
    both; yield what is called of the one, and of PyTorch's."""
    on(monkeypatch, (9, 0))
    rows = [each for each in provider.PROVIDERS if each.name in (name, "PyTorch")]
    rows.sort(key=lambda each: each.name == "PyTorch")
    monkeypatch.setattr(
        provider, "PROVIDERS", tuple(replace(each, least=min(each.least, 2), tile=1) for each in rows)
    )
    with flash_on_cpu() as own:
        if name == "PyTorch":
            yield own, own
        else:
            with STAND_INS[name]() as calls:
                yield calls, own


def work(pattern: Pattern, queries: range, keys: int, heads: int) -> flash.Work:
    groups = band_groups(head_groups(pattern, heads, queries, range(keys)))
    assert not isinstance(groups, str)
    return flash.Work(groups, 0.3)


def compare(
    pattern: Pattern, given: tuple[Tensor, ...], queries: range | None = None, sinks: Tensor | None = None
) -> None:
    """Hold output, log-sum-exp and gradients, those of both, against the reference."""
    queries = range(given[0].shape[2]) if queries is None else queries
    asked = work(pattern, queries, given[1].shape[2], given[0].shape[1])
    generator = torch.Generator().manual_seed(3)
    into = [
        torch.randn(shape, generator=generator, dtype=given[0].dtype)
        for shape in (given[0].shape, given[0].shape[:3])
    ]
    results = []
    for kernel in ("reference", "flash"):
        leaves = [side.detach().requires_grad_() for side in (*given, *([] if sinks is None else [sinks]))]
        own = leaves[3] if sinks is not None else None
        if kernel == "reference":
            changes = Scores(None, None, own)
            found = reference.attend(*leaves[:3], pattern, queries=queries, scale=0.3, changes=changes)
        else:
            found = flash.attend(*leaves[:3], own, asked)
        results.append([*found, *torch.autograd.grad(found, leaves, into)])
    for right, got in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-9, msg=lambda more: f"{pattern}: {more}")


# Each library.


@pytest.mark.parametrize("name", STAND_INS)
def test_all_are_exact(name: str, monkeypatch: pytest.MonkeyPatch):
    """Also where several parts, of several libraries, are merged, and keys are shared."""
    with taking(monkeypatch, name) as (calls, own):
        for heads in ((4, 4), (8, 2)):
            given = tensors(96, 96, torch.float64, CPU, heads=heads[0], key_heads=heads[1])
            for pattern in PATTERNS:
                compare(pattern, given)
                compare(pattern, given, sinks=torch.randn(heads[0], dtype=torch.float64))
        given = tensors(40, 96, torch.float64, CPU)
        compare(Causal(), given, queries=range(56, 96))
        compare(Chunk(96), given, queries=range(56, 96))
    assert {call["name"] for call in calls} == {"forward", "backward"}
    # Only cuDNN leaves windows, and parts of every n-th row, to others.
    assert name in ("cuDNN", "PyTorch") or not own


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_keep_to_the_dtypes_of_cuda(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The stand-ins hold log-sum-exps to float32, and everything else to the dtype of the query."""
    with taking(monkeypatch, name) as (calls, _):
        for pattern in (Causal(), LongMixed(9), Streaming(20)):
            given = [
                side.to(dtype).requires_grad_()
                for side in tensors(96, 96, torch.float32, CPU, heads=8, key_heads=2)
            ]
            output, lse = flash.attend(*given, None, work(pattern, range(96), 96, 8))
            assert output.dtype == dtype and lse.dtype == torch.float32
            truth, _ = reference.attend(
                *(side.double() for side in given), pattern, queries=range(96), scale=0.3, changes=Scores()
            )
            torch.testing.assert_close(output.double(), truth.double(), rtol=0.02, atol=0.02)
            grads = torch.autograd.grad(output.sum(), given)
            assert {grad.dtype for grad in grads} == {dtype}
    assert calls


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("turned", [False, True], ids=["heads first", "places first"])
def test_all_take_tensors_as_models_have_them(name: str, turned: bool, monkeypatch: pytest.MonkeyPatch):
    """With gaps between rows, in either order, and gradients in another order than the output."""
    with taking(monkeypatch, name):
        for pattern in (Causal(), S2(32), Chunk(32)):
            whole = torch.randn(2, 96, 3, 4, 16, dtype=torch.float64)
            query, key, value = (whole[:, :, number].transpose(1, 2) for number in range(3))
            if turned:
                query, key = query.contiguous(), key.contiguous()
            compare(pattern, (query, key, value))


@pytest.mark.parametrize("name", ["cuDNN", "FlashAttention 3", "PyTorch"])
@pytest.mark.parametrize("width", [120, 128, 249, 256])
def test_a_gradient_of_the_log_sum_exp_never_makes_a_head_too_wide(
    width: int, name: str, monkeypatch: pytest.MonkeyPatch
):
    """The stand-ins refuse more than 256 numbers, cuDNN more than 128."""
    with taking(monkeypatch, name) as (calls, _):
        given = [0.2 * side for side in tensors(24, 24, torch.float64, CPU, width=width, heads=2)]
        for pattern in (Causal(), SlidingWindow(9), Streaming(12)):
            compare(pattern, tuple(given))
    most = 128 if name == "cuDNN" else 256
    assert all(call["query"].shape[-1] <= most for call in calls)


@pytest.mark.parametrize("spoiled", ["query", "key", "value", "output", "lse"])
def test_a_pass_of_its_own_keeps_what_is_no_number_with_its_readers(
    spoiled: str, monkeypatch: pytest.MonkeyPatch
):
    """Where the gradient of the log-sum-exp has no column left."""
    monkeypatch.setattr(provider, "WIDEST", 16)
    with flash_on_cpu():
        given = tensors(31, 31, torch.float64, CPU, width=16)
        into = [torch.ones_like(given[0]), torch.ones_like(given[0][..., 0])]
        target = [*given, *into][["query", "key", "value", "output", "lse"].index(spoiled)]
        target[0, 1, 12] = torch.nan
        for pattern in (SlidingWindow(7), Chunk(8), Streaming(9)):
            results = []
            for kernel in ("reference", "flash"):
                leaves = [side.detach().requires_grad_() for side in given]
                if kernel == "reference":
                    found = reference.attend(*leaves, pattern, queries=range(31), scale=0.3, changes=Scores())
                else:
                    found = flash.attend(*leaves, None, work(pattern, range(31), 31, leaves[0].shape[1]))
                results.append([*found, *torch.autograd.grad(found, leaves, into)])
            for right, got in zip(*results, strict=True):
                torch.testing.assert_close(got, right, rtol=0, atol=1e-10, equal_nan=True)


def test_pytorch_is_asked_what_all_its_versions_take():
    """Arguments by the names and places that PyTorch 2.11 has, which later versions only add to."""
    known = {
        "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
        "return_debug_mask scale window_size_left window_size_right",
        "_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k "
        "dropout_p is_causal rng_state unused scale window_size_left window_size_right",
        "_scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal "
        "return_debug_mask scale",
        "_scaled_dot_product_cudnn_attention_backward": "grad_out query key value out logsumexp philox_seed "
        "philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal scale",
    }
    for name, arguments in known.items():
        schema = getattr(torch.ops.aten, name).default._schema
        names = [each.name for each in schema.arguments]
        assert names[: len(arguments.split())] == arguments.split()
        assert all(each.has_default_value() for each in schema.arguments[len(arguments.split()) :])


# The choice.


def takers(pattern: Pattern, length: int, width: int = 128, heads: int = 8) -> dict[str, str]:
    """Return what a plan says of who takes its bands."""
    _plan.cache_clear()
    made = plan(
        pattern,
        length=length,
        heads=heads,
        width=width,
        dtype="bfloat16",
        device="cuda",
        kernel="flash",
    )
    return dict(
        line.strip().split("  ", 1)
        for line in str(made).splitlines()
        if line.startswith(("  by ", "  not by"))
    )


def test_cudnn_takes_what_is_large_and_whole(monkeypatch: pytest.MonkeyPatch):
    on(monkeypatch, (9, 0))
    with cudnn_on_cpu():
        assert takers(Causal(), 32_768)["by"].strip() == "cuDNN 1"
        assert takers(Chunk(4_096) & Causal(), 32_768)["by"].strip() == "cuDNN 1"
        found = takers(SlidingWindow(4_096), 32_768)
        assert found["by"].strip() == "PyTorch 1"
        assert "takes no windows" in str(plan_of(SlidingWindow(4_096), 32_768))
        for pattern, length, width, why in (
            (Causal(), 1_920, 128, "cuDNN 1: is taken for 2,048 queries and keys at least"),
            (Causal(), 4_100, 128, "cuDNN 1: is taken for multiples of 128 queries and keys"),
            (Causal(), 4_096, 160, "cuDNN 1: takes heads of 128 numbers at most, got 160"),
            (LongNet((16_384,), (4,)), 32_768, 128, "would copy what it reads, since rows lie apart"),
        ):
            text = str(plan_of(pattern, length, width))
            assert why in text and "  by         PyTorch" in text
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            assert "cuDNN 1: is switched off in torch.backends.cuda" in str(plan_of(Causal(), 4_096))
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
        torch.use_deterministic_algorithms(True)
        try:
            assert "has no gradients that come out the same each time" in str(plan_of(Causal(), 4_096))
        finally:
            torch.use_deterministic_algorithms(False)
    assert "cuDNN 1: needs cuDNN 9, got none" in str(plan_of(Causal(), 4_096))
    on(monkeypatch, (8, 0))
    assert "cuDNN 1: is not taken for compute capability 8.0" in str(plan_of(Causal(), 4_096))


def plan_of(pattern: Pattern, length: int, width: int = 128) -> Any:
    _plan.cache_clear()
    return plan(pattern, length=length, heads=8, width=width, dtype="bfloat16", device="cuda", kernel="flash")


def test_the_plan_names_who_takes_the_bands(monkeypatch: pytest.MonkeyPatch):
    on(monkeypatch, (9, 0))
    with three_on_cpu(), cudnn_on_cpu():
        text = str(plan_of(Streaming(4_096), 32_768))
    assert (
        "\n  kernel     flash\n  by         FlashAttention 3 2\n  not by     cuDNN 2: takes no windows\n"
        in text
    )


@pytest.mark.parametrize(
    ("name", "capability", "takes"),
    [
        ("FlashAttention 3", (9, 0), True),
        ("FlashAttention 3", (10, 0), False),
        ("FlashAttention 3", (8, 0), False),
        ("FlashAttention 4", (9, 0), True),
        ("FlashAttention 4", (10, 0), True),
        ("FlashAttention 4", (12, 0), False),
        ("FlashAttention 2", (8, 0), False),
    ],
)
def test_what_is_installed_is_taken_where_it_is_made_for(
    name: str, capability: tuple[int, int], takes: bool, monkeypatch: pytest.MonkeyPatch
):
    """PyTorch's own comes before a package of the same kernels."""
    on(monkeypatch, capability)
    with STAND_INS[name]():
        assert takers(SlidingWindow(512), 8_192)["by"].strip() == (f"{name} 1" if takes else "PyTorch 1")
    _plan.cache_clear()


def test_a_package_takes_what_pytorch_was_built_without(monkeypatch: pytest.MonkeyPatch):
    on(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with two_on_cpu():
        assert takers(SlidingWindow(512), 8_192)["by"].strip() == "FlashAttention 2 1"
    libraries.Two.missing.cache_clear()
    why = provider.refusal(64, (8, 0))
    assert "PyTorch this PyTorch was built without it" in str(why)
    assert "FlashAttention 2 flash_attn_2_cuda is not installed" in str(why)


def test_a_device_that_none_is_made_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    on(monkeypatch, (7, 5))
    with pytest.raises(PlanError) as raised:
        plan_of(Causal(), 4_096)
    assert (
        "flash  cuDNN is not taken for compute capability 7.5; "
        "FlashAttention 3 is not taken for compute capability 7.5; "
        "FlashAttention 4 is not taken for compute capability 7.5; "
        "PyTorch is not taken for compute capability 7.5; "
        "FlashAttention 2 is not taken for compute capability 7.5"
    ) in str(raised.value)


def test_what_several_groups_read_alike_counts_as_one_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "CALL", 10**15)
    groups = head_groups(LongNet((512, 2_048), (1, 4)), 8, range(8_192), range(8_192))
    banded = band_groups(groups)
    assert not isinstance(banded, str) and len(banded) == 4
    assert str(rates.dearer.__wrapped__(groups, banded, 8_192)).startswith("takes 5 calls")


def test_another_signature_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """A library that takes other arguments than those known is not called, and is said to be."""
    on(monkeypatch, (9, 0))
    with four_on_cpu():
        module = sys.modules["flash_attn.cute.interface"]
        monkeypatch.setattr(module, "_flash_attn_bwd", lambda q, k, v, out, dout, lse: None)
        assert "FlashAttention 4 1: is installed, but takes other arguments than those known here" in str(
            plan_of(SlidingWindow(512), 8_192)
        )


# Where there is a CUDA device.


@pytest.mark.parametrize(
    "pattern",
    [Causal(), Chunk(2_048), Chunk(2_048) & Causal(), S2(4_096), Causal() + Chunk(2_048)],
    ids=str,
)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_keeps_to_the_formula_where_cudnn_can(pattern: Pattern):
    """Whatever the device has takes it; merged parts too, of which cuDNN is given the log-sum-exp of the whole."""
    check(pattern, tensors(4_096, 4_096, torch.bfloat16, torch.device("cuda"), width=128, heads=4), "flash")
