"""Count what ranks must send one another, and how evenly they work, for patterns, lengths and numbers of ranks.

All that is counted from the plan, so a million tokens on a thousand ranks need no cluster. For each
pattern, the key blocks that it needs are set against those that move without it: a causal ring (contiguous shards,
each passed on to the ranks after it), zigzag, and Ulysses, which swaps tokens for heads. Balance is the work of the
slowest rank over the mean, in pairs. `seconds` are of processor time. Last, one step
runs on two ranks of this machine, see `benchmarks/steps.py`.

    python benchmarks/ranks.py --json out/ranks.json
    python benchmarks/ranks.py --lengths 32768 --ranks 8
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from listing import aligned, machine, numbers, save
from steps import CASES, steps

from longspan import Causal, Chunk, Dilated, LongNet, SlidingWindow, Streaming
from longspan.layout import contiguous, striped, zigzag
from longspan.pattern import Pattern
from longspan.ring import Plan, plan

PATTERNS: list[Pattern] = [
    Causal(),
    SlidingWindow(4_096),
    Streaming(4_096, sinks=4),
    Causal() & Chunk(8_192),
    Causal() & Dilated(64),
    LongNet((2_048, 8_192, 32_768), (1, 4, 16)),
]
LAYOUTS = [contiguous, zigzag, striped]
# What a pattern is set against: all keys before the query, in the layouts that are in use for them.
DENSE = [("causal ring", contiguous, "ring"), ("zigzag", zigzag, "ring"), ("ulysses", contiguous, "ulysses")]
BLOCK = 128


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    rows, begun = [], time.process_time()
    for length in options.lengths:
        for ranks in options.ranks:
            shape = {"heads": options.heads, "key_heads": options.key_heads, "width": options.width}
            for name, layout, strategy in DENSE:
                made = plan(Causal(), layout(length, ranks), dtype=options.dtype, strategy=strategy, **shape)
                rows.append(_row(name, made))
            for pattern in PATTERNS:
                for layout in LAYOUTS:
                    begin = time.process_time()
                    made = plan(pattern, layout(length, ranks), dtype=options.dtype, **shape)
                    rows.append(_row(str(pattern), made))
                    rows[-1]["seconds"] = time.process_time() - begin
            print(f"{length:,} tokens on {ranks:,} ranks", file=sys.stderr)
    report = {
        "heads": options.heads,
        "key_heads": options.key_heads,
        "width": options.width,
        "dtype": options.dtype,
        "block": BLOCK,
        "rows": rows,
        "seconds": time.process_time() - begun,
        "machine": machine("cpu"),
        "steps": steps([(pattern, min(length, options.step), layout) for pattern, length, layout in CASES]),
    }
    print(_table(report))
    print(_steps(report["steps"]))
    save(report, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=numbers, default=[32_768, 131_072, 1_048_576], metavar="N,N")
    parser.add_argument("--ranks", type=numbers, default=[8, 64, 1_024], metavar="N,N")
    parser.add_argument(
        "--step", type=int, default=8_192, metavar="N", help="most tokens of a step that runs (default: 8192)"
    )
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default: 32)")
    parser.add_argument("--key-heads", type=int, default=8, metavar="N", help="key heads (default: 8)")
    parser.add_argument(
        "--width", type=int, default=128, metavar="N", help="numbers in a head (default: 128)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    return parser.parse_args(arguments)


def _row(name: str, made: Plan) -> dict[str, Any]:
    """Return the figures of one plan; bytes are those of a forward pass, of one row of the batch."""
    return {
        "name": name,
        "length": made.layout.length,
        "ranks": made.layout.ranks,
        "layout": made.layout.name,
        "strategy": made.strategy,
        "blocks": made.blocks,
        "bytes": int(made.moved.sum()),
        "busiest_bytes": int(made.received.max()),
        "balance": made.balance,
    }


def _table(report: dict[str, Any]) -> str:
    header = (
        "",
        "layout",
        "strategy",
        "blocks needed",
        "GB moved",
        "GB to busiest",
        "of causal ring",
        "balance",
    )
    lines, titles = [header], {}
    ring: dict[tuple[int, int], int] = {}
    for row in report["rows"]:
        setting = row["length"], row["ranks"]
        if setting not in ring:
            ring[setting] = row["bytes"]
            titles[len(lines)] = f"{row['length']:,} tokens on {row['ranks']:,} ranks"
        lines.append(
            (
                row["name"],
                row["layout"],
                row["strategy"],
                f"{row['blocks']:,}",
                f"{row['bytes'] / 1e9:,.3f}",
                f"{row['busiest_bytes'] / 1e9:,.3f}",
                f"{row['bytes'] / max(1, ring[setting]):.1%}",
                f"{row['balance']:.2f}",
            )
        )
    table = []
    for number, line in enumerate(aligned(lines, left=3)):
        table += ["", titles[number], line] if number in titles else [line]
    described = (
        f"{report['heads']} heads on {report['key_heads']} key heads of width {report['width']}, {report['dtype']}, "
        f"blocks of {report['block']}, one forward pass of one layer; "
        f"{len(report['rows'])} rows counted in {report['seconds']:,.0f} s of processor time"
    )
    return "\n".join([described, "", *table])


def _steps(rows: list[dict[str, Any]]) -> str:
    """Return what ran on two ranks as lines of text."""
    lines = [
        "",
        "one step on two ranks: milliseconds forward and backward, against one process on the same cores; of the first "
        "rank what was on its way, how much of it while it computed, how long it waited, and the exchange by itself",
        "",
    ]
    header = (
        "",
        "tokens",
        "cores",
        "two ranks",
        "one process",
        "processor time",
        "on its way",
        "computing",
        "waited",
        "alone",
    )
    table: list[tuple[str, ...]] = [header]
    for row in rows:
        trace = row["traces"][0]
        names = ("in_flight_ms", "in_flight_while_computing_ms", "blocked_ms", "exchange_alone_ms")
        table.append(
            (
                row["pattern"],
                f"{row['length']:,}",
                str(row["cores"]),
                f"{1e3 * row['two_ranks']:.1f}",
                f"{1e3 * row['one_process']:.1f}",
                f"{row['two_ranks_processor'] / row['one_thread_processor']:.2f} times",
                *(f"{trace[name]:.1f}" for name in names),
            )
        )
    return "\n".join([*lines, *aligned(table)])


if __name__ == "__main__":
    main()
