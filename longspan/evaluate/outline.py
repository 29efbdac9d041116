"""The outline of a report: what it shows and in which order, before it is a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longspan.derive.picture import picture
from longspan.evaluate import plot
from longspan.evaluate.evaluation import Evaluation
from longspan.evaluate.passkey import Passkey
from longspan.evaluate.report import Report
from longspan.evaluate.table import bits, compared, figure, percents, reach
from longspan.evaluate.task import THRESHOLD, Scores, means
from longspan.kernel.plan import plan
from longspan.size import size


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        columns: their titles.
        rows: their cells.
        best: rows and columns of the cells to stress.
        names: how many columns, from the first on, name their row.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    names: int = 1


@dataclass(frozen=True)
class Drawing:
    """A picture.

    Attributes:
        title: what it shows.
        svg: the picture.
        instead: what stands for it where there are no pictures; None where other parts say the same.
    """

    title: str
    svg: str
    instead: Grid | str | None = None


@dataclass(frozen=True)
class Code:
    """Text to be shown letter by letter."""

    text: str


@dataclass(frozen=True)
class Legend:
    """The models and their marks in the drawings, and what the shade in curves says, where there is one."""

    labels: tuple[str, ...]
    shade: str = ""


# Drawings that belong side by side come as a tuple.
Part = str | Grid | Code | Legend | tuple[Drawing, ...]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; text is a paragraph."""

    title: str
    parts: tuple[Part, ...]


def headline(report: Report) -> str:
    """Return the title of a report: which models, at which lengths."""
    labels = [evaluation.label for evaluation in report.evaluations]
    named = " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))
    lengths = report.evaluations[0].lengths
    span = f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "")
    return f"{named} at {span} tokens"


def outline(report: Report) -> tuple[Section, ...]:
    """Return the sections of a report, those of what was measured only."""
    first = report.evaluations[0]
    measured = [
        (True, _summary),
        (first.perplexity is not None, _perplexity),
        (first.passkey is not None, _passkey),
        (bool(first.tasks), _tasks),
        (first.speed is not None, _speed),
        (bool(report.readings), _readings),
        (True, _repeat),
    ]
    return tuple(section(report) for there, section in measured if there)


def _summary(report: Report) -> Section:
    """Return what was found at the shortest and the longest length: results alone, so that they come first on a phone."""
    first = report.evaluations[0]
    ends = {0: first.lengths[0], -1: first.lengths[-1]} if len(first.lengths) > 1 else {0: first.lengths[0]}
    columns: list[tuple[str, Callable[[Evaluation], str]]] = []
    if first.perplexity is not None:
        columns += [
            (f"perplexity at {length:,}", lambda e, at=place: figure(e.perplexity.values[at]))
            for place, length in ends.items()
        ]
    if first.passkey is not None:
        columns += [
            (f"passkeys at {length:,}", lambda e, at=place: f"{e.passkey.by_length[at]:.0%}")
            for place, length in ends.items()
        ]
    if first.tasks:
        columns.append(("effective length", reach))
    columns.append(("context", lambda e: "not stated" if e.context is None else f"{e.context:,}"))
    rows = tuple((e.label, *(write(e) for _, write in columns)) for e in report.evaluations)
    return Section("Summary", (Grid(("model", *(title for title, _ in columns)), rows),))


def _perplexity(report: Report) -> Section:
    found = report.evaluations[0].perplexity
    crossing = (
        " Windows cross document borders: too few documents are as long as the longest window."
        if found.crossing
        else ""
    )
    told = (
        f"Lower is better. The same {found.tokens:,} held-out tokens at every length: the last {found.stride:,} of "
        f"{found.segments:,} windows, of which each length L shows the last L tokens (a sliding window of stride "
        f"{found.stride:,}).{crossing}"
    )
    values = [evaluation.perplexity.values for evaluation in report.evaluations]
    losses = [evaluation.perplexity.bits_per_byte for evaluation in report.evaluations]
    note = (
        "The models' tokens differ, so compare bits per byte."
        if compared(report)
        else "In bits per byte of text:"
    )
    return Section(
        "Perplexity by context length",
        (
            told,
            _legend(report),
            (_curves(report, "Perplexity", values), _curves(report, "Bits per byte", losses)),
            _grid(report, values, figure, least=True),
            note,
            _grid(report, losses, bits, least=True),
        ),
    )


