"""The table of a report, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from longspan.evaluate.evaluation import Evaluation
from longspan.evaluate.perplexity import Perplexity
from longspan.evaluate.report import Report
from longspan.evaluate.speed import Speed
from longspan.evaluate.task import THRESHOLD, means
from longspan.size import size


def table(report: Report) -> Group:
    """Return the figures of a report for printing: a row per model, a column per length.

    Bits per byte are shown beside perplexity where the models split the text into different tokens, since
    their perplexities are then not comparable.
    """
    first = report.evaluations[0]
    parts: list[RenderableType] = []
    if first.perplexity is not None:
        parts += _perplexity(report, first.perplexity)
    if first.passkey is not None:
        prompts = len(first.passkey.depths) * first.passkey.trials
        parts += [
            Text(f"Passkeys retrieved by length (of {prompts} prompts)", "bold"),
            _rows(
                report,
                lambda evaluation: percents(evaluation.passkey.by_length) if evaluation.passkey else [],
                "weakest",
                weakest,
            ),
        ]
    if first.tasks:
        parts += _tasks(report)
    if first.speed is not None:
        parts += _speed(report)
    lines = [f"text: {report.text}, {_counted(report.documents)}"]
    if report.pattern is not None:
        lines.append(f"attention: {report.pattern}")
    if first.perplexity is not None and first.perplexity.crossing:
        lines.append("windows cross document borders: too few documents are as long as the longest window")
    return Group(*parts, Text("\n".join(lines), style="dim"))


def figure(value: float) -> str:
    """Write a perplexity with three or four digits, whatever its size.

    Example:
        >>> figure(2.4567), figure(123.45), figure(45678.9), figure(math.inf)
        ('2.46', '123.5', '45,679', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    if value >= 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def bits(value: float) -> str:
    """Write bits per byte."""
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def percents(shares: Sequence[float]) -> list[str]:
    """Write shares as whole percents."""
    return [f"{share:.0%}" for share in shares]


def reach(evaluation: Evaluation) -> str:
    """Write the effective length of a model, which may lie below all lengths measured."""
    longest = evaluation.effective_length
    return f"below {evaluation.lengths[0]:,}" if longest is None else f"{longest:,}"


def compared(report: Report) -> bool:
    """Say whether the models split the text into different tokens, so that perplexities cannot be compared."""
    measured = [evaluation.perplexity for evaluation in report.evaluations]
    return len({found.text_bytes for found in measured if found is not None}) > 1


def weakest(evaluation: Evaluation) -> str:
    """Say at which length and depth the fewest passkeys were retrieved, or nothing where all were."""
    passkey = evaluation.passkey
    if passkey is None:
        return ""
    share, length, depth = min(
        (share, length, depth)
        for length, row in zip(passkey.lengths, passkey.shares, strict=True)
        for depth, share in zip(passkey.depths, row, strict=True)
    )
    return "" if share == 1 else f"{share:.0%} at {length:,}, depth {depth:g}"


def _perplexity(report: Report, first: Perplexity) -> list[RenderableType]:
    def of(evaluation: Evaluation, write: Callable[[Perplexity], Sequence[str]]) -> Sequence[str]:
        return write(evaluation.perplexity) if evaluation.perplexity else []

    parts: list[RenderableType] = [
        Text(
            f"Perplexity by context length (the last {first.stride} tokens of {first.segments} windows)",
            "bold",
        ),
        _rows(
            report, lambda evaluation: of(evaluation, lambda found: [figure(value) for value in found.values])
        ),
    ]
    if compared(report):
        parts += [
            Text("Bits per byte by context length (the models' tokens differ: compare these)", "bold"),
            _rows(
                report,
                lambda evaluation: of(
                    evaluation, lambda found: [bits(value) for value in found.bits_per_byte]
                ),
            ),
        ]
    return parts


def _tasks(report: Report) -> list[RenderableType]:
    """Return one table of all tasks, a row per task and model, and one of their means."""
    first = report.evaluations[0].tasks
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("task")
    rows.add_column("model")
    for length in first[0].lengths:
        rows.add_column(f"{length:,}", justify="right")
    for number, scores in enumerate(first):
        for evaluation in report.evaluations:
            rows.add_row(scores.task, evaluation.label, *percents(evaluation.tasks[number].by_length))
    return [
        Text(f"Answers found by length (of {first[0].prompts} prompts for each task)", "bold"),
        rows,
        Text(
            f"Mean over these tasks; the effective length is where it stays at {THRESHOLD:.1%} or more",
            "bold",
        ),
        _rows(report, lambda evaluation: percents(means(evaluation.tasks)), "effective", reach),
    ]


def _speed(report: Report) -> list[RenderableType]:
    columns: list[tuple[str, Callable[[Speed], Sequence[str]]]] = [
        ("Prompt tokens read per second", lambda speed: [f"{rate:,.0f}" for rate in speed.tokens_per_second]),
        ("Milliseconds per token written", lambda speed: [f"{1e3 * time:.3g}" for time in speed.writing]),
        ("Keys and values kept", lambda speed: [size(count) for count in speed.cache]),
        ("Memory in use at most", lambda speed: [size(count) for count in speed.peak]),
    ]
    parts: list[RenderableType] = []
    for title, write in columns:
        parts += [
            Text(f"{title}, by length", "bold"),
            _rows(
                report,
                lambda evaluation, write=write: write(evaluation.speed) if evaluation.speed else [],
            ),
        ]
    return parts


def _rows(
    report: Report,
    cells: Callable[[Evaluation], Sequence[str]],
    title: str = "",
    note: Callable[[Evaluation], str] | None = None,
) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("model")
    for length in report.evaluations[0].lengths:
        rows.add_column(f"{length:,}", justify="right")
    if note is not None:
        rows.add_column(title)
    for evaluation in report.evaluations:
        rows.add_row(evaluation.label, *cells(evaluation), *([note(evaluation)] if note else []))
    return rows


def _counted(documents: int) -> str:
    return "1 held-out document" if documents == 1 else f"{documents:,} held-out documents"
