"""The order of the calls of the flash kernel: how many there are, and what is copied, cleared and added for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_stand_in import flash_on_cpu
from hypothesis import given
from strategies import patterns
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.kernel import reference
from longspan.kernel.flash import bands as bands_module
from longspan.kernel.flash import flash
from longspan.kernel.flash.band import distinct
from longspan.kernel.flash.bands import band_groups
from longspan.kernel.flash.order import Order, order
from longspan.kernel.lattice.parts import parts
from longspan.kernel.plan import head_groups
from longspan.pattern import (
    S2,
    SCCA,
    Causal,
    Chosen,
    Dilated,
    Keys,
    LongMixed,
    LongNet,
    Nothing,
    Pattern,
    SlidingWindow,
    Streaming,
)
from longspan.score import Scores

LENGTH, HEADS, KEY_HEADS = 512, 16, 4
# What starts no kernel: views, and room that nothing is written to.
FREE = {
    *("view", "as_strided", "transpose", "unsqueeze", "squeeze", "slice", "select", "split", "unbind"),
    *("empty", "empty_like", "new_empty", "empty_strided", "detach", "alias"),
    *("_local_scalar_dense", "promote_types"),
    # Only tests write to fresh memory.
    "fill_",
}


class Launches(TorchDispatchMode):
    """Counts the kernels that a device would be sent; those inside of a flash attention are the library's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        self.counts.update(() if name in FREE else (name,))
        return function(*args, **(kwargs or {}))


def launches(pattern: Pattern) -> tuple[Counter[str], Counter[str]]:
    """Return what attention starts, forward and backward."""
    query, key, value = (
        torch.randn(1, LENGTH, heads, 8).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    groups = band_groups(head_groups(pattern, HEADS, range(LENGTH), range(LENGTH)))
    assert not isinstance(groups, str)
    with flash_on_cpu():
        with Launches() as forward:
            output, _ = flash.attend(query, key, value, None, flash.Work(groups, 0.3))
        into = torch.ones_like(output)
        with Launches() as backward:
            torch.autograd.grad(output, (query, key, value), into)
    return forward.counts, backward.counts


@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(64)], ids=str)
def test_one_band_is_one_call_and_a_look(pattern: Pattern):
    forward, backward = launches(pattern)
    assert forward == {"_flash_attention_forward": 1, "sum": 1}
    assert backward == {"_flash_attention_backward": 1, "sum": 3, "add": 2}


def test_parts_are_merged_at_once():
    """Of each call its log-sum-exp is copied, and its output is weighed and added; four more for all of them."""
    forward, backward = launches(LongNet((32, 128, 512), (1, 2, 4)))
    calls = forward.pop("_flash_attention_forward")
    # Heads that read a term alike are one call, whatever they read beside it: one for each of its residues.
    assert calls == 1 + 2 + 4
    once = {"new_full": 1, "logsumexp": 1, "sub_": 1, "exp_": 1, "sum": 1}
    assert forward == {**once, "copy_": calls, "mul": 1, "addcmul_": calls - 1}
    # What the first term writes is not cleared before; three gradients of each other call are added.
    assert backward.pop("_flash_attention_backward") == calls
    assert (backward["copy_"], backward["add_"], backward["zeros"]) == (3, 3 * (calls - 1), 0)


@pytest.mark.parametrize("pattern", [S2(128), SCCA(32)], ids=str)
def test_what_does_not_overlap_is_written_once(pattern: Pattern):
    forward, backward = launches(pattern)
    calls = forward.pop("_flash_attention_forward")
    assert forward == {"new_full": 1, "copy_": 2 * calls, "sum": 1}
    assert backward["add_"] == 0 and backward["copy_"] == 3 * calls


def test_rectangles_that_share_no_key_are_added_at_once():
    """Residue classes lie between one another."""
    _, backward = launches(LongMixed(16))
    calls = backward["_flash_attention_backward"]
    assert backward["copy_"] + backward["add_"] <= 3 * calls


# Rectangles.

# Two keys that all read, and every third one: rows of two at every place, each of them in two rectangles.
OVERLAPPING = (Keys((0, 2)) | Dilated(3)).T.T
# Blocks of keys from the last to the first, which no view reads in one.
BACKWARDS = Chosen([[3], [2], [1], [0]], size=8)


