"""Measure everything about one CUDA device in one run: rates, planning, memory, a billion tokens, and exactness.

The yardstick is a matrix product of 8192 x 8192 x 8192 in bfloat16, measured in the same run. A pattern of P pairs takes
4 · width · P floating-point operations forward and 10 · width · P backward; what a kernel computes and masks away does
not count. Each table stands for itself: where one fails, the others are still made, and the program ends with an error.

    python benchmarks/gpu.py --json out/gpu.json --table out/gpu.md
    python benchmarks/gpu.py --only window,stream
    python benchmarks/gpu.py --device cpu --toy
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from listing import machine, page
from meter import TOY, Meter, Row, Sizes
from stream import generated, mixture, read
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longspan import (
    S2,
    SCCA,
    Causal,
    LongMixed,
    LongNet,
    SlidingWindow,
    Streaming,
    attend,
)
from longspan.pattern import Pattern

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class Bench(Meter):
    """The tables, one method each, which yield rows."""

    def patterns(self, length: int) -> list[Pattern]:
        """LongNet, S2, SCCA and LongMixed with the sizes of their papers' texts, in proportion."""
        first = max(8, min(self.sizes.first, length // 16))
        lists = tuple(first << power for power in range(5))
        return [
            LongNet(lists, (1, 2, 4, 8, 16)),
            S2(length // 4),
            SCCA(max(8, length // 128)),
            LongMixed(max(8, length // 128)),
        ]

    def dense(self) -> Iterator[Row]:
        """Causal attention over everything, beside each of PyTorch's kernels."""
        length = self.sizes.dense
        yield self.rates("longspan", partial(attend, pattern=Causal()), Causal(), length)
        for backend in BACKENDS if self.device.type == "cuda" else (SDPBackend.MATH,):
            yield self.rates(f"PyTorch, {backend.name.lower()}", _within(backend), Causal(), length)

    def window(self) -> Iterator[Row]:
        """A window, planned and run, beside compiled FlexAttention with a mask of its own, and dense attention."""
        length, width = self.sizes.medium, self.sizes.window
        pattern = SlidingWindow(width)
        planned = self.planned(pattern, length)
        for kernel in ("flash", "flex") if self.device.type == "cuda" else (None,):
            row = self.rates(
                f"longspan, {kernel}", partial(attend, pattern=pattern, kernel=kernel), pattern, length
            )
            yield row | {"planning_seconds": planned}

        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q - k < width)

        if self.device.type == "cuda":
            begin = self.now()
            own = torch.compile(create_block_mask)(mask, None, None, length, length, device=self.device)
            made = self.now() - begin
            run = torch.compile(flex_attention, dynamic=False)
            row = self.rates("FlexAttention, mask of its own", partial(run, block_mask=own), pattern, length)
            yield row | {"planning_seconds": made}
            dense = partial(scaled_dot_product_attention, is_causal=True)
            yield self.rates("dense, PyTorch", dense, Causal(), self.sizes.dense)

    def patterns_by_length(self) -> Iterator[Row]:
        """LongNet, S2, SCCA and LongMixed at two lengths."""
        for length in (self.sizes.medium, self.sizes.long):
            for pattern in self.patterns(length):
                planned = self.planned(pattern, length)
                row = self.rates(str(pattern), partial(attend, pattern=pattern), pattern, length)
                yield row | {"planning_seconds": planned}

    def planning(self) -> Iterator[Row]:
        """What planning takes, with nothing kept from before."""
        length = self.sizes.long
        for pattern in (
            SlidingWindow(512),
            SlidingWindow(8_192),
            Streaming(508),
            LongNet(),
            *self.patterns(length),
        ):
            for kernel in ("flash", "flex"):
                try:
                    seconds = self.planned(pattern, length, kernel)
                except Exception as error:
                    yield {
                        "what": str(pattern),
                        "kernel": kernel,
                        "length": length,
                        "refused": str(error).splitlines()[0],
                    }
                else:
                    yield {
                        "what": str(pattern),
                        "kernel": kernel,
                        "length": length,
                        "planning_seconds": seconds,
                    }

    def memory(self) -> Iterator[Row]:
        """A window over a very long text, forward and backward: the peak beside the tensors themselves."""
        length, pattern = self.sizes.longest, SlidingWindow(self.sizes.window)
        query, key, value, seed = self.tensors(length)
        sides = query.numel() * query.element_size()
        self.planned(pattern, length)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = self.now()
        output = attend(query, key, value, pattern)
        middle = self.now()
        output.backward(seed)
        row = {"what": str(pattern), "length": length, "forward_seconds": middle - begin}
        row |= {"backward_seconds": self.now() - middle}
        # Three inputs, the output, its gradient and three gradients.
        row |= {"tensor_bytes": 8 * sides}
        if self.device.type == "cuda":
            row |= {"peak_bytes": torch.cuda.max_memory_allocated()}
        yield row

    def stream(self) -> Iterator[Row]:
        """A LongNet mixture on one head, read in chunks: time for each token at a million and at a billion."""
        sizes = self.sizes
        for tokens in (sizes.long, sizes.stream):
            chunk = min(tokens, sizes.chunk)
            generator = torch.Generator().manual_seed(0)
            samples = torch.randint(tokens, (sizes.samples,), generator=generator).tolist()
            terms = mixture(tokens, first=sizes.first)
            source = generated(sizes.width, self.device, self.dtype)
            # Once for what is compiled and planned.
            read(
                source, sizes.chunk, *mixture(sizes.chunk, first=sizes.first), chunk=sizes.chunk, samples=[0]
            )
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            done = read(source, tokens, *terms, chunk=chunk, samples=[0, tokens - 1, *samples])
            row = {"what": f"{len(terms[0])} terms", **asdict(done), "exact": done.worst <= done.budget}
            row |= {"nanoseconds_per_token": 1e9 * done.seconds / tokens}
            if self.device.type == "cuda":
                row |= {"peak_bytes": torch.cuda.max_memory_allocated()}
            yield row

    def decoding(self) -> Iterator[Row]:
        """One query against all keys, whose stretches run side by side; bytes of keys and values for each second."""
        for length in (self.sizes.medium, self.sizes.long):
            query, key, value, _ = (side.detach() for side in self.tensors(length))
            step = query[:, :, -1:].contiguous()
            with torch.no_grad():
                seconds = self.median(partial(attend, step, key, value, Causal()))
                theirs = self.median(partial(scaled_dot_product_attention, step, key, value))
            size = 2 * key.numel() * key.element_size()
            yield {
                "what": "one query",
                "length": length,
                "forward_seconds": seconds,
                "bytes_per_second": size / seconds,
                "pytorch_seconds": theirs,
            }

    def poison(self) -> Iterator[Row]:
        """Fresh memory is NaN: outputs and gradients of every kernel against the reference in float64."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            for pattern in (
                SlidingWindow(100),
                LongNet((64, 256), (1, 4)),
                S2(64),
                LongMixed(64),
                Streaming(60),
            ):
                for kernel in ("flash", "flex") if self.device.type == "cuda" else (None,):
                    yield self.against_truth(pattern, kernel)
        finally:
            torch.use_deterministic_algorithms(False)

    def sanitizer(self) -> Iterator[Row]:
        """The table above under compute-sanitizer, where it is installed."""
        tool = shutil.which("compute-sanitizer")
        if tool is None or self.device.type != "cuda":
            yield {
                "what": "compute-sanitizer",
                "refused": "is not installed" if tool is None else "is for cuda",
            }
            return
        command = [tool, "--tool", "memcheck", sys.executable, __file__, "--toy", "--only", "poison"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1_800)
        last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line] or [
            f"exit code {done.returncode}"
        ]
        yield {"what": "compute-sanitizer memcheck", "found": last[-1].strip("= ")}


TABLES = (
    "dense",
    "window",
    "patterns_by_length",
    "planning",
    "memory",
    "stream",
    "decoding",
    "poison",
    "sanitizer",
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured.")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    bench = Bench(TOY if options.toy else Sizes(), torch.device(options.device), dtype)
    report: dict[str, Any] = {
        "machine": machine(options.device),
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": asdict(bench.sizes),
        "product_tflops": bench.product / 1e12,
    }
    failed = []
    for name in options.only or TABLES:
        print(name, file=sys.stderr)
        rows: list[Row] = []
        try:
            for row in getattr(bench, name)():
                rows.append(row)
        except Exception as error:
            # The other tables are made all the same.
            traceback.print_exc()
            failed.append(name)
            rows.append(
                {"what": "failed", "refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            )
        report[name] = rows
        if options.device == "cuda":
            torch.cuda.empty_cache()
        _write(report, options)
    print(page(report, _titles()))
    if failed:
        sys.exit(f"These tables failed: {', '.join(failed)}.")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="sizes at which figures mean nothing")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="TABLE,TABLE", help=", ".join(TABLES)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables here, as Markdown")
    return parser.parse_args(arguments)


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    for path, text in (
        (options.json, json.dumps(report, indent=2)),
        (options.table, page(report, _titles())),
    ):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")


def _titles() -> dict[str, str]:
    """Return the tables in order, each with what it is about."""
    return {name: (getattr(Bench, name).__doc__ or name).splitlines()[0] for name in TABLES}


def _within(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    return run


if __name__ == "__main__":
    main()
