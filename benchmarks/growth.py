"""Measure how time and memory grow with the length of a text, for every pattern whose pairs grow no faster than it.

Each pattern is measured in a process of its own: its plan for the long text with nothing kept and a second time; the
fewest seconds of two forward and backward passes of the long text, and of several of the short one, half of them before
and half after. Seconds are those of the processor. "Growth" is the time of a token of the long text over that of a token of
the short one. "Workspace" is the most memory that the process held in the passes of the long text beyond what it held
before and the output or the gradients. Inputs are of width 64, in float32 0.27 GB a tensor and head at 1,048,576 tokens;
a process needs nine of them.

    python benchmarks/growth.py --json docs/growth.json
    python benchmarks/growth.py --only S2 --lengths 16384,131072
    python benchmarks/growth.py --dtype bfloat16 --json docs/growth.bfloat16.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from listing import aligned, forget, machine, numbers, save

from longspan import S2, SCCA, SDA, LongMixed, LongNet, SlidingWindow, Streaming, attend, plan
from longspan.pattern import BigBird, Longformer, Pattern

LENGTHS = (16_384, 1_048_576)
STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def case(number: int, length: int) -> tuple[Pattern, int] | None:
    """Return a pattern for a text of some length and on how many heads it is measured, or None behind the last."""
    # What thins out a text keeps 512 of its keys.
    far = max(1, length // 512)
    cases: list[tuple[Pattern, int]] = [
        (SlidingWindow(512), 1),
        (Longformer(257, global_tokens=16), 1),
        (Longformer(257, global_tokens=16, causal=False), 1),
        (Streaming(508), 1),
        (LongNet((2_048, 4_096, 8_192), (1, 2, 4)), 1),
        (S2(2_048), 2),
        (SCCA(1_024), 2),
        (SCCA(1_024, flow=2), 2),
        (SDA(far), 1),
        (LongMixed(1_024, dilation=far), 4),
        (BigBird(64), 1),
        (BigBird(64, length=length, causal=False), 1),
    ]
    return cases[number] if number < len(cases) else None


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.alone is not None:
        print(json.dumps(_measured(options.alone, options)))
        return
    rows = []
    number = 0
    while (found := case(number, max(options.lengths))) is not None:
        if options.only in str(found[0]):
            rows.append(_in_own_process(number, options))
            print(_line(rows[-1]), file=sys.stderr)
        number += 1
    report = {
        "machine": machine("cpu"),
        "threads": torch.get_num_threads(),
        "lengths": options.lengths,
        "width": options.width,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "rows": rows,
    }
    short, long = (f"{length:,}" for length in options.lengths)
    print(
        f"{report['machine']}; {options.dtype}, width {options.width}, {report['threads']} threads, processor time"
    )
    header = ("pattern", "heads", "kernel", "plan ms", "again", f"us a token, {short}", long, "growth")
    print(*aligned([(*header, "workspace MB"), *map(_line, rows)]), sep="\n")
    save(report, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=numbers,
        default=list(LENGTHS),
        metavar="N,N",
        help="a short and a long text, in tokens (default: 16384,1048576)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="measure patterns whose names hold this")
    parser.add_argument("--width", type=int, default=64, metavar="N", help="numbers in a head (default: 64)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of all tensors (default: float32)",
    )
    parser.add_argument(
        "--repeats", type=int, default=8, metavar="N", help="passes of the short text (default: 8)"
    )
    parser.add_argument("--kernel", help="the kernel that runs (default: the first that can)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    parser.add_argument("--alone", type=int, metavar="N", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _in_own_process(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one case, whose memory no other case has touched."""
    asked = [
        *("--alone", str(number), "--lengths", ",".join(map(str, options.lengths))),
        *("--width", str(options.width), "--repeats", str(options.repeats), "--dtype", options.dtype),
        *(("--kernel", options.kernel) if options.kernel else ()),
    ]
    ran = subprocess.run([sys.executable, __file__, *asked], stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        sys.exit(f"Case {number} ended with {ran.returncode}.")
    return json.loads(ran.stdout)


def _measured(number: int, options: argparse.Namespace) -> dict[str, Any]:
    short, long = options.lengths
    found = case(number, long), case(number, short)
    assert found[0] is not None and found[1] is not None
    (pattern, heads), (small, _) = found
    asked = {
        "length": long,
        "heads": heads,
        "width": options.width,
        "dtype": options.dtype,
        "kernel": options.kernel,
    }

    def planned() -> Any:
        return plan(pattern, **asked)

    # The first pass of a process loads and allocates what later ones have.
    few = _Pass(small, heads, short, options)
    few.run()
    cold = []
    for _ in range(3):
        forget()
        cold.append(_seconds(planned))
    again = _seconds(planned)
    half = [few.run() for _ in range(-(-options.repeats // 2))]
    many = _Pass(pattern, heads, long, options)
    # Memory that nothing has touched before is slow to come by, more so in a virtual machine.
    seconds = min(many.run() for _ in range(2))
    short_seconds = min(*half, *(few.run() for _ in half))
    token = [1e6 * short_seconds / short, 1e6 * seconds / long]
    return {
        "pattern": str(pattern),
        "heads": heads,
        "kernel": planned().kernel,
        "plan": min(cold),
        "plan_again": again,
        "seconds": [short_seconds, seconds],
        "token_microseconds": token,
        "growth": token[1] / token[0],
        "workspace_bytes": many.beyond,
    }


class _Pass:
    """A forward and a backward pass, and the memory that the last one took beyond its results."""

    def __init__(self, pattern: Pattern, heads: int, length: int, options: argparse.Namespace) -> None:
        shape, dtype = (1, heads, length, options.width), getattr(torch, options.dtype)
        self.pattern, self.kernel = pattern, options.kernel
        self.inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
        self.seed = torch.randn(shape, dtype=dtype)
        self.beyond = 0

    def run(self) -> float:
        for side in self.inputs:
            side.grad = None
        held = [_held_anew()]
        made: list[torch.Tensor] = []
        forward = _seconds(lambda: made.append(attend(*self.inputs, self.pattern, kernel=self.kernel)))
        peaks = [_memory("VmHWM") - made[0].nbytes]
        held.append(_held_anew())
        backward = _seconds(lambda: made[0].backward(self.seed))
        peaks.append(_memory("VmHWM") - sum(side.nbytes for side in self.inputs))
        self.beyond = max(peak - before for peak, before in zip(peaks, held, strict=True))
        return forward + backward


def _held_anew() -> int:
    """Return the memory that this process holds, and begin to look for the most of it anew."""
    ctypes.CDLL(None).malloc_trim(0)
    PEAK_RESET.write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    """Return a number of bytes that Linux tells of this process."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == f"{name}:")


def _seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    short, long = row["token_microseconds"]
    return (
        row["pattern"],
        str(row["heads"]),
        row["kernel"],
        f"{1000 * row['plan']:.1f}",
        f"{1000 * row['plan_again']:.2f}",
        f"{short:.2f}",
        f"{long:.2f}",
        f"{row['growth']:.2f} x",
        f"{row['workspace_bytes'] / 1e6:.0f}",
    )


if __name__ == "__main__":
    main()
