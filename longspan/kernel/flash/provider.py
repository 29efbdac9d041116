"""Providers: which flash attention takes a call, and why not those before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longspan.kernel.flash.band import Band
from longspan.kernel.flash.bands import BandGroup
from longspan.kernel.flash.libraries import CuDNN, Four, Library, Three, Torch, Two
from longspan.kernel.lattice.parts import Lattice

Capability = tuple[int, int]
# First numbers of compute capabilities: all that have the instructions, Hopper, and Hopper with Blackwell's servers.
ALL, HOPPER, SERVERS = range(8, 100), range(9, 10), range(9, 11)


@dataclass(frozen=True)
class Provider:
    """One flash attention and what it takes.

    Attributes:
        name: as plans say it.
        library: how it is called.
        devices: compute capabilities that it is taken for, by their first numbers.
        widest: numbers in a head, at most.
        windows: whether it takes bands other than causal and plain ones.
        least: places on either side of a call, at least.
        tile: what the places on either side are a multiple of.
        steps: whether it reads every n-th row where it lies.
    """

    name: str
    library: type[Library]
    devices: range
    widest: int
    windows: bool = True
    least: int = 1
    tile: int = 1
    steps: bool = True

    def refusal(self, band: Band, width: int, capability: Capability) -> str | None:
        """Say why it does not take a band, or None where it does."""
        if capability[0] not in self.devices:
            return f"is not taken for compute capability {'.'.join(map(str, capability))}"
        if width > self.widest:
            return f"takes heads of {self.widest} numbers at most, got {width}"
        if not self.windows and not band.causal and (band.low, band.high) != (None, None):
            return "takes no windows"
        places = band.query.places, band.key.places
        if min(places) < self.least:
            return f"is taken for {self.least:,} queries and keys at least"
        if any(side % self.tile for side in places):
            return f"is taken for multiples of {self.tile} queries and keys"
        if not self.steps and max(band.query.step, band.key.step) > 1:
            return "would copy what it reads, since rows lie apart"
        return self.library.missing()


# The first that takes a call has it. PyTorch's own kernel for the whole triangle is cuDNN's where there is one, so
# nothing of PyTorch's is faster there. It builds a graph for every new shape, so small calls, whose shapes change
# more often, go elsewhere; and versions of it have made NaN of a last tile that is not full (PyTorch issue
# 196678, cudnn-frontend issue 1072), so there is none. Kernels made for a device come before those that run anywhere,
# and PyTorch's own before a package of the same kernels.
PROVIDERS = (
    Provider("cuDNN", CuDNN, SERVERS, 128, windows=False, least=2_048, tile=128, steps=False),
    Provider("FlashAttention 3", Three, HOPPER, 256),
    Provider("FlashAttention 4", Four, SERVERS, 128),
    Provider("PyTorch", Torch, ALL, 256),
    Provider("FlashAttention 2", Two, ALL, 256),
)

# Numbers in a head that one of them takes, at most.
WIDEST = max(each.widest for each in PROVIDERS)
# What any of them is asked to take: a window, over however few places.
_ANY = Band(Lattice(0, 2, 2, 0, 0), Lattice(0, 2, 3, 0, 0), (1, 1), low=0, high=0)


def capability(device: torch.device | None = None) -> Capability | None:
    """Return the compute capability of a device, of the current one where none is given, or None where it is none of
    CUDA."""
    there = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.get_device_capability(device) if there else None


def refusal(width: int, capability: Capability | None) -> str | None:
    """Say why no flash attention takes heads of a width on a device, or None where one takes them whatever a band is;
    where there is no device, only the width is asked for."""
    if capability is None:
        return None if width <= WIDEST else f"takes heads of {WIDEST} numbers at most, got {width}"
    reasons = [f"{each.name} {why}" for each in PROVIDERS if (why := each.refusal(_ANY, width, capability))]
    return "; ".join(reasons) if len(reasons) == len(PROVIDERS) else None


def chosen(band: Band, width: int, capability: Capability | None) -> type[Library]:
    """Return what takes a band; where there is no device, PyTorch's operators, whatever stands behind them."""
    if capability is None:
        return Torch
    return next(each.library for each in PROVIDERS if not each.refusal(band, width, capability))


def account(
    groups: tuple[BandGroup, ...], width: int, capability: Capability | None
) -> Iterator[tuple[str, str]]:
    """Yield who takes how many bands of a plan, and why not those who come before, each with a label."""
    if capability is None:
        yield "by", "PyTorch, where there is no device to ask for a faster one"
        return
    takers, passed = Counter(), Counter()
    for band in (band for group in groups for band in group.bands):
        for each in PROVIDERS:
            why = each.refusal(band, width, capability)
            if why is None:
                takers[each.name] += 1
                break
            passed[each.name, why] += 1
    if takers:
        yield "by", ", ".join(f"{name} {number:,}" for name, number in takers.items())
    for (name, why), number in passed.items():
        yield "not by", f"{name} {number:,}: {why}"
