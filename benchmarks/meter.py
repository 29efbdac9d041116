"""Measure one device: rates of attention and of a matrix product, seconds of planning, distances from the truth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from listing import forget
from torch import Tensor
from truth import apart, budget, dense

from longspan import attend_with_lse, plan
from longspan.derive.mask import counts
from longspan.kernel.flex.family import groups
from longspan.kernel.plan import Plan
from longspan.pattern import Pattern

_FORWARD, _BACKWARD = 4, 10
Row = dict[str, Any]
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is measured at which size; lengths in tokens, heads as those of queries and of keys.

    Sizes of patterns stay as they are when a text grows, and what thins a text out keeps so many of its keys.
    """

    product: int = 8_192
    dense: int = 32_768
    window: int = 4_096
    medium: int = 131_072
    long: int = 1_048_576
    first: int = 2_048
    kept: int = 512
    heads: tuple[int, int] = (32, 8)
    width: int = 128
    longest: int = 4_194_304
    # With more heads its tensors alone are larger than a card.
    longest_heads: tuple[int, int] = (8, 2)
    stream: int = 1 << 30
    stream_width: int = 64
    chunk: int = 1 << 24
    samples: int = 16
    checked: int = 1_100
    repeats: int = 5


TOY = Sizes(
    product=64,
    dense=64,
    window=16,
    medium=96,
    long=128,
    first=16,
    kept=16,
    heads=(4, 2),
    width=16,
    longest=192,
    longest_heads=(4, 2),
    stream=512,
    stream_width=16,
    chunk=64,
    samples=8,
    checked=70,
    repeats=1,
)


class Meter:
    """Tensors of one dtype on one device, and what is measured of them.

    Attributes:
        sizes, device, dtype: what is measured.
        product: operations per second of a large matrix product, the yardstick.
    """

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        factors = torch.randn(2, sizes.product, sizes.product, device=device, dtype=dtype)
        self.product = 2 * sizes.product**3 / self.median(lambda: factors[0] @ factors[1])

    def rates(self, ways: dict[str, Operation], pattern: Pattern, length: int) -> Iterator[Row]:
        """Yield for each way its rates of useful work, forward and backward, and both as a share of the product.

        The ways take turns, so that a device that slows down slows all of them. One that fails says why.
        """
        sizes = self.sizes
        pairs = self.plan(pattern, length).pairs
        leaves, seed = self.tensors(length)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        refused: dict[str, str] = {}
        # The first round warms up and is not kept.
        for _ in range(sizes.repeats + 1):
            for name, operation in ways.items():
                if name not in refused:
                    try:
                        times[name].append(self.turn(operation, leaves, seed))
                    except Exception as error:
                        refused[name] = self.reason(error, name.rsplit(" ", 1)[-1])
        for name, measured in times.items():
            row: Row = {"what": name, "length": length}
            if name in refused:
                yield row | {"refused": refused[name]}
                continue
            forward, backward = (statistics.median(side) for side in zip(*measured[1:], strict=True))
            work = sizes.width * pairs / 1e12
            rate = (_FORWARD + _BACKWARD) * work / (forward + backward)
            yield row | {
                "pairs": pairs,
                "forward_seconds": forward,
                "forward_tflops": _FORWARD * work / forward,
                "backward_seconds": backward,
                "backward_tflops": _BACKWARD * work / backward,
                "tflops": rate,
                "of_product": 1e12 * rate / self.product,
            }

    def turn(self, operation: Operation, leaves: list[Tensor], seed: Tensor) -> tuple[float, float]:
        """Return the seconds of one forward and one backward pass, of which nothing is left."""
        begin = self.now()
        output = operation(*leaves)
        middle = self.now()
        # Gradients of their own: those of a leaf would be added up over the rounds.
        torch.autograd.grad(output, leaves, seed)
        return middle - begin, self.now() - middle

    def reason(self, error: Exception, kernel: str = "") -> str:
        """Return what an error says in a line, or raise another where nothing runs on the device any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return reason(error, kernel)

    def plan(self, pattern: Pattern, length: int, kernel: str | None = None) -> Plan:
        """Return what is planned for CUDA, wherever this runs."""
        heads, width = self.sizes.heads[0], self.sizes.width
        return plan(
            pattern, length=length, heads=heads, width=width, dtype="bfloat16", kernel=kernel, device="cuda"
        )

    def planned(self, pattern: Pattern, length: int, kernel: str | None = None) -> Row:
        """Return the kernel and the seconds that planning takes with nothing kept, the least of three."""
        times: list[float] = []
        while len(times) < 3 and sum(times) < 1:
            forget()
            begin = time.perf_counter()
            made = self.plan(pattern, length, kernel)
            if made.kernel == "flex":
                # A plan only counts blocks; before the first call they are listed on the device too.
                groups(pattern, made.heads, made.queries, made.keys, self.device)
                self.now()
            times.append(time.perf_counter() - begin)
        return {"kernel": made.kernel, "planning_seconds": min(times)}

    def against_truth(self, pattern: Pattern, kernel: str | None) -> Row:
        """Return how far outputs and gradients lie from float64 in parts of their budget, and whether all are finite."""
        length = self.sizes.checked
        leaves, seed = self.tensors(length)
        often = counts(pattern, length=length, heads=self.sizes.heads[0])
        # A random text says more of log-sum-exps than ones do.
        lse_seed = torch.randn(seed.shape[:-1], device=self.device)
        results = []
        for dtype, asked in ((torch.float64, ""), (self.dtype, ""), (self.dtype, "kernel")):
            sides = [side.detach().to(dtype).requires_grad_() for side in leaves]
            made = attend_with_lse(*sides, pattern, kernel=kernel) if asked else dense(*sides, often)
            read = made[1].isfinite()
            loss = (made[0] * seed.to(dtype)).sum() + (made[1] * lse_seed)[read].sum()
            results.append([made[0], made[1], *torch.autograd.grad(loss, sides)])
        truth, plain, got = results
        errors = [apart(one, other) for one, other in zip(got, truth, strict=True)]
        budgets = [budget(one, other, truth[1]) for one, other in zip(plain, truth, strict=True)]
        parts = [
            error / allowed if allowed else math.inf if error else 0.0
            for error, allowed in zip(errors, budgets, strict=True)
        ]
        return {
            "what": str(pattern),
            "kernel": kernel or "chosen",
            "length": length,
            "finite": all(bool(side.isfinite().all()) for side in (got[0], *got[2:])),
            "output_error": errors[0],
            "gradient_error": max(errors[2:]),
            "of_budget": max(parts),
        }

    def tensors(self, length: int, heads: tuple[int, int] | None = None) -> tuple[list[Tensor], Tensor]:
        """Return query, key and value to differentiate, and the gradient of an output."""
        query_heads, key_heads = heads or self.sizes.heads
        # As a model gives them: transposed, with the heads inside the length.
        query, key, value, seed = (
            torch.randn(1, length, number, self.sizes.width, device=self.device, dtype=self.dtype).transpose(
                1, 2
            )
            for number in (query_heads, key_heads, key_heads, query_heads)
        )
        return [side.requires_grad_() for side in (query, key, value)], seed

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


def reason(error: BaseException, kernel: str = "") -> str:
    """Return the kind of an error and the line of what it says that is about a kernel, or the first."""
    lines = [line.strip().removeprefix("refused").strip() for line in str(error).strip().splitlines()]
    about = [line for line in lines if kernel and line.startswith(f"{kernel} ")]
    return ": ".join([type(error).__name__, *(about or lines)[:1]])
