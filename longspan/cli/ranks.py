"""The ranks: processes that torchrun started, which carry one command out together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from longspan.ring.watch import TIMEOUT, join


@contextmanager
def ranks(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[tuple[int, int]]:
    """Join the processes of torchrun for as long as a block runs, and yield the number of this one and of all.

    Args:
        device: what they compute on.
        timeout: how long they wait for one another.

    Raises:
        RankError: they do not come together in that time.

    Example:
        >>> with ranks(torch.device("cpu")) as found:
        ...     print(found)
        (0, 1)
    """
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number == 1:
        yield 0, 1
        return
    join(device.type, timeout)
    try:
        yield dist.get_rank(), number
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: on CUDA, the one that torchrun numbers.

    Example:
        >>> own_device(torch.device("cpu"))
        device(type='cpu')
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
