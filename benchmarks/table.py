"""Make one table of a CUDA device, in a process that has made no other: a line of JSON for each row, as it is measured.

The first line says what was measured on which machine. `gpu.py` runs this once for each table, so that a fault of the
device, after which nothing runs in a process any more, costs one table.

    python benchmarks/table.py dense
    python benchmarks/table.py errors:flash
    python benchmarks/table.py stream --device cpu --toy
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from costs import costs
from listing import machine
from meter import TOY, Meter, Operation, Row, Sizes, reason
from stream import generated, mixture, read, telling
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longspan import (
    S2,
    SCCA,
    SDA,
    Causal,
    Dilated,
    Longformer,
    LongMixed,
    LongNet,
    PerHead,
    Prefix,
    SlidingWindow,
    Streaming,
    Window,
    attend,
)
from longspan.pattern import BigBird, Documents, Fixed, Keys, Neighborhood, Pattern, Random, Strided

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"


class Bench(Meter):
    """The tables, one method each, which yield rows."""

    def dense(self) -> Iterator[Row]:
        """Causal attention over everything, beside each of PyTorch's kernels."""
        ways: dict[str, Operation] = {"longspan": partial(attend, pattern=Causal())}
        for backend in BACKENDS if self.device.type == "cuda" else (SDPBackend.MATH,):
            # Some take no key heads that are shared, so that these are repeated first, which takes its time.
            for repeated in (False, True):
                name = f"PyTorch, {backend.name.lower()}{', keys repeated' if repeated else ''}"
                ways[name] = partial(_within, backend, repeated)
        yield from self.rates(ways, Causal(), self.sizes.dense)

    def window(self) -> Iterator[Row]:
        """A window, planned and run, beside compiled FlexAttention with a mask of its own."""
        length, width = self.sizes.medium, self.sizes.window
        pattern = SlidingWindow(width)
        ways: dict[str, Operation] = {"longspan": partial(attend, pattern=pattern)}
        planned: dict[str, Row] = {"longspan": self.planned(pattern, length)}
        for kernel in ("flash", "flex") if self.device.type == "cuda" else ():
            name = f"longspan, {kernel}"
            ways[name] = partial(attend, pattern=pattern, kernel=kernel)
            planned[name] = self.planned(pattern, length, kernel)

        def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q - k < width)

        listed = partial(
            self._compiled(create_block_mask), mask, None, None, length, length, device=self.device
        )
        try:
            # Once for the compiler, whose time is not counted anywhere.
            listed()
            begin = self.now()
            own = listed()
        except Exception as error:
            yield {"what": "FlexAttention", "length": length, "refused": self.reason(error)}
        else:
            planned["FlexAttention"] = {"planning_seconds": self.now() - begin}
            ways["FlexAttention"] = partial(self._compiled(flex_attention), block_mask=own, enable_gqa=True)
        for row in self.rates(ways, pattern, length):
            yield row | planned.get(row["what"], {})
        if self.device.type == "cuda":
            # Last, since after a fault of a program of our own nothing else would run.
            programs = partial(attend, pattern=pattern, kernel="triton")
            yield from self.rates({"longspan, triton": programs}, pattern, length)

    def lengths(self) -> Iterator[Row]:
        """LongNet, S2, SCCA and LongMixed at two lengths, their sizes the same."""
        for length in (self.sizes.medium, self.sizes.long):
            for pattern in self.patterns(length):
                yield from self.rates({str(pattern): partial(attend, pattern=pattern)}, pattern, length)

    def patterns(self, length: int) -> list[Pattern]:
        """Return patterns of which a query reads as many keys however long the text is."""
        first = self.sizes.first
        return [
            LongNet((first, 2 * first, 4 * first), (1, 2, 4)),
            S2(first),
            SCCA(first // 2),
            LongMixed(first // 2, dilation=length // self.sizes.kept),
        ]

    def planning(self) -> Iterator[Row]:
        """What planning takes, with nothing kept from before."""
        length = self.sizes.long
        patterns = [SlidingWindow(self.sizes.window), *self.patterns(length), LongNet(), Streaming(508)]
        # Lists of millions of blocks take long, so those come last.
        for asked in (None, "flex"):
            for pattern in patterns:
                row: Row = {"what": str(pattern), "length": length, "asked": asked or "none"}
                try:
                    yield row | self.planned(pattern, length, asked)
                except Exception as error:
                    yield row | {"refused": reason(error, asked or "")}

    def memory(self) -> Iterator[Row]:
        """A window over a very long text, forward and backward: the peak beside the tensors themselves."""
        length, heads = self.sizes.longest, self.sizes.longest_heads
        pattern = SlidingWindow(self.sizes.window)
        row: Row = {"what": str(pattern), "length": length, "heads": f"{heads[0]} on {heads[1]}"}
        if self.device.type == "cuda":
            row["device_bytes"] = torch.cuda.get_device_properties().total_memory
        try:
            leaves, seed = self.tensors(length, heads)
            # Output, its gradient, and a gradient for each input.
            row["tensor_bytes"] = 2 * sum(side.nbytes for side in leaves) + 2 * seed.nbytes
            operation = partial(attend, pattern=pattern)
            self.turn(operation, leaves, seed)
            self._forget_peak()
            forward, backward = self.turn(operation, leaves, seed)
            yield row | self._peak() | {"forward_seconds": forward, "backward_seconds": backward}
        except torch.OutOfMemoryError as error:
            yield row | {"refused": reason(error)}

    def stream(self) -> Iterator[Row]:
        """A LongNet mixture on one head, read in chunks: time for each token at a million and at a billion."""
        sizes = self.sizes
        source = generated(sizes.stream_width, self.device, self.dtype)
        for tokens in (sizes.long, 4 * sizes.chunk, sizes.stream):
            chunk = min(tokens, sizes.chunk)
            generator = torch.Generator().manual_seed(0)
            samples = torch.randint(tokens, (sizes.samples,), generator=generator).tolist()
            terms = mixture(tokens, first=sizes.first)
            # Once for what is planned, compiled and taken from the device.
            read(source, min(tokens, 2 * chunk), *terms, chunk=chunk, samples=[0])
            self._forget_peak()
            done = [
                read(source, tokens, *terms, chunk=chunk, samples=[*telling(tokens, terms[1]), *samples])
                for _ in range(sizes.repeats if tokens == sizes.long else 1)
            ]
            seconds = median(reading.seconds for reading in done)
            row = {"what": f"{len(terms[0])} terms", **asdict(done[-1]), "seconds": seconds}
            row |= {"exact": done[-1].worst <= done[-1].budget}
            yield row | {"nanoseconds_per_token": 1e9 * seconds / tokens} | self._peak()

    def errors(self, kernel: str = "chosen") -> Iterator[Row]:
        """Fresh memory is NaN: outputs and gradients against float64, in parts of their budget."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            for pattern in families(self.sizes.checked):
                try:
                    yield self.against_truth(pattern, None if kernel == "chosen" else kernel)
                except Exception as error:
                    yield {"what": str(pattern), "kernel": kernel, "refused": self.reason(error, kernel)}
        finally:
            torch.use_deterministic_algorithms(False)

    def sanitizer(self, kernel: str = "triton") -> Iterator[Row]:
        """The errors of small texts under compute-sanitizer, where it is installed and knows the device."""
        tool = shutil.which("compute-sanitizer") or shutil.which(SANITIZER)
        row: Row = {"what": "compute-sanitizer memcheck", "kernel": kernel}
        if tool is None or self.device.type != "cuda":
            yield row | {"refused": "is not installed" if tool is None else "is for cuda"}
            return
        command = [tool, "--tool", "memcheck", "--error-exitcode", "99"]
        command += [sys.executable, __file__, f"errors:{kernel}", "--toy"]
        # Memory that is kept for later is not out of bounds for the tool.
        without = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=without)
        yield row | sanitized(done.stdout, done.returncode)

    def costs(self) -> Iterator[Row]:
        """What the plan takes a call and a merge for, beside what they take here."""
        yield from costs(self, backend="inductor" if self.device.type == "cuda" else "eager")

    def decoding(self) -> Iterator[Row]:
        """One query against all keys, whose stretches run side by side; bytes of keys and values for each second."""
        theirs = partial(scaled_dot_product_attention, enable_gqa=True)
        for length in (self.sizes.medium, self.sizes.long):
            (query, key, value), _ = self.tensors(length)
            step = query[:, :, -1:].contiguous()
            with torch.no_grad():
                seconds = self.median(partial(attend, step, key, value, Causal()))
                beside = self.median(partial(theirs, step, key, value))
            size = 2 * key.nbytes
            row: Row = {"what": "one query", "length": length, "forward_seconds": seconds}
            yield row | {"bytes_per_second": size / seconds, "pytorch_seconds": beside}

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if self.device.type == "cuda" else function

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> Row:
        return {"peak_bytes": torch.cuda.max_memory_allocated()} if self.device.type == "cuda" else {}


def families(length: int) -> list[Pattern]:
    """Return one pattern of each family, that a text of some length holds several times."""
    size = max(8, length // 16)
    return [
        Causal(),
        SlidingWindow(size),
        Streaming(size),
        Longformer(size | 1, global_tokens=4),
        LongNet((size, 4 * size), (1, 4)),
        S2(size),
        SCCA(size),
        SCCA(size, flow=4),
        SDA(4),
        LongMixed(size),
        Strided(size),
        Fixed(size, summary=2),
        BigBird(8),
        Neighborhood(size | 1),
        Documents((length // 3, length // 2)) & Causal(),
        Causal() & (Window(size) | Dilated(size)),
        Causal() & (Window(size) | Keys((0, size, 3 * size))),
        Causal() | Prefix(size),
        Causal() & (Window(size) | Random(2, size=size)),
        PerHead([SlidingWindow(size), Causal()]),
    ]


def sanitized(printed: str, code: int) -> Row:
    """Return what compute-sanitizer found: a number of errors, or why there is none."""
    lines = printed.splitlines()
    found = [line.split(":")[1].split()[0] for line in lines if "ERROR SUMMARY" in line]
    rows = [json.loads(line).get("row") for line in lines if line.startswith("{")]
    checked = sum(row is not None and "refused" not in row for row in rows)
    if not found or code not in (0, 99) or not (checked or int(found[-1])):
        said = [line.strip("= ") for line in lines if line.startswith("=========")]
        return {
            "refused": f"ended with {code} after {checked} patterns: {said[-1] if said else 'nothing said'}"
        }
    return {"patterns": checked, "errors": int(found[-1])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", metavar="TABLE[:KERNEL]")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="sizes at which figures mean nothing")
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    table, *kernel = options.table.split(":")
    try:
        bench = Bench(TOY if options.toy else Sizes(), torch.device(options.device), dtype)
        facts = {
            "machine": machine(options.device),
            "dtype": str(dtype).removeprefix("torch."),
            "sizes": asdict(bench.sizes),
            "product_tflops": bench.product / 1e12,
        }
        print(json.dumps({"facts": facts}), flush=True)
        for row in getattr(bench, table)(*kernel):
            print(json.dumps({"row": row}), flush=True)
    except Exception as error:
        traceback.print_exc()
        row = {"what": "failed", **dict(zip(["kernel"], kernel, strict=False)), "refused": reason(error)}
        print(json.dumps({"row": row}), flush=True)
        # What is left to be freed on a device that has failed may fail again.
        os._exit(1)


def _within(backend: SDPBackend, repeated: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if repeated:
        key, value = (side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=not repeated)


if __name__ == "__main__":
    main()
