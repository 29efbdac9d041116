"""Measure what the plan takes a call and a merge for (`longspan/kernel/rates.py`): both in pairs of a head 64 wide.

A pair's time is that of dense causal attention, all that it computes counted. A call's is that of many small ones that are
begun one after the other and waited for once, so that it is the time of starting or of running one, whichever is longer.
A band's is what `attend` takes longer for a pattern of more bands, with the merge of its few rows. "Times" is what was
measured over what the plan takes it for.

    python benchmarks/costs.py
    python benchmarks/costs.py --device cuda --json out/costs.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from listing import aligned, cell, machine, save
from meter import TOY, Meter, Row, Sizes
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longspan import Causal, Window, attend
from longspan.kernel import rates
from longspan.kernel.softmax.merge import merge_into
from longspan.pattern import Pattern, Sum

WIDTH, HEADS = 64, 8
# Calls that are begun before one is waited for, tokens of a small one, and bands of the larger pattern.
CALLS, SMALL, BANDS = 64, 16, 9
COLUMNS = ("what", "seconds", "rate", "pairs", "in_rates", "times")


def costs(meter: Meter, *, backend: str = "inductor") -> Iterator[Row]:
    """Yield the seconds of each cost, and how many pairs it is worth, beside what the plan takes it for.

    Args:
        meter: measures times, on the device and in the dtype that count.
        backend: of torch.compile, "eager" where compiling would take too long.
    """
    length = meter.sizes.dense
    with torch.no_grad():
        yield {"what": "matrix product, FLOP/s", "rate": meter.product}
        copied, copy = (torch.randn(4 * length * HEADS * WIDTH, device=meter.device) for _ in range(2))
        # Read and written.
        moved = 2 * copied.nbytes / meter.median(lambda: copy.copy_(copied))
        yield {"what": "memory, bytes/s", "rate": moved}

        sides = _sides(meter, length)
        pairs = HEADS * length * (length + 1) // 2
        pair = meter.median(partial(attend, *sides, Causal())) / pairs
        yield {"what": "a pair of attend", "seconds": pair, "pairs": 1.0}

        def row(what: str, seconds: float, taken: float) -> Row:
            worth = seconds / pair
            return {
                "what": what,
                "seconds": seconds,
                "pairs": worth,
                "in_rates": taken,
                "times": worth / taken,
            }

        if backend != "eager":
            seconds = meter.median(partial(attend, *sides, Causal(), kernel="flex")) / pairs
            yield row("a pair of FlexAttention", seconds, 1)
        totals = [torch.randn(1, HEADS, length, WIDTH, device=meter.device) for _ in range(2)]
        lses = [torch.randn(1, HEADS, length, device=meter.device) for _ in range(2)]
        merging = partial(merge_into, totals[0], lses[0], totals[1], lses[1])
        yield row("merge of a row, MERGE", meter.median(merging) / (HEADS * length), rates.MERGE)
        few = _sides(meter, SMALL)
        plain = partial(scaled_dot_product_attention, *few, is_causal=True)
        yield row("a call of PyTorch's attention, CALL", _each(meter, plain), rates.CALL)
        one, more = (_each(meter, partial(attend, *few, pattern)) for pattern in (_bands(1), _bands(BANDS)))
        yield row("a band more of attend, CALL", (more - one) / (BANDS - 1), rates.CALL)
        run = partial(torch.compile(flex_attention, backend=backend, dynamic=False), *few)
        yield row("a call of compiled FlexAttention, COMPILED", _each(meter, run), rates.COMPILED)


def _sides(meter: Meter, length: int) -> tuple[torch.Tensor, ...]:
    shape = (1, length, HEADS, WIDTH)
    return tuple(torch.randn(shape, device=meter.device, dtype=meter.dtype).transpose(1, 2) for _ in range(3))


def _bands(number: int) -> Pattern:
    """Return a pattern that is read as so many bands, each of the same few keys and one more."""
    windows = tuple(Causal() & Window(2 + more) for more in range(number))
    return Sum(windows) if number > 1 else windows[0]


def _each(meter: Meter, action: Callable[[], Any]) -> float:
    """Return the seconds of one of many calls that wait for nothing."""

    def many() -> None:
        for _ in range(CALLS):
            action()

    return meter.median(many) / CALLS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--toy", action="store_true", help="sizes at which figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured.")
    dtype = torch.bfloat16 if on_cuda else torch.float32
    # What a card computes in milliseconds takes a processor seconds.
    sizes = TOY if options.toy else Sizes() if on_cuda else replace(Sizes(), product=2_048, dense=4_096)
    meter = Meter(sizes, torch.device(options.device), dtype)
    report = {
        "machine": machine(options.device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": list(costs(meter, backend="eager" if options.toy else "inductor")),
    }
    print(f"{report['machine']}; {report['dtype']}, {report['threads']} threads")
    lines = [tuple(cell(row.get(column)) for column in COLUMNS) for row in report["rows"]]
    print(*aligned([tuple(column.replace("_", " ") for column in COLUMNS), *lines]), sep="\n")
    save(report, options.json)


if __name__ == "__main__":
    main()
