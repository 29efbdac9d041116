"""Ranks for tests: processes of this machine that form a gloo group over a file, started from one warm server.

The server has imported everything once, so a rank starts in the time of a fork; nothing listens on a fixed port.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Job = Callable[..., Any]


def together(folder: Path, ranks: int, job: Job, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Run `job(rank, *arguments)` on every rank, and return what each returned; fail with what a rank raised."""
    results = apart(folder, ranks, job, *arguments, timeout=timeout)
    raised = [f"rank {rank}\n{result}" for rank, (done, result) in enumerate(results) if not done]
    assert not raised, "\n".join(raised)
    return [result for _, result in results]


def apart(
    folder: Path,
    ranks: int,
    job: Job,
    *arguments: Any,
    timeout: float = 60.0,
    watched: Sequence[int] | None = None,
) -> list[tuple[bool, Any]]:
    """Run as `together` does, and return for every rank whether it came to its end, and what it returned or raised.

    Only the ranks `watched` are waited for; what is left of the others then is ended.
    """
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    with _one_thread():
        # Where models are tested too, the server has them ready.
        models = ["model_cases", "longspan.extend.extension"] if "transformers" in sys.modules else []
        context.set_forkserver_preload(["ring_cases", *models])
        given = (folder, ranks, timeout, job, arguments)
        processes = [context.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
    for rank in range(ranks) if watched is None else watched:
        processes[rank].join(200)
    results = []
    for rank, process in enumerate(processes):
        process.kill()
        path = folder / f"rank{rank}.pt"
        results.append(torch.load(path, weights_only=False) if path.exists() else (False, "no answer"))
    return results


@contextmanager
def _one_thread() -> Any:
    kept = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent), GLOO_SOCKET_IFNAME="lo")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _rank(rank: int, folder: Path, ranks: int, timeout: float, job: Job, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    try:
        result = True, job(rank, *arguments)
    except Exception as error:
        result = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(result, folder / f"rank{rank}.pt")
    # A group with a dead member cannot be closed in order.
    os._exit(0)
