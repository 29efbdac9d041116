"""Measure one device: rates of attention and of a matrix product, seconds of planning, distances from the truth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from listing import forget
from torch import Tensor

from longspan import attend_with_lse, plan
from longspan.derive.cost import cost
from longspan.pattern import Pattern

_FORWARD, _BACKWARD = 4, 10
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured at which size; lengths in tokens."""

    product: int = 8_192
    dense: int = 32_768
    window: int = 4_096
    medium: int = 131_072
    long: int = 1_048_576
    longest: int = 4_194_304
    stream: int = 1 << 30
    chunk: int = 1 << 24
    first: int = 2_048
    samples: int = 16
    heads: int = 8
    width: int = 64
    repeats: int = 5


TOY = Sizes(64, 64, 16, 96, 128, 192, 512, 256, 16, 8, 4, 16, 1)


class Meter:
    """Tensors of one dtype on one device, and what is measured of them.

    Attributes:
        sizes, device, dtype: what is measured.
        product: operations per second of a large matrix product, the yardstick.
    """

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.product = self._product()

    def _product(self) -> float:
        size = self.sizes.product
        factors = torch.randn(2, size, size, device=self.device, dtype=self.dtype)
        return 2 * size**3 / self.median(lambda: factors[0] @ factors[1])

    def rates(self, name: str, operation: Callable[..., Tensor], pattern: Pattern, length: int) -> Row:
        """Return rates of useful work, forward and backward, and as shares of the product."""
        sizes = self.sizes
        pairs = cost(pattern, length=length, heads=sizes.heads, width=sizes.width).pairs
        query, key, value, seed = self.tensors(length)
        times: dict[str, list[float]] = {"forward": [], "backward": []}
        # The first round warms up and is not kept.
        for _ in range(sizes.repeats + 1):
            begin = self.now()
            output = operation(query, key, value)
            middle = self.now()
            output.backward(seed)
            times["forward"].append(middle - begin)
            times["backward"].append(self.now() - middle)
        row: Row = {"what": name, "length": length, "pairs": pairs}
        for side, work in (("forward", _FORWARD), ("backward", _BACKWARD)):
            seconds = statistics.median(times[side][1:])
            rate = work * sizes.width * pairs / seconds
            row |= {
                f"{side}_seconds": seconds,
                f"{side}_tflops": rate / 1e12,
                f"{side}_of_product": rate / self.product,
            }
        return row

    def planned(self, pattern: Pattern, length: int, kernel: str | None = None) -> float:
        """Return the seconds that planning takes with nothing kept, the least of three."""
        sizes = self.sizes
        dtype = str(self.dtype).removeprefix("torch.")
        options = {
            "heads": sizes.heads,
            "width": sizes.width,
            "dtype": dtype,
            "kernel": kernel,
            "device": "cuda",
        }
        times = []
        for _ in range(3):
            forget()
            begin = time.perf_counter()
            plan(pattern, length=length, **options)
            times.append(time.perf_counter() - begin)
            if times[-1] > 1:
                break
        return min(times)

    def against_truth(self, pattern: Pattern, kernel: str | None) -> Row:
        """Return how far outputs and gradients lie from those of the reference in float64, and whether all are finite."""
        length = 300
        sides = [side.detach() for side in self.tensors(length)[:3]]
        results = []
        for dtype, device, asked in ((torch.float64, "cpu", "reference"), (self.dtype, self.device, kernel)):
            leaves = [side.to(device, dtype).requires_grad_() for side in sides]
            output, lse = attend_with_lse(*leaves, pattern, kernel=asked)
            (output.float().square().sum() + lse[lse.isfinite()].sum()).backward()
            results.append([output, *(leaf.grad for leaf in leaves)])
        truth, got = ([side.detach().double().cpu() for side in result] for result in results)
        apart = [float((one - other).abs().max()) for one, other in zip(got, truth, strict=True)]
        finite = all(bool(side.isfinite().all()) for side in got)
        return {
            "what": str(pattern),
            "kernel": kernel,
            "finite": finite,
            "output_error": apart[0],
            "gradient_error": max(apart[1:]),
        }

    def tensors(self, length: int) -> list[Tensor]:
        """Return a query, key and value to differentiate, and the gradient of an output."""
        shape = (1, length, self.sizes.heads, self.sizes.width)
        # As a model gives them: transposed, with the heads inside the length.
        made = [torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(4)]
        return [*(side.requires_grad_() for side in made[:3]), made[3]]

    def median(self, action: Callable[[], object]) -> float:
        """Return the median seconds of an action after one that warms up."""
        times = []
        for _ in range(self.sizes.repeats + 1):
            begin = self.now()
            action()
            times.append(self.now() - begin)
        return statistics.median(times[1:])

    def now(self) -> float:
        """Return seconds that only grow, once all that was begun is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
