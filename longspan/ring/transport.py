"""The transport: keys, values and their gradients from rank to rank, by torch.distributed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.errors import LongspanError, message
from longspan.ring.schedule import Runs, Step


class RankError(LongspanError):
    """Ranks do not fit together, or one of them is gone."""


class LostRankError(RankError):
    """A rank waited for others in vain.

    Attributes:
        step: what it waited in.
        reason: what torch.distributed said.
    """

    def __init__(self, text: str, step: str, reason: str) -> None:
        super().__init__(text)
        self.step, self.reason = step, reason


def lost(error: BaseException) -> bool:
    """Say whether an error tells of a rank that is gone or does not answer.

    What gloo raises is a RuntimeError like any other, but for its text.
    """
    told = isinstance(error, LostRankError | dist.DistError)
    return told or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def first_line(error: BaseException | None) -> str:
    """Return the first line of what an error says, without its place in the sources of gloo, and guesses at why."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S+:\d+\] |\. This may indicate .*", "", lines[0])


@contextmanager
def reaching(rank: int, others: str, step: str) -> Iterator[None]:
    """Turn what torch.distributed raises into an error that names rank and step."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        text = message(
            f"Rank {rank} waited for {others} in vain.",
            {"step": step, "reason": reason},
            fix="look for the first error of the other ranks; init_process_group(timeout=...) sets the patience",
        )
        raise LostRankError(text, step, reason) from error


@dataclass(frozen=True)
class Held:
    """Keys and values of some places of one rank.

    Attributes:
        runs: the places.
        key, value: `[batch, key heads, places, width]`.
    """

    runs: Runs
    key: Tensor
    value: Tensor

    def take(self, runs: Runs) -> Held:
        """Return some of the places, which must all be held."""
        if runs == self.runs:
            return self
        held, wanted = _places(self.runs), _places(runs)
        at = torch.from_numpy(np.searchsorted(held, wanted)).to(self.key.device)
        return Held(runs, self.key[:, :, at], self.value[:, :, at])

    def packed(self) -> Tensor:
        """Return all numbers in one row."""
        return torch.cat([self.key.reshape(-1), self.value.reshape(-1)])


def _places(runs: Runs) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(run) for run in runs)])


def _unpacked(buffer: Tensor, runs: Runs, like: Held) -> Held:
    shapes = [(*side.shape[:2], sum(map(len, runs)), side.shape[3]) for side in (like.key, like.value)]
    cut = int(np.prod(shapes[0]))
    return Held(runs, buffer[:cut].view(shapes[0]), buffer[cut:].view(shapes[1]))


class Link:
    """One rank's end of the group, for one pass through its steps.

    Args:
        group: the process group.
        own: the keys and values of this rank.
        steps: what is sent and received, in order.
        label: what the pass is, for messages.
    """

    def __init__(self, group: dist.ProcessGroup, own: Held, steps: tuple[Step, ...], label: str) -> None:
        self.group, self.own, self.steps, self.label = group, own, steps, label
        self.rank = dist.get_rank(group)

    def arrivals(self) -> Iterator[tuple[int, Held | None]]:
        """Yield -1 with the keys of this rank, then each step's number with what it reads, None for nothing.

        While the caller works on one of them, the next is on its way.
        """
        arriving = self._post(0, self.own)
        yield -1, self.own
        for number, step in enumerate(self.steps):
            held = arriving()
            arriving = self._post(number + 1, held)
            yield number, held.take(step.reads) if step.reads else None

    def _post(self, number: int, held: Held) -> Callable[[], Held]:
        """Start what a step sends and receives, and return what waits for it."""
        if number == len(self.steps):
            return lambda: held
        step = self.steps[number]
        leaving = [
            (receiver, (self.own if source == self.rank else held).take(runs).packed())
            for receiver, source, runs in step.sends
        ]
        places = sum(map(len, step.arrives))
        width = self.own.key.shape[3] + self.own.value.shape[3]
        buffer = self.own.key.new_empty(self.own.key.shape[0] * self.own.key.shape[1] * places * width)
        if step.broadcast:
            wait = self._broadcast(number, leaving[0][1] if leaving else buffer, step.source)
        else:
            wait = self._exchange(number, leaving, [(step.sender, buffer)] if places else [])

        def arrived() -> Held:
            wait()
            return _unpacked(buffer, step.arrives, self.own)

        return arrived

    def give_back(self, number: int, gradient: Held | None) -> Callable[[], list[Held]]:
        """Send the gradient of what a step read to its owner, and return what waits for those on own keys."""
        step = self.steps[number]
        leaving = [(step.source, gradient.packed())] if gradient is not None else []
        width = self.own.key.shape[3] + self.own.value.shape[3]
        rows = self.own.key.shape[0] * self.own.key.shape[1] * width
        coming = [
            (rank, runs, self.own.key.new_empty(rows * sum(map(len, runs)))) for rank, runs in step.returns
        ]
        wait = self._exchange(number, leaving, [(rank, buffer) for rank, _, buffer in coming])

        def returned() -> list[Held]:
            wait()
            return [_unpacked(buffer, runs, self.own) for _, runs, buffer in coming]

        return returned

    def _exchange(
        self, number: int, leaving: list[tuple[int, Tensor]], coming: list[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        return exchange(self.group, leaving, coming, self._name(number))

    def _broadcast(self, number: int, tensor: Tensor, source: int) -> Callable[[], None]:
        others = f"rank {source}" if source != self.rank else "the other ranks"
        with reaching(self.rank, others, self._name(number)):
            work = dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)
        return lambda: _wait(self.rank, [(others, work)], self._name(number))

    def _name(self, number: int) -> str:
        return f"{number + 1} of {len(self.steps)}, {self.label}"


def exchange(
    group: dist.ProcessGroup, leaving: list[tuple[int, Tensor]], coming: list[tuple[int, Tensor]], step: str
) -> Callable[[], None]:
    """Start sending and receiving, pairs of a rank and what goes to it or comes from it; return what waits for all."""
    rank = dist.get_rank(group)
    operations = [
        (f"rank {other}", dist.P2POp(direction, tensor, group=group, group_peer=other))
        for direction, tensors in ((dist.irecv, coming), (dist.isend, leaving))
        for other, tensor in tensors
    ]
    if not operations:
        return lambda: None
    others = [name for name, _ in operations]
    with reaching(rank, ", ".join(sorted(set(others))), step):
        works = dist.batch_isend_irecv([operation for _, operation in operations])
    # NCCL gives one handle for all of them.
    names = others if len(works) == len(others) else [", ".join(sorted(set(others)))] * len(works)
    return lambda: _wait(rank, list(zip(names, works, strict=True)), step)


def _wait(rank: int, works: list[tuple[str, dist.Work]], step: str) -> None:
    for others, work in works:
        with reaching(rank, others, step):
            work.wait()