def _passkey(report: Report) -> Section:
    found = report.evaluations[0].passkey
    told = (
        f"Higher is better. Five digits hidden in held-out text and asked for at its end; "
        f"{len(found.depths) * found.trials} prompts at each length, {found.trials} at each depth, seed {found.seed}. "
        f"Depth 0 is the beginning of the text."
    )
    values = [evaluation.passkey.by_length for evaluation in report.evaluations]
    maps = tuple(
        _map(evaluation.label, evaluation.passkey, number)
        for number, evaluation in enumerate(report.evaluations)
    )
    return Section(
        "Passkeys retrieved",
        (
            told,
            _legend(report),
            (_curves(report, "Passkeys retrieved", values, percent=True),),
            _grid(report, values, lambda value: f"{value:.0%}"),
            maps,
        ),
    )


def _tasks(report: Report) -> Section:
    first = report.evaluations[0].tasks
    columns = ("task", "model", *(plot.short(length) for length in first[0].lengths))
    rows = [
        (scores.task, evaluation.label, *percents(evaluation.tasks[number].by_length))
        for number, scores in enumerate(first)
        for evaluation in report.evaluations
    ]
    rows += [
        ("mean", evaluation.label, *percents(means(evaluation.tasks))) for evaluation in report.evaluations
    ]
    told = (
        f"Share of answers found, greedily decoded; {first[0].prompts} prompts for each task and length, "
        f"seed {first[0].seed}. Tasks in the manner of RULER (arXiv 2404.06654) with wording and made-up words of "
        f"our own: scores compare models here, not with the paper's tables."
    )
    rule = (
        f"The effective length is the longest one at which, as at all shorter ones measured, the mean over these "
        f"{len(first)} tasks is {THRESHOLD:.1%} or more: what Llama-2-7B-chat reaches at 4,096 tokens on the "
        f"paper's thirteen tasks. "
        + " ".join(f"{evaluation.label}: {reach(evaluation)}." for evaluation in report.evaluations)
    )
    mean = [means(evaluation.tasks) for evaluation in report.evaluations]
    parts: list[Part] = [
        told,
        _legend(report),
        (_curves(report, "Mean over tasks", mean, percent=True),),
        rule,
        Grid(columns, tuple(rows), names=2),
    ]
    placed = [number for number, scores in enumerate(first) if scores.depths]
    for number in placed:
        parts.append(
            tuple(
                _map(f"{evaluation.label}, {first[number].task}", evaluation.tasks[number], model)
                for model, evaluation in enumerate(report.evaluations)
            )
        )
    return Section("Tasks by context length", tuple(parts))


def _speed(report: Report) -> Section:
    found = [evaluation.speed for evaluation in report.evaluations]
    places = sorted({f"{speed.device}, {speed.dtype}" for speed in found})
    told = (
        f"One prompt at a time on {'; '.join(places)}. Reading is the median of three runs after one to warm up; "
        f"writing the median of sixteen tokens after the prompt. Memory is what was in use at most, weights "
        f"included: of torch on CUDA, of the whole process on a CPU."
    )
    reading, writing = [speed.tokens_per_second for speed in found], [speed.writing for speed in found]
    kept = [speed.cache for speed in found]
    return Section(
        "Speed and memory by context length",
        (
            told,
            _legend(report),
            (
                _curves(report, "Prompt tokens read per second", reading),
                _curves(
                    report, "Milliseconds per token written", [[1e3 * s for s in row] for row in writing]
                ),
                _curves(
                    report,
                    "Megabytes of keys and values kept",
                    [[count / 1e6 for count in row] for row in kept],
                ),
            ),
            "Prompt tokens read per second:",
            _grid(report, reading, lambda rate: f"{rate:,.0f}"),
            "Milliseconds per token written:",
            _grid(report, writing, lambda seconds: f"{1e3 * seconds:.3g}", least=True),
            "Keys and values kept:",
            _grid(report, kept, size, least=True),
            "Memory in use at most:",
            _grid(report, [speed.peak for speed in found], size, least=True),
        ),
    )


