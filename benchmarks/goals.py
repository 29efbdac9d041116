"""The goals on a CUDA device, each decided by the rows that were measured: reached or missed, and by how much.

A goal that is missed is a figure like others and no failure. One whose rows are not there is not decided, and says why.
Rates are of useful work forward and backward, and the dense rate is that of the fastest causal attention over everything
in the same run, whoever's it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

Row = dict[str, Any]
Report = dict[str, Any]
# Whose errors are looked at; of "chosen" `attend` says itself which one runs.
KERNELS = ("chosen", "triton", "flex")
FAMILIES = ("LongNet", "S2", "SCCA", "LongMixed")


class _Open(Exception):
    """A row is not there, or what it is held against did not run."""


class _Failed(Exception):
    """What the goal is about did not run."""


@dataclass(frozen=True)
class Goal:
    """A bound on one figure.

    Attributes:
        table: whose rows decide it, after those of others that were made before.
        said: what is measured.
        bound: what the figure must be.
        least: whether it must be that at least, and not at most.
        figure: finds it among the rows of all tables.
    """

    table: str
    said: str
    bound: float
    least: bool
    figure: Callable[[Report], float]

    def verdict(self, report: Report) -> Row:
        """Return what was found, whether that reaches the goal (None where nobody knows), and both in words.

        A margin is a part of the bound, below 0 where the goal is missed; a bound of 0 has none.
        """
        wanted = f"{'at least' if self.least else 'at most'} {self.bound:g}"
        row: Row = {"goal": self.said, "wanted": wanted, "found": None, "reached": None, "margin": None}
        try:
            found = self.figure(report)
        except _Open as why:
            return row | {"verdict": f"not decided: {self.said}, wanted {wanted}, but {why}"}
        except _Failed as why:
            return row | {"reached": False, "verdict": f"missed: {self.said}, wanted {wanted}, but {why}"}
        reached = found >= self.bound if self.least else found <= self.bound
        margin = (found / self.bound - 1) * (1 if self.least else -1) if self.bound else None
        by = "" if margin is None else f" by {abs(margin):.1%}"
        verdict = f"{'reached' if reached else 'missed'}{by}: {self.said}: {found:.4g}, wanted {wanted}"
        return row | {"found": found, "reached": reached, "margin": margin, "verdict": verdict}


def decided(report: Report) -> dict[str, list[Row]]:
    """Return for each table that was made the goals that it decides."""
    found: dict[str, list[Row]] = {}
    for goal in goals(report.get("sizes", {})):
        if report.get(goal.table):
            found.setdefault(goal.table, []).append(goal.verdict(report))
    return found


def counted(found: dict[str, list[Row]]) -> str:
    """Return how many goals are reached, missed and open."""
    reached = [row["reached"] for rows in found.values() for row in rows]
    return f"{reached.count(True)} goals reached, {reached.count(False)} missed, {reached.count(None)} not decided."


def goals(sizes: dict[str, Any]) -> Iterator[Goal]:
    """Yield all goals, at the sizes that were measured."""
    if not sizes:
        return
    yield Goal(
        "dense", "seconds of causal attention over those of PyTorch's fastest kernel", 1, False, _dense
    )
    yield Goal("window", "rate of a window over the dense rate", 0.8, True, _window)
    yield Goal(
        "window",
        "seconds, planning too, over those of FlexAttention with its own mask",
        1,
        False,
        _beside_flex,
    )
    lengths = sizes["medium"], sizes["long"]
    for family in FAMILIES:
        for length in lengths:
            said = f"rate of {family} at {length:,} over the dense rate"
            yield Goal("lengths", said, 0.6, True, _of_dense("lengths", family, length))
        said = f"seconds of a token of {family} at {lengths[1]:,} over those at {lengths[0]:,}"
        yield Goal("lengths", said, 1.25, False, _flat(family, *lengths))
    yield Goal("planning", f"most milliseconds that a plan of {lengths[1]:,} takes", 100, False, _planning)
    yield Goal("memory", "bytes taken over those of the device", 1, False, _memory)
    yield Goal("stream", "worst error of a sampled query over its budget", 1, False, _exact)
    last, first = sizes["stream"], sizes["long"]
    said = f"nanoseconds of a token at {last:,} over those at {first:,}"
    yield Goal("stream", said, 1.3, False, _streamed("nanoseconds_per_token", last, first))
    chunks = 4 * sizes["chunk"]
    said = f"bytes taken at {last:,} over those at {chunks:,}"
    yield Goal("stream", said, 1.1, False, _streamed("peak_bytes", last, chunks))
    for kernel in KERNELS:
        said = f"results of {kernel} with numbers that are not finite"
        yield Goal("errors", said, 0, False, partial(_unwritten, kernel))
        yield Goal("errors", f"worst error of {kernel} over its budget", 1, False, partial(_errors, kernel))
    for kernel in ("triton", "flash"):
        said = f"errors that compute-sanitizer finds in {kernel}"
        yield Goal("sanitizer", said, 0, False, partial(_sanitizer, kernel))


def _row(report: Report, table: str, what: str, length: int | None = None, *, own: bool = True) -> Row:
    """Return the row of a table whose first cell begins so; it decides a goal, or is what that is held against."""
    for row in report.get(table, []):
        if row["what"].split("(")[0] == what and length in (None, row.get("length")):
            if "refused" not in row:
                return row
            raise (_Failed if own else _Open)(f"{row['what']} did not run: {row['refused']}")
    raise _Open(f"the table {table} has no row of {what}")


def _rows(report: Report, table: str, **wanted: str) -> list[Row]:
    """Return the rows that ran, of which there is one at least."""
    rows = [row for row in report.get(table, []) if wanted.items() <= row.items()]
    ran = [row for row in rows if "refused" not in row]
    if not ran:
        raise _Open(rows[-1]["refused"] if rows else f"the table {table} has no such row")
    return ran


def _seconds(row: Row) -> float:
    return row["forward_seconds"] + row["backward_seconds"]


def _dense(report: Report) -> float:
    theirs = [row for row in _rows(report, "dense") if row["what"].startswith("PyTorch")]
    if not theirs:
        raise _Open("none of PyTorch's kernels ran")
    return _seconds(_row(report, "dense", "longspan")) / min(map(_seconds, theirs))


def _of_dense(table: str, what: str, length: int | None = None) -> Callable[[Report], float]:
    def figure(report: Report) -> float:
        own = _row(report, table, what, length)["tflops"]
        return own / max(row["tflops"] for row in _rows(report, "dense"))

    return figure


_window = _of_dense("window", "longspan")


def _beside_flex(report: Report) -> float:
    own, other = (
        _row(report, "window", what, own=own) for what, own in (("longspan", True), ("FlexAttention", False))
    )
    return (_seconds(own) + own["planning_seconds"]) / (_seconds(other) + other["planning_seconds"])


def _flat(family: str, short: int, long: int) -> Callable[[Report], float]:
    def figure(report: Report) -> float:
        token = [_seconds(_row(report, "lengths", family, length)) / length for length in (short, long)]
        return token[1] / token[0]

    return figure


def _planning(report: Report) -> float:
    """Of the kernels that `attend` takes by itself, whose rows come first."""
    for row in report["planning"]:
        if row.get("asked") == "none" and "refused" in row:
            raise _Failed(f"{row['what']} has no plan: {row['refused']}")
    last = report["planning"][-1]
    if last["what"] == "failed" and not any(row.get("asked") == "flex" for row in report["planning"]):
        raise _Open(last["refused"])
    return 1000 * max(row["planning_seconds"] for row in _rows(report, "planning", asked="none"))


def _memory(report: Report) -> float:
    row = _row(report, "memory", "SlidingWindow")
    if "peak_bytes" not in row:
        raise _Open("memory is not counted on this device")
    return row["peak_bytes"] / row["device_bytes"]


def _exact(report: Report) -> float:
    rows = _rows(report, "stream")
    if rows[-1]["tokens"] != report["sizes"]["stream"]:
        raise _Open("the longest text was not read")
    return max(row["worst"] / row["budget"] for row in rows)


def _streamed(column: str, long: int, short: int) -> Callable[[Report], float]:
    def figure(report: Report) -> float:
        found = {row["tokens"]: row.get(column) for row in _rows(report, "stream")}
        if not (found.get(long) and found.get(short)):
            raise _Open(f"there is no {column.replace('_', ' ')} at both lengths")
        return found[long] / found[short]

    return figure


def _unwritten(kernel: str, report: Report) -> float:
    return sum(not row["finite"] for row in _checked(kernel, report))


def _errors(kernel: str, report: Report) -> float:
    return max(row["of_budget"] for row in _checked(kernel, report))


def _checked(kernel: str, report: Report) -> list[Row]:
    """Return the rows of every pattern that a kernel takes; `attend` itself takes all."""
    for row in report["errors"]:
        if row.get("kernel") == kernel and "refused" in row:
            if row["what"] == "failed":
                raise _Open(row["refused"])
            if kernel == "chosen":
                raise _Failed(f"{row['what']} did not run: {row['refused']}")
    return _rows(report, "errors", kernel=kernel)


def _sanitizer(kernel: str, report: Report) -> float:
    return sum(row["errors"] for row in _rows(report, "sanitizer", kernel=kernel))
