"""The chart of a report: perplexity and passkey retrieval by length, and retrieval by depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from longspan.evaluate.evaluation import Evaluation
from longspan.evaluate.report import Report

# From Okabe and Ito's palette, which colour-blind readers tell apart; told apart by markers too.
_FIRST, _LAST = "#d55e00", "#0072b2"
_BETWEEN = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9")
_MARKERS = "oDs^vP"
_INK, _FAINT, _GRID, _BEYOND, _NONE = "#24292f", "#57606a", "#e1e4e8", "#f4f6f8", "#f0f2f4"
# Lengths are drawn on a logarithmic scale; this factor is left free at both ends.
_ROOM = 1.13
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11.5,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def chart(report: Report, path: str | Path) -> None:
    """Draw a report and save it, in the format that the path's ending names.

    Perplexity and passkey retrieval by context length stand side by side, a line per model, lengths on a scale
    of powers of two. Below them a map per model shows retrieval by depth and length. Both must have been measured;
    pages (`longspan.evaluate.page`) show whatever was.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.2), facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        halves: Any = figure.subfigures(2, 1, height_ratios=(1.6, 1))
        _curves(halves[0], report)
        _maps(halves[1], report)
        figure.savefig(path, dpi=160)


def _curves(figure: SubFigure, report: Report) -> None:
    perplexity, passkey = figure.subplots(1, 2)
    _perplexity(perplexity, report)
    _passkey(passkey, report)
    keys = perplexity.get_legend_handles_labels()[0]
    # About a hundred letters fit in one row.
    columns = max(1, 100 // max(len(str(key.get_label())) + 8 for key in keys))
    figure.legend(loc="outside upper left", handles=keys, ncols=columns, frameon=False)


def _maps(figure: SubFigure, report: Report) -> None:
    models = len(report.evaluations)
    # One map alone would be as wide as the page: it takes half of it.
    maps = figure.subplots(1, max(2, models), sharey=True)
    for axes, evaluation, colour in zip(maps, report.evaluations, _colours(report), strict=False):
        _map(axes, evaluation, colour)
    for axes in maps[models:]:
        axes.set_axis_off()
    maps[0].set_ylabel("depth of the key")
    figure.suptitle("Passkeys retrieved by depth, %", x=0.012, ha="left", fontsize=13, fontweight="bold")


def _colours(report: Report) -> list[str]:
    """Return a colour per model: vermilion for the first, blue for the last, others for those between."""
    models = len(report.evaluations)
    if models == 1:
        return [_LAST]
    return [_FIRST, *(_BETWEEN[number % len(_BETWEEN)] for number in range(models - 2)), _LAST]


def _perplexity(axes: Axes, report: Report) -> None:
    axes.set_title("Perplexity (lower is better)")
    curves = [evaluation.perplexity.values for evaluation in report.evaluations]
    _lines(axes, report, curves)
    finite = [value for curve in curves for value in curve if np.isfinite(value)]
    # A model that falls apart would flatten the others on a linear scale.
    if finite and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(1, *finite) if finite else 1)


def _passkey(axes: Axes, report: Report) -> None:
    axes.set_title("Passkeys retrieved (higher is better)")
    _lines(axes, report, [evaluation.passkey.by_length for evaluation in report.evaluations])
    axes.set_ylim(-0.04, 1.06)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))


def _lines(axes: Axes, report: Report, curves: Sequence[Sequence[float]]) -> None:
    """Draw a line per model over the lengths, and shade what lies beyond the context of the first model."""
    lengths = report.evaluations[0].perplexity.lengths
    colours = _colours(report)
    for number, (evaluation, curve) in enumerate(zip(report.evaluations, curves, strict=True)):
        axes.plot(
            lengths,
            curve,
            color=colours[number],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=7,
            markeredgecolor="white",
            linewidth=2.4,
            label=evaluation.label,
            clip_on=False,
            zorder=3 + number,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / _ROOM, lengths[-1] * _ROOM)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context length, tokens")
    axes.grid(visible=False, axis="x")
    context = report.evaluations[0].context
    if context is not None and lengths[0] <= context < lengths[-1]:
        axes.axvspan(
            context,
            lengths[-1] * _ROOM,
            color=_BEYOND,
            zorder=0,
            linewidth=0,
            label=f"beyond the context of {report.evaluations[0].label}",
        )


def _map(axes: Axes, evaluation: Evaluation, colour: str) -> None:
    passkey = evaluation.passkey
    shares = np.array(passkey.shares).T
    # Black figures are legible up to three fifths of the colour.
    shade = LinearSegmentedColormap.from_list("shares", [_NONE, colour])
    axes.pcolormesh(shares, cmap=shade, vmin=0, vmax=1.65, edgecolors="white", linewidth=2)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=10)
    axes.set_title(evaluation.label, fontsize=11.5, color=_INK, pad=6)
    axes.set_xticks(np.arange(len(passkey.lengths)) + 0.5, [f"{length:,}" for length in passkey.lengths])
    axes.set_yticks(np.arange(len(passkey.depths)) + 0.5, [f"{depth:g}" for depth in passkey.depths])
    # The beginning of the text stands at the top.
    axes.set_ylim(len(passkey.depths), 0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