def _readings(report: Report) -> Section:
    parts: list[Part] = []
    for reading in report.readings:
        drawn = picture(reading.pattern, length=reading.length, heads=reading.heads)
        planned = plan(reading.pattern, length=reading.length, heads=reading.heads, width=reading.width)
        title = f"{', '.join(reading.labels)} {reading.occasion}, {reading.length:,} tokens"
        parts += [(Drawing(title, drawn.svg, drawn.text),), Code(str(planned))]
    return Section("Which keys each query reads, and the plan for it", tuple(parts))


def _repeat(report: Report) -> Section:
    documents = "1 document" if report.documents == 1 else f"{report.documents:,} documents"
    facts = [("text", f"{report.text}, {documents} held out")]
    if report.pattern is not None:
        facts.append(("attention", report.pattern))
    if report.protocol is not None:
        facts.append(("measured", ", ".join(report.protocol.measures)))
    if report.day is not None:
        facts.append(("on", report.day))
    facts += [(package, number or "not installed") for package, number in report.versions.items()]
    command: tuple[Part, ...] = () if report.command is None else (Code(report.command),)
    models = Grid(
        ("model", "from", "parameters", "dtype", "tokens read", "seconds"),
        tuple(
            (e.label, e.source, f"{e.parameters:,}", e.dtype, f"{e.tokens:,}", f"{e.seconds:,.0f}")
            for e in report.evaluations
        ),
        names=2,
    )
    return Section("How this was measured", (*command, models, Grid(("what", "which"), tuple(facts))))


def _legend(report: Report) -> Legend:
    first = report.evaluations[0]
    shaded = first.context is not None and first.lengths[0] <= first.context < first.lengths[-1]
    shade = f"beyond the context of {first.label}" if shaded else ""
    return Legend(tuple(evaluation.label for evaluation in report.evaluations), shade)


def _curves(
    report: Report, title: str, values: Sequence[Sequence[float]], *, percent: bool = False
) -> Drawing:
    first = report.evaluations[0]
    lines = [(evaluation.label, row) for evaluation, row in zip(report.evaluations, values, strict=True)]
    svg = plot.curves(first.lengths, lines, title=title, percent=percent, context=first.context)
    return Drawing(title, svg)


def _map(title: str, found: Passkey | Scores, model: int) -> Drawing:
    rows = tuple(
        (f"{depth:g}", *percents([row[number] for row in found.shares]))
        for number, depth in enumerate(found.depths)
    )
    grid = Grid(("depth", *(plot.short(length) for length in found.lengths)), rows)
    named = f"{title}: % found"
    return Drawing(
        named, plot.heat(found.lengths, found.depths, found.shares, title=named, model=model), grid
    )


def _grid(
    report: Report,
    values: Sequence[Sequence[float | None]],
    write: Callable[[float], str],
    *,
    least: bool = False,
) -> Grid:
    """Return a row per model and a column per length, the best of each column stressed where models differ."""
    best = set()
    for column, cells in enumerate(zip(*values, strict=True)):
        shown = [write(cell) for cell in cells]
        finite = [cell for cell in cells if cell is not None and math.isfinite(cell)]
        if len(set(shown)) > 1 and finite:
            top = write(min(finite) if least else max(finite))
            best |= {(row, column + 1) for row, cell in enumerate(shown) if cell == top}
    rows = tuple(
        (evaluation.label, *map(write, row))
        for evaluation, row in zip(report.evaluations, values, strict=True)
    )
    return Grid(
        ("model", *(f"{length:,}" for length in report.evaluations[0].lengths)), rows, frozenset(best)
    )
