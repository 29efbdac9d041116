"""Measure attention over patterns against what the machine can do: a large matrix product.

The yardstick is useful work. A pattern of P pairs takes 4 · width · P floating-point operations forward and
10 · width · P backward; what a kernel computes and masks away does not count. The rate at which a kernel does this
work is set against the rate of a large matrix product, measured in the same run: in float32 of 2048 x 2048 x 2048 on
cpu, in the dtype of the tensors of 8192 x 8192 x 8192 on cuda. Dense causal attention of PyTorch is measured beside it.
On cpu some rows have key heads that several query heads share, or bfloat16.

Repeats are interleaved, so that a machine that slows down slows down everything, and medians are reported. Where other
work shares the processor, `--clock processor` counts the time that this process had of it, and `--best` reports the
shortest times instead of the medians.

    python benchmarks/attention.py --json out/attention.json
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/attention.py --clock processor --best
    python benchmarks/attention.py --lengths 4096,16384 --dtype bfloat16
    python benchmarks/attention.py --device cuda --dtype bfloat16 --lengths 32768,131072
"""

from __future__ import annotations

import argparse
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
from listing import aligned, numbers, processor, save
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
from longspan.pattern import BigBird, Pattern

# Each pattern with the length that it is measured at, unless others are asked for.
PATTERNS: list[tuple[Pattern, int]] = [
    (SlidingWindow(512), 8_192),
    (SlidingWindow(4_096), 32_768),
    (Longformer(257, global_tokens=16), 8_192),
    (Causal() & (Window(128) | Dilated(128)), 8_192),
    (BigBird(64), 8_192),
    (LongNet((2_048, 4_096, 8_192), (1, 2, 4)), 8_192),
    (S2(2_048), 8_192),
    (SCCA(1_024), 8_192),
    (SCCA(1_024, flow=4), 8_192),
    (LongMixed(1_024), 8_192),
]
# Patterns measured on cpu with other heads too: times the query heads, times the key heads, dtype.
VARIANTS: list[tuple[Pattern, int, tuple[int, int, str]]] = [
    (SlidingWindow(512), 8_192, variant)
    for variant in ((4, 4, "float32"), (4, 1, "float32"), (1, 1, "bfloat16"))
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
    shape: tuple[int, ...] = ()
    key_heads: int = 0
    dtype: str = "float32"
    kernel: str = ""
    planned: float = 0.0
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    refused: str = ""

    @property
    def title(self) -> str:
        """The name, and what is not as in most rows."""
        heads = self.shape[1]
        shared = f", {heads} heads on {self.key_heads}" if heads != self.key_heads else f", {heads} heads"
        return f"{self.name}{shared}{', bfloat16' if self.dtype == 'bfloat16' else ''}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured.")
    heads, width = options.heads, options.width
    plain = (1, 1, options.dtype)
    cases = [(pattern, length, plain) for pattern, own in PATTERNS for length in (options.lengths or [own])]
    if device.type == "cpu":
        cases += [
            (pattern, length, variant)
            for pattern, own, variant in VARIANTS
            for length in (options.lengths or [own])
        ]
    rows: list[tuple[Row, Callable[..., Tensor]]] = []
    for length in sorted({length for _, length, _ in cases}):
        pairs = heads * length * (length + 1) // 2
        dense = Row("dense, scaled_dot_product_attention", length, pairs, pairs / (heads * length**2))
        dense.shape, dense.key_heads, dense.dtype = (1, heads, length, width), heads, options.dtype
        rows.append((dense, partial(scaled_dot_product_attention, is_causal=True)))
    for pattern, length, (more, key_more, kind) in cases:
        read = cost(pattern, length=length, heads=heads * more, width=width)
        row = Row(str(pattern), length, read.pairs, read.share)
        row.shape, row.key_heads, row.dtype = (1, heads * more, length, width), heads * key_more, kind
        asked = {"length": length, "heads": heads * more, "width": width, "dtype": kind}
        row.planned = _seconds(lambda p=pattern, a=asked: plan(p, **a, device=device.type), device)
        row.kernel = plan(pattern, **asked, device=device.type).kernel
        rows.append((row, partial(attend, pattern=pattern)))

    product: list[float] = []
    on_cuda = device.type == "cuda"
    size, factor_dtype = (CUDA_PRODUCT, dtype) if on_cuda else (PRODUCT, torch.float32)
    factors = torch.randn(2, size, size, device=device, dtype=factor_dtype)
    # The first round warms up and is not kept.
    for repeat in range(options.repeats + 1):
        product.append(_seconds(lambda: factors[0] @ factors[1], device, options.clock))
        for row, operation in rows:
            if not row.refused:
                _measure(row, operation, device, options.clock)
        print(f"round {repeat} of {options.repeats}", file=sys.stderr)
    for times in (product, *(side for row, _ in rows for side in (row.forward, row.backward))):
        del times[:1]

    yardstick = f"{str(factor_dtype).removeprefix('torch.')} matrix product of {size:,} x {size:,} x {size:,}"
    rate = 2 * size**3 / _typical(product, options)
    report = _report([row for row, _ in rows], yardstick, rate, options)
    print(_table(report))
    save(report, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--lengths", type=numbers, metavar="N,N", help="measure every pattern at these (default: its own)"
    )
    parser.add_argument(
        "--heads", type=int, default=8, metavar="N", help="query heads, a multiple of 4 (default: 8)"
    )
    parser.add_argument("--width", type=int, default=64, metavar="N", help="numbers in a head (default: 64)")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds that are kept (default: 5)"
    )
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "processor"), help="what times are (default: wall)"
    )
    parser.add_argument(
        "--best", action="store_true", help="report the shortest times instead of the medians"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    return parser.parse_args(arguments)


def _measure(row: Row, operation: Callable[..., Tensor], device: torch.device, clock: str) -> None:
    """Add the times of one forward and one backward pass to a row, or why there are none."""
    kind = {"device": device, "dtype": getattr(torch, row.dtype)}
    keyed = (row.shape[0], row.key_heads, *row.shape[2:])
    query, key, value = (
        torch.randn(shape, **kind, requires_grad=True) for shape in (row.shape, keyed, keyed)
    )
    seed = torch.randn(row.shape, **kind)
    output: list[Tensor] = []
    try:
        row.forward.append(_seconds(lambda: output.append(operation(query, key, value)), device, clock))
        row.backward.append(_seconds(lambda: output[0].backward(seed), device, clock))
    # What cannot be compiled, or does not fit into a device, leaves the other rows.
    except (LongspanError, RuntimeError) as error:
        row.refused = str(error)


def _seconds(action: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    now = time.process_time if clock == "processor" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = now()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now() - begin


def _typical(times: Sequence[float], options: argparse.Namespace) -> float:
    return min(times) if options.best else statistics.median(times)


def _report(rows: Sequence[Row], yardstick: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures: rates as shares of the matrix product's, gains in time over dense attention."""
    dense = {row.length: row for row in rows if row.name.startswith("dense")}
    measured = []
    for row in rows:
        entry: dict[str, Any] = asdict(row) | {"title": row.title}
        if not row.refused:
            for side, work in (("forward", _FORWARD), ("backward", _BACKWARD)):
                times, beside = getattr(row, side), getattr(dense[row.length], side)
                entry[side] = _typical(times, options)
                done = work * options.width * row.pairs / entry[side]
                entry[f"{side}_times"] = times
                entry[f"{side}_flops_per_second"] = done
                entry[f"{side}_of_product"] = done / rate
                # Of as many heads as dense attention has.
                heads = row.shape[1] / options.heads
                entry[f"{side}_gain"] = heads * _typical(beside, options) / entry[side]
        measured.append(entry)
    machine = _accelerator() if options.device.startswith("cuda") else processor()
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
        "times": ("shortest" if options.best else "median") + f" by the {options.clock} clock",
        "product": yardstick,
        "product_flops_per_second": rate,
        "rows": measured,
    }


def _accelerator() -> str:
    """Return the name and size of the CUDA device, and what drives it."""
    facts = torch.cuda.get_device_properties()
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _table(report: dict[str, Any]) -> str:
    header = (
        "",
        "kernel",
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
        line = [
            row["title"],
            row["kernel"],
            f"{row['length']:,}",
            f"{row['share']:.1%}",
            f"{1000 * row['planned']:.0f}",
        ]
        if row["refused"]:
            lines.append((*line, *["refused", "", "", ""] * 2))
            continue
        for side in ("forward", "backward"):
            line += [
                f"{1000 * row[side]:,.1f}",
                f"{row[f'{side}_flops_per_second'] / 1e12:,.3g}",
                f"{row[f'{side}_of_product']:.2f}",
                f"{row[f'{side}_gain']:.1f} x",
            ]
        lines.append(tuple(line))
    described = (
        f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, "
        f"width {report['width']}, {report['times']}, {report['repeats']} rounds"
    )
    product = f"{report['product']}: {report['product_flops_per_second'] / 1e12:,.3g} TFLOP/s"
    refused = [f"{row['name']}: {row['refused']}" for row in report["rows"] if row["refused"]]
    return "\n".join([described, product, "", *aligned(lines, left=2), *refused])


if __name__ == "__main__":
    main()
