"""The table of a report, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from longspan.evaluate.evaluation import Evaluation
from longspan.evaluate.report import Report


def table(report: Report) -> Group:
    """Return the figures of a report for printing: a row per model, a column per length.

    Bits per byte are shown beside perplexity where the models split the text into different tokens, since
    their perplexities are then not comparable.
    """
    first = report.evaluations[0].perplexity
    parts: list[RenderableType] = [
        Text(
            f"Perplexity by context length (the last {first.stride} tokens of {first.segments} windows)",
            "bold",
        ),
        _rows(report, lambda evaluation: [_figure(value) for value in evaluation.perplexity.values]),
    ]
    if len({evaluation.perplexity.text_bytes for evaluation in report.evaluations}) > 1:
        parts += [
            Text("Bits per byte by context length (the models' tokens differ: compare these)", "bold"),
            _rows(
                report, lambda evaluation: [f"{value:.3f}" for value in evaluation.perplexity.bits_per_byte]
            ),
        ]
    prompts = len(report.evaluations[0].passkey.depths) * report.evaluations[0].passkey.trials
    parts += [
        Text(f"Passkeys retrieved by length (of {prompts} prompts)", "bold"),
        _rows(
            report,
            lambda evaluation: [f"{share:.0%}" for share in evaluation.passkey.by_length],
            weakest,
        ),
    ]
    lines = [f"text: {report.text}, {_counted(report.documents)}"]
    if report.pattern is not None:
        lines.append(f"attention: {report.pattern}")
    if first.crossing:
        lines.append("windows cross document borders: too few documents are as long as the longest window")
    return Group(*parts, Text("\n".join(lines), style="dim"))


def weakest(evaluation: Evaluation) -> str:
    """Say at which length and depth the fewest passkeys were retrieved, or nothing where all were."""
    passkey = evaluation.passkey
    share, length, depth = min(
        (share, length, depth)
        for length, row in zip(passkey.lengths, passkey.shares, strict=True)
        for depth, share in zip(passkey.depths, row, strict=True)
    )
    return "" if share == 1 else f"{share:.0%} at {length:,}, depth {depth:g}"


def _rows(
    report: Report,
    cells: Callable[[Evaluation], Sequence[str]],
    note: Callable[[Evaluation], str] | None = None,
) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("model")
    for length in report.evaluations[0].perplexity.lengths:
        rows.add_column(f"{length:,}", justify="right")
    if note is not None:
        rows.add_column("weakest")
    for evaluation in report.evaluations:
        rows.add_row(evaluation.label, *cells(evaluation), *([note(evaluation)] if note else []))
    return rows


def _counted(documents: int) -> str:
    return "1 held-out document" if documents == 1 else f"{documents:,} held-out documents"


def _figure(value: float) -> str:
    """Write a perplexity with three or four digits, whatever its size."""
    if not math.isfinite(value):
        return "not finite"
    if value >= 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