@pytest.mark.parametrize("pattern", [OVERLAPPING, BACKWARDS], ids=["overlapping", "backwards"])
@pytest.mark.parametrize("batch", [1, 2])
def test_rectangles_of_one_call_share_no_query_and_go_on(pattern: Pattern, batch: int):
    groups = band_groups(head_groups(pattern, 2, range(32), range(32)))
    assert not isinstance(groups, str)
    for band in groups[0].bands:
        assert distinct(band.query, band.shape) and min(band.key.outer, band.key.inner) >= 0
    query, key, value = (torch.randn(batch, 2, 32, 8, dtype=torch.float64) for _ in range(3))
    with flash_on_cpu():
        output, _ = flash.attend(query, key, value, None, flash.Work(groups, 0.3))
    truth, _ = reference.attend(query, key, value, pattern, queries=range(32), scale=0.3, changes=Scores())
    torch.testing.assert_close(output, truth, rtol=0, atol=1e-9)


def test_lattices_that_go_backwards_are_taken_apart(monkeypatch: pytest.MonkeyPatch):
    """However many rectangles they have; more than all bands that are looked at are refused."""
    monkeypatch.setattr(bands_module, "FEW", 0)
    lattices = parts((Dilated(4, offset=2) & ~Keys()).T, range(61), range(61), size=4)
    assert any(part.key.inner < 0 for part in lattices)
    found = bands_module.bands(lattices)
    assert not isinstance(found, str) and not any(band.backwards for band in found)
    monkeypatch.setattr(bands_module, "MOST", len(found) - 1)
    assert isinstance(bands_module.bands(lattices), str)


# The law.


def read(done: Order, heads: int, length: int, key_heads: int, keys: int) -> tuple[Tensor, Tensor]:
    """Return how often each query and each key is touched, by a loop over places."""
    queries, found = (
        torch.zeros(heads, length, dtype=torch.int),
        torch.zeros(key_heads, keys, dtype=torch.int),
    )
    for step in done.steps:
        for lattice, tensor, members in (
            (step.band.query, queries, step.heads),
            (step.band.key, found, step.key_heads),
        ):
            for outer in range(step.band.shape[0]):
                for inner in range(step.band.shape[1]):
                    for place in range(lattice.places):
                        at = (
                            lattice.start
                            + outer * lattice.outer
                            + inner * lattice.inner
                            + place * lattice.step
                        )
                        tensor[list(members), at] += 1
    return queries, found


@given(patterns)
def test_what_is_said_of_an_order_is_so(pattern: Pattern):
    heads, length, key_heads = 4, 31, 2
    groups = band_groups(head_groups(pattern, heads, range(length), range(length)))
    if isinstance(groups, str):
        return
    done = order(groups, heads, length, key_heads, length)
    queries, keys = read(done, heads, length, key_heads, length)
    assert done.every_row == bool((queries > 0).all())
    assert done.layers >= int(queries.max()) and (done.layers > 1) == bool((queries > 1).any())
    if done.keys_once:
        assert int(keys.max()) <= 1
    # No two steps of a layer share a query, and a first step shares no key with one before it.
    for layer in range(done.layers):
        of_it = Order(
            tuple(step for step in done.steps if step.layer == layer), 1, False, False, False, False
        )
        touched, _ = read(of_it, heads, length, key_heads, length)
        assert int(touched.max()) <= 1
        if layer == 0:
            assert done.rows_written == bool((touched > 0).all())
    before = torch.zeros_like(keys)
    written = torch.zeros_like(keys)
    for step in done.steps:
        _, now = read(Order((step,), 1, False, False, False, False), heads, length, key_heads, length)
        if step.first:
            assert not (before * now).any() and int(now.max()) <= 1
            written += now
        before += now
    assert done.keys_written == bool((written > 0).all())


def test_nothing_is_read_by_nothing():
    done = order(band_groups(head_groups(Nothing(), 4, range(9), range(9))), 4, 9, 2, 9)
    assert (done.steps, done.layers, done.every_row, done.keys_written) == ((), 0, False, False)
    done = order(band_groups(head_groups(Streaming(8), 4, range(31), range(31))), 4, 31, 2, 31)
    assert done.masked and done.layers == 2
