"""One step of attention, forward and backward, on two ranks of this machine and in one process: times, and what overlaps.

Each rank has one thread. Beside it the same whole text is read by one process on the same cores, with as many threads
as there are of them, up to two, and with one thread. On one core two ranks take turns, and times tell what splitting costs.

A trace of torch.profiler has the intervals in which this rank computed and in which something was on its way: from
the moment that it was handed to torch.distributed until the wait for it had returned. The same exchanges without
anything computed meanwhile are timed too.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from longspan import Causal, SlidingWindow, attend, ring
from longspan.layout import Layout, contiguous, zigzag
from longspan.pattern import Pattern
from longspan.ring import rotation, transport

RANKS = 2
Case = tuple[Pattern, int, Callable[[int, int], Layout]]
CASES: tuple[Case, ...] = (
    (Causal(), 4_096, zigzag),
    (SlidingWindow(1_024), 8_192, contiguous),
)
HEADS, WIDTH = 8, 64
Interval = tuple[float, float]


def steps(cases: Sequence[Case] = CASES, repeats: int = 3) -> list[dict[str, Any]]:
    """Return the figures of each case; times are the best of several, seconds unless the name says otherwise."""
    cores = min(RANKS, len(os.sched_getaffinity(0)))
    [alone], both = _run(1, (1, cores), cases, repeats), _run(RANKS, (1,), cases, repeats)
    rows = []
    for number, (pattern, length, layout) in enumerate(cases):
        one, all_cores = alone[number]
        ranks = [rank[number][0] for rank in both]
        step = max(rank["seconds"] for rank in ranks)
        rows.append(
            {
                "pattern": str(pattern),
                "length": length,
                "layout": layout(length, RANKS).name,
                "cores": cores,
                "one_thread": one["seconds"],
                "one_process": all_cores["seconds"],
                "two_ranks": step,
                "one_thread_processor": one["processor"],
                "two_ranks_processor": sum(rank["processor"] for rank in ranks),
                "traces": [rank["trace"] for rank in ranks],
            }
        )
    return rows


def _run(ranks: int, threads: tuple[int, ...], *given: Any) -> list[list[list[dict[str, Any]]]]:
    """Return what each of some fresh processes finds of each case, with so many threads and with so many."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            context.Process(target=_rank, args=(rank, ranks, threads, folder, *given))
            for rank in range(ranks)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, threads: tuple[int, ...], folder: str, cases: Sequence[Case], repeats: int
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found: list[list[dict[str, Any]]] = []
    for case in cases:
        found.append([])
        for number in threads:
            torch.set_num_threads(number)
            found[-1].append(_timed(*case, repeats))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _timed(
    pattern: Pattern, length: int, layout: Callable[[int, int], Layout], repeats: int
) -> dict[str, Any]:
    """Return the times of a step on the ranks of the group, and what was on its way where there are several."""
    lies = layout(length, dist.get_world_size())
    at = torch.from_numpy(lies.positions(dist.get_rank()))
    torch.manual_seed(0)
    sides = [
        torch.randn(1, heads, length, WIDTH)[:, :, at].requires_grad_() for heads in (HEADS, HEADS, HEADS)
    ]

    def step() -> None:
        output = ring.attend(*sides, pattern, layout=lies) if lies.ranks > 1 else attend(*sides, pattern)
        output.backward(torch.ones_like(output))

    step()
    seconds, processor = [], []
    for _ in range(repeats):
        dist.barrier()
        begin, spent = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - spent)
    found: dict[str, Any] = {"seconds": min(seconds), "processor": min(processor)}
    if lies.ranks > 1:
        found["trace"] = _traced(step, repeats)
    return found


def _traced(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Return milliseconds of one step, by its trace, and of the same exchanges with nothing computed meanwhile."""
    moved: list[tuple[Any, ...]] = []
    exchange, kernels = transport.exchange, (rotation.part.attend, rotation.part.gradients)

    def marked(*given: Any) -> Callable[[], None]:
        number = len(moved)
        moved.append(given)
        with record_function(f"hand over {number}"):
            wait = exchange(*given)

        def waited() -> None:
            with record_function(f"wait for {number}"):
                wait()

        return waited

    def computing(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            with record_function("compute"):
                return kernel(*given)

        return run

    transport.exchange = marked
    rotation.part.attend, rotation.part.gradients = map(computing, kernels)
    try:
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step()
    finally:
        transport.exchange = exchange
        rotation.part.attend, rotation.part.gradients = kernels
    ranges: dict[str, list[Interval]] = {}
    for event in trace.events():
        ranges.setdefault(event.name, []).append((event.time_range.start / 1e3, event.time_range.end / 1e3))
    compute = ranges.get("compute", [])
    waits = [ranges[f"wait for {number}"][0] for number in range(len(moved))]
    flights = [(ranges[f"hand over {number}"][0][0], wait[1]) for number, wait in enumerate(waits)]
    alone = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        for given in moved:
            exchange(*given)()
        alone.append(1e3 * (time.perf_counter() - begin))
    return {
        "compute_ms": sum(end - begin for begin, end in compute),
        "in_flight_ms": sum(end - begin for begin, end in flights),
        "in_flight_while_computing_ms": overlap(flights, compute),
        "blocked_ms": sum(end - begin for begin, end in waits),
        "exchange_alone_ms": min(alone),
    }


def overlap(first: Iterable[Interval], second: Iterable[Interval]) -> float:
    """Return how long intervals of the first list lie in those of the second, which do not overlap themselves."""
    others = list(second)
    return sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in first for start, stop in others)
