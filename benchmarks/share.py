"""Run one rank's share of a text of a billion tokens, read by a mixture in the manner of LongNet.

The plan is made for all ranks: what each sends, receives and computes. Then the share of one rank is computed forward
on this machine, with made-up numbers where keys of other ranks would arrive, and its time per token is set against that
of a text of 65,536 tokens, read by the same pattern in one process. Processor time is what counts, so that other programs on the
machine do not.

    python benchmarks/share.py
    python benchmarks/share.py --length 16777216 --ranks 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from longspan import LongNet, attend
from longspan.layout import contiguous
from longspan.pattern import Pattern
from longspan.ring import plan, rotation
from longspan.ring.schedule import Step
from longspan.ring.transport import Held
from longspan.score import Scores

BASE = 65_536


def main(arguments: Sequence[str] | None = None) -> float:
    """Print the plan and the times, and return the share's time per token over that of 65,536 tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1_000_000_000, metavar="N")
    parser.add_argument("--ranks", type=int, default=256, metavar="N")
    parser.add_argument("--rank", type=int, metavar="N", help="whose share (default: the middle one)")
    parser.add_argument("--heads", type=int, default=1, metavar="N")
    parser.add_argument("--width", type=int, default=32, metavar="N")
    options = parser.parse_args(arguments)
    rank = options.ranks // 2 if options.rank is None else options.rank
    pattern, heads, width = mixture(options.length), options.heads, options.width
    layout = contiguous(options.length, options.ranks)
    begin = time.process_time()
    made = plan(pattern, layout, heads=heads, width=width)
    places = layout.places(rank)
    held = 4 * places * heads * width * 4
    print(
        f"{pattern}\n{layout}, {heads} heads of width {width}, float32; rank {rank} holds {places:,} tokens"
    )
    print(f"planned in {time.process_time() - begin:.1f} s of processor time, {len(made.threads)} threads")
    print(f"query, key, value and output of one layer {held / 1e9:.2f} GB a rank")
    print(f"received {made.received[rank]:,} bytes, by the busiest rank {made.received.max():,}")
    print(f"flops forward {4 * width * int(made.pairs[rank]):,}, balance {made.balance:.3f}")
    times = {}
    with torch.no_grad():
        for name, tokens, run in (
            ("one process", BASE, lambda *sides: attend(*sides, pattern)),
            (f"rank {rank}", places, _replayed(made, rank, width)),
        ):
            sides = [torch.randn(1, heads, tokens, width) for _ in range(3)]
            times[name] = _seconds(run, sides) / tokens
            print(
                f"{name}: {tokens:,} tokens, {times[name] * 1e6:.3f} microseconds of processor time a token"
            )
    ratio = times[f"rank {rank}"] / times["one process"]
    print(f"a token of the share takes {ratio:.2f} times as long")
    return ratio


def mixture(length: int) -> Pattern:
    """Return branches of 2,048 kept tokens each, from segments of 2,048 tokens up to the whole text."""
    doublings = range(max(1, (length - 1).bit_length() - 10))
    return LongNet(tuple(2_048 << n for n in doublings), tuple(1 << n for n in doublings))


def _seconds(run: Callable[..., Any], sides: list[torch.Tensor]) -> float:
    """Return processor seconds of a run after one that plans."""
    run(*sides)
    begin = time.process_time()
    run(*sides)
    return time.process_time() - begin


def _replayed(made: Any, rank: int, width: int) -> Callable[..., torch.Tensor]:
    """Return the attention of one rank whose neighbours are played by random numbers."""

    class Replay:
        def __init__(self, group: Any, own: Held, steps: tuple[Step, ...], label: str) -> None:
            self.own, self.steps = own, steps

        def arrivals(self) -> Iterator[tuple[int, Held | None]]:
            yield -1, self.own
            rows = self.own.key.shape[:2]
            for number, step in enumerate(self.steps):
                count = int(np.sum([len(run) for run in step.reads]))
                sides = (torch.randn(*rows, count, width) for _ in range(2))
                yield number, Held(step.reads, *sides) if step.reads else None

    rotation.Link = Replay
    rotation.Turn.rank = property(lambda turn: rank)
    return lambda *sides: rotation.attend(*sides, made, None, width**-0.5, Scores())


if __name__ == "__main__":
    main()
