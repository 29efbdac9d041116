"""Measure how long planning takes: with nothing kept, and the second time.

Seconds are those of the processor, which others on a busy machine hardly change. "First" is the first plan of a pattern
in this process, after a plan of another pattern; "cold" is the least of some more with nothing kept from before; "again"
is a plan of equal arguments. Parts are those of all groups of heads; "computed" is pairs computed over pairs read by
PyTorch's CPU kernel.

    python benchmarks/planning.py --json out/planning.json
    python benchmarks/planning.py --lengths 16384,65536 --heads 32
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from listing import aligned, forget, machine, numbers, save

from longspan import S2, SCCA, SDA, Causal, LongMixed, LongNet, SlidingWindow, Streaming, Window, plan
from longspan.pattern import BigBird, Dilated, Every, Fixed, Longformer, Pattern, Strided

LENGTHS = (16_384, 1_048_576)


def patterns(length: int) -> list[Pattern]:
    """Return the patterns of the literature whose pairs grow with the length, or a small part of its square."""
    return [
        SlidingWindow(512),
        Longformer(256, global_tokens=16),
        Streaming(508),
        S2(8_192),
        SCCA(1_024),
        SCCA(1_024, flow=4),
        SDA(8),
        LongMixed(1_024),
        LongNet(),
        Strided(1_024),
        Fixed(1_024, summary=8),
        Causal() & (Window(128) | Dilated(128)),
        Causal() & (Window(128) | Every(128)),
        BigBird(64),
        BigBird(64, length=length, causal=False),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    plan(Causal() & Window(33), length=500, heads=options.heads)
    rows = [
        _row(pattern, length, options.heads) for length in options.lengths for pattern in patterns(length)
    ]
    report = {"machine": machine("cpu"), "heads": options.heads, "rows": rows}
    print(f"{report['machine']}; {options.heads} heads; ms of the processor")
    header = ("pattern", "length", "first", "cold", "again", "parts", "computed")
    print(*aligned([header, *map(_line, rows)]), sep="\n")
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
        help="tokens (default: 16384,1048576)",
    )
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="a multiple of 8 (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    return parser.parse_args(arguments)


def _row(pattern: Pattern, length: int, heads: int) -> dict[str, Any]:
    def planned() -> Any:
        return plan(pattern, length=length, heads=heads, kernel="sdpa")

    forget()
    first = _seconds(planned)
    again = _seconds(planned)
    cold = []
    for _ in range(3):
        forget()
        cold.append(_seconds(planned))
    made = planned()
    print(f"{pattern} at {length:,}", file=sys.stderr)
    return {
        "pattern": str(pattern),
        "length": length,
        "first": first,
        "cold": min(cold),
        "again": again,
        "parts": sum(len(group.parts) for group in made.groups),
        "computed": made.area / max(1, made.pairs),
    }


def _seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{1000 * row[name]:.2f}" for name in ("first", "cold", "again"))
    return (row["pattern"], f"{row['length']:,}", *times, f"{row['parts']:,}", f"{row['computed']:.2f} x")


if __name__ == "__main__":
    main()
