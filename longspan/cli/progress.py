"""Progress: how far a long task is, as bars on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

# Seconds between two lines of one task where there is no terminal.
_PAUSE = 10.0


class Progress:
    """A display of tasks that are measured in tokens, on the standard error stream.

    Used as a context. A task is a callable that is told how far it is, with any figures to show beside that.

    Args:
        console: where to write, the standard error stream if None.
        clock: returns seconds that only grow.

    Example:
        >>> import io
        >>> written = io.StringIO()
        >>> with Progress(Console(file=written), clock=iter([0.0, 5.0]).__next__) as progress:
        ...     task = progress.task("training")
        ...     task(1000, 1000, loss=2.5)
        >>> print(written.getvalue().strip())
        training: 1,000 of 1,000 tokens, loss 2.500, 200 tokens/s, took 0:05
    """

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self.clock = clock
        self._bars: Bars | None = None
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[figures]}", style="dim"),
                console=self.console,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def task(self, name: str, *, done: int = 0) -> Task:
        """Begin a task.

        Args:
            name: what to call it.
            done: tokens that an earlier run has done; they count in how far it is but not in its speed.
        """
        return Task(name, done, self.console, self.clock, self._bars)

    def note(self, text: str) -> None:
        """Write a line of its own, above any bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Task:
    """One task of a display; call it with the tokens done, the tokens in all, and figures to show."""

    def __init__(
        self, name: str, done: int, console: Console, clock: Callable[[], float], bars: Bars | None
    ) -> None:
        self._name = name
        self._before = done
        self._console = console
        self._clock = clock
        self._bars = bars
        self._begun = self._written = clock()
        self._figures: dict[str, float | str] = {}
        self._row = bars.add_task(name, total=None, figures="") if bars is not None else None

    def __call__(self, done: int, total: int, **figures: float | str) -> None:
        """Show how far the task is.

        Args:
            done: tokens done.
            total: tokens in all.
            figures: what else to show, by name, beside the last of every other name; numbers get three decimals.
        """
        now = self._clock()
        self._figures |= figures
        words = [
            f"{name} {value if isinstance(value, str) else f'{value:.3f}'}"
            for name, value in self._figures.items()
        ]
        words += self._times(done, total, now - self._begun)
        if self._bars is not None and self._row is not None:
            self._bars.update(self._row, completed=done, total=total, figures=", ".join(words))
        elif done >= total or now - self._written >= _PAUSE:
            self._written = now
            line = ", ".join([f"{self._name}: {done:,} of {total:,} tokens", *words])
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _times(self, done: int, total: int, seconds: float) -> list[str]:
        rate = (done - self._before) / seconds if seconds > 0 else 0.0
        if rate == 0:
            return []
        left = f"{_minutes((total - done) / rate)} left" if done < total else f"took {_minutes(seconds)}"
        return [f"{rate:,.0f} tokens/s", left]


def _minutes(seconds: float) -> str:
    """Write seconds as minutes and seconds, with hours where there are any.

    Example:
        >>> _minutes(75), _minutes(3675)
        ('1:15', '1:01:15')
    """
    whole = round(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02}"
