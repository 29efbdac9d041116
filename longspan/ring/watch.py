"""The watch: where one of many ranks is lost, whatever noticed it, the others end in one error that names it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from longspan.errors import message
from longspan.ring.transport import LostRankError, RankError, first_line, lost

# Seconds between two signs of life, and how long one must be missing before a rank counts as silent.
BEAT, SILENCE = 0.5, 3.0
# Seconds that the whole look at the others may take, should the place where they leave their signs be gone too.
_LOOK = 3 * SILENCE
# How long ranks wait for one another where nothing else is asked for.
TIMEOUT = timedelta(minutes=10)


class _TerminatedError(BaseException):
    """The process was asked to end, as torchrun asks the others when one has died."""


class Watch:
    """Sees that a job of many ranks ends in one error where one of them is lost.

    Used as a context around the job, by every rank, in a process group or not: a process alone is left as it is.
    Each rank leaves signs of life in the store of the group, with the step that it is in. When torch.distributed or
    an exchange tells this rank that it waits in vain, or SIGTERM asks it to end, it looks which ranks have fallen
    silent. One that was killed or stopped is silent; one that waits in vain itself is not.

    Args:
        job: what the ranks do together, such as "the training".
        kept: says what is there to go on from, label to text, when a rank is lost.
        fix: what to do then.

    Attributes:
        step: where this rank is, for messages; whoever does the job keeps it up to date.

    Raises:
        RankError: when the context is left, in the place of an error that tells of a lost rank.

    Example:
        >>> with Watch("the training", fix="begin again") as watch:
        ...     watch.step = "step 1 of 10"
    """

    def __init__(
        self,
        job: str,
        *,
        kept: Callable[[], Mapping[str, str]] | None = None,
        fix: str,
        step: str = "the time before the first step",
    ) -> None:
        self.job, self._step = job, step
        self._kept, self._fix = kept, fix
        self._moved, self._ended = threading.Event(), False
        self._signs: threading.Thread | None = None

    @property
    def step(self) -> str:
        return self._step

    @step.setter
    def step(self, step: str) -> None:
        self._step = step
        self._moved.set()

    def __enter__(self) -> Self:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
            # A copy, for the original may be waiting for something.
            self._store = dist.PrefixStore(f"watch {self.job}", _get_default_store().clone())
            self._signs = threading.Thread(target=self._beat, daemon=True)
            self._signs.start()
            self._before = _handle(self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._signs is None:
            return
        told = isinstance(error, _TerminatedError) or (error is not None and lost(error))
        try:
            if told:
                # Who has noticed may be asked to end, too; it is about to.
                _handle(signal.SIG_IGN)
                raise self._error(error) from error
        finally:
            self._ended = True
            self._moved.set()
            self._signs.join(_LOOK)
            if self._before is not None:
                _handle(self._before)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    def _beat(self) -> None:
        beats = 0
        try:
            while not self._ended:
                beats += 1
                self._store.set(str(self._rank), f"{beats} {self.step}")
                self._moved.wait(BEAT)
                self._moved.clear()
            # Who ends by itself is not silent.
            self._store.set(str(self._rank), f"0 {self.step}")
        except RuntimeError:
            # The store went with the rank that held it.
            pass

    def _error(self, error: BaseException | None) -> RankError:
        signs = self._signs_of_others()
        silent = [rank for rank, (alive, _) in signs.items() if not alive]
        facts: dict[str, str | Sequence[str]] = {"where": self.step}
        if silent:
            problem = (
                f"Rank {self._rank} has lost {', '.join(f'rank {rank}' for rank in silent)} in {self.job}."
            )
            facts["silent"] = [f"rank {rank}, {_heard(signs[rank][1])}" for rank in silent]
        else:
            asked = isinstance(error, _TerminatedError)
            problem = f"Rank {self._rank} {'was told to end' if asked else 'waited in vain'} in {self.job}."
            facts["others"] = [
                f"rank {rank}, {_heard(step)}" for rank, (_, step) in signs.items()
            ] or "not known"
        facts["reason"] = "SIGTERM" if isinstance(error, _TerminatedError) else _reason(error)
        return RankError(message(problem, facts | dict(self._kept() if self._kept else {}), fix=self._fix))

    def _signs_of_others(self) -> dict[int, tuple[bool, str]]:
        """Return for every other rank whether it gives signs of life, and its step; nothing where that is not known."""
        found: dict[int, tuple[bool, str]] = {}

        def look() -> None:
            try:
                before = self._read()
                time.sleep(SILENCE)
                for rank, (beats, step) in self._read().items():
                    found[rank] = beats == "0" or beats != before[rank][0], step
            except RuntimeError:
                found.clear()

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(_LOOK)
        return {} if looking.is_alive() else found

    def _read(self) -> dict[int, tuple[str, str]]:
        """Return the last sign of every other rank: a number that grows, 0 where it has ended, and its step."""
        signs = {}
        for rank in range(self._ranks):
            if rank != self._rank:
                there = self._store.check([str(rank)])
                sign = self._store.get(str(rank)).decode() if there else "none "
                beats, _, step = sign.partition(" ")
                signs[rank] = beats, step
        return signs


def _heard(step: str) -> str:
    return f"last heard of in {step}" if step else "never heard of"


def _reason(error: BaseException | None) -> str:
    if isinstance(error, LostRankError):
        return f"{error.reason}, in {error.step}"
    return first_line(error)


def join(kind: str, timeout: timedelta = TIMEOUT) -> None:
    """Let the processes that torchrun started come together, unless there is one alone or they have before.

    Args:
        kind: what they compute on, "cpu" or "cuda".
        timeout: how long they wait for one another, now and later.

    Raises:
        RankError: they do not come together in that time.

    Example:
        >>> join("cpu")
        >>> dist.is_initialized()
        False
    """
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if ranks == "1" or dist.is_initialized():
        return
    try:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
    except RuntimeError as error:
        raise RankError(
            message(
                "The processes did not come together.",
                {"this one": f"rank {rank} of {ranks}", "reason": first_line(error)},
                fix="look for the first error of the others; --timeout sets the patience",
            )
        ) from error


def _handle(handler: Any) -> Any:
    """Let SIGTERM be handled by something else, and return what handled it; only the main thread may."""
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return None
