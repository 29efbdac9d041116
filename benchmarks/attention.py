"""Measure attention over patterns against what the machine can do: a large matrix product.

The yardstick is useful work. A pattern of P pairs takes 4 · width · P floating-point operations forward and
10 · width · P backward; what a kernel computes and masks away does not count. The rate at which a kernel does this
work is set against the rate of a large matrix product, measured in the same run: in float32 of 2048 x 2048 x 2048 on
cpu, in the dtype of the tensors of 8192 x 8192 x 8192 on cuda. Dense causal attention of PyTorch is measured beside it. Repeats are interleaved, so that a machine that slows down slows
down everything, and medians are reported.

    python benchmarks/attention.py --json out/attention.json
    python benchmarks/attention.py --lengths 4096,16384 --dtype bfloat16
    python benchmarks/attention.py --device cuda --dtype bfloat16 --lengths 32768,131072
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longspan import (
    S2,
    SCCA,
    Causal,
    Dilated,
    Longformer,
    LongMixed,
    LongNet,
    SlidingWindow,
    Window,
    attend,
    plan,
)
from longspan.derive.cost import cost
from longspan.errors import LongspanError
from longspan.pattern import Pattern

# Each pattern with the length that it is measured at, unless others are asked for.
PATTERNS: list[tuple[Pattern, int]] = [
    (SlidingWindow(512), 8_192),
    (SlidingWindow(4_096), 32_768),
    (Longformer(257, global_tokens=16), 8_192),
    (Causal() & (Window(128) | Dilated(128)), 16_384),
    (LongNet((2_048, 4_096, 8_192), (1, 2, 4)), 16_384),
    (S2(2_048), 8_192),
    (SCCA(1_024), 8_192),
    (SCCA(1_024, flow=4), 8_192),
    (LongMixed(1_024), 8_192),
]
PRODUCT, CUDA_PRODUCT = 2_048, 8_192
_FORWARD, _BACKWARD = 4, 10


@dataclass
class Row:
    """What was measured of one pattern, or of dense attention, at one length; times in seconds."""

    name: str
    length: int
    pairs: int
    share: float
    planned: float = 0.0
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    refused: str = ""

    def rate(self, times: Sequence[float], work: int, width: int) -> float:
        """Return useful floating-point operations per second."""
        return work * width * self.pairs / statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured.")
    heads, width = options.heads, options.width
    cases = [(pattern, length) for pattern, own in PATTERNS for length in (options.lengths or [own])]
    rows: list[tuple[Row, Callable[..., Tensor]]] = []
    for length in sorted({length for _, length in cases}):
        pairs = heads * length * (length + 1) // 2
        dense = Row("dense, scaled_dot_product_attention", length, pairs, pairs / (heads * length**2))
        rows.append((dense, partial(scaled_dot_product_attention, is_causal=True)))
    for pattern, length in cases:
        read = cost(pattern, length=length, heads=heads, width=width)
        row = Row(str(pattern), length, read.pairs, read.share)
        row.planned = _seconds(
            lambda p=pattern, n=length: plan(
                p, length=n, heads=heads, width=width, dtype=options.dtype, device=device.type
            ),
            device,
        )
        rows.append((row, partial(attend, pattern=pattern)))

    product: list[float] = []
    on_cuda = device.type == "cuda"
    size, factor_dtype = (CUDA_PRODUCT, dtype) if on_cuda else (PRODUCT, torch.float32)
    factors = torch.randn(2, size, size, device=device, dtype=factor_dtype)
    # The first round warms up and is not kept.
    for repeat in range(options.repeats + 1):
        product.append(_seconds(lambda: factors[0] @ factors[1], device))
        for row, operation in rows:
            if not row.refused:
                _measure(row, operation, (1, heads, row.length, width), device, dtype)
        print(f"round {repeat} of {options.repeats}", file=sys.stderr)
    for times in (product, *(side for row, _ in rows for side in (row.forward, row.backward))):
        del times[:1]

    yardstick = f"{str(factor_dtype).removeprefix('torch.')} matrix product of {size:,} x {size:,} x {size:,}"
    rate = 2 * size**3 / statistics.median(product)
    report = _report([row for row, _ in rows], yardstick, rate, options)
    print(_table(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N", help="measure every pattern at these (default: its own)"
    )
    parser.add_argument(
        "--heads", type=int, default=8, metavar="N", help="query heads, a multiple of 4 (default: 8)"
    )
    parser.add_argument("--width", type=int, default=64, metavar="N", help="numbers in a head (default: 64)")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds that are kept (default: 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    return parser.parse_args(arguments)


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _measure(
    row: Row,
    operation: Callable[..., Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Add the times of one forward and one backward pass to a row, or why there are none."""
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    seed = torch.randn(shape, device=device, dtype=dtype)
    output: list[Tensor] = []
    try:
        row.forward.append(_seconds(lambda: output.append(operation(query, key, value)), device))
    except LongspanError as error:
        row.refused = str(error)
        return
    row.backward.append(_seconds(lambda: output[0].backward(seed), device))


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _report(rows: Sequence[Row], yardstick: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures: rates as shares of the matrix product's, gains in time over dense attention."""
    dense = {row.length: row for row in rows if row.name.startswith("dense")}
    measured = []
    for row in rows:
        entry: dict[str, Any] = asdict(row)
        if not row.refused:
            for side, work in (("forward", _FORWARD), ("backward", _BACKWARD)):
                times, beside = getattr(row, side), getattr(dense[row.length], side)
                entry[f"{side}_flops_per_second"] = row.rate(times, work, options.width)
                entry[f"{side}_of_product"] = row.rate(times, work, options.width) / rate
                entry[f"{side}_gain"] = statistics.median(beside) / statistics.median(times)
        measured.append(entry)
    machine = _accelerator() if options.device.startswith("cuda") else _processor()
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": options.device,
        "dtype": options.dtype,
        "heads": options.heads,
        "width": options.width,
        "repeats": options.repeats,
        "product": yardstick,
        "product_flops_per_second": rate,
        "rows": measured,
    }


def _accelerator() -> str:
    """Return the name and size of the CUDA device, and what drives it."""
    facts = torch.cuda.get_device_properties()
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _processor() -> str:
    """Return the name of the processor, as Linux tells it, or its kind."""
    facts = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(facts) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _table(report: dict[str, Any]) -> str:
    header = (
        "",
        "length",
        "pairs",
        "plan ms",
        "forward ms",
        "TFLOP/s",
        "of product",
        "gain",
        "backward ms",
        "TFLOP/s",
        "of product",
        "gain",
    )
    lines = [header]
    for row in report["rows"]:
        line = [row["name"], f"{row['length']:,}", f"{row['share']:.1%}", f"{1000 * row['planned']:.0f}"]
        if row["refused"]:
            lines.append((*line, *["refused", "", "", ""] * 2))
            continue
        for side in ("forward", "backward"):
            line += [
                f"{1000 * statistics.median(row[side]):,.1f}",
                f"{row[f'{side}_flops_per_second'] / 1e12:,.3g}",
                f"{row[f'{side}_of_product']:.2f}",
                f"{row[f'{side}_gain']:.1f} x",
            ]
        lines.append(tuple(line))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    described = (
        f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, "
        f"{report['heads']} heads of width {report['width']}, medians of {report['repeats']}"
    )
    product = f"{report['product']}: {report['product_flops_per_second'] / 1e12:,.3g} TFLOP/s"
    table = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    refused = [f"{row['name']}: {row['refused']}" for row in report["rows"] if row["refused"]]
    return "\n".join([described, product, "", *table, *refused])


if __name__ == "__main__":
    main()
