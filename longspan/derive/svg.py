"""A sheet as an SVG file that needs no font, style sheet or background of its own."""

from __future__ import annotations

from itertools import pairwise
from xml.sax.saxutils import escape

import numpy as np

from longspan.derive.sheet import Grid, Label, Sheet

# Greys with nearly the same contrast to a white page as to a black one.
_INK, _UNREAD = "#768390", "#8b949e"
_SANS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Steps of opacity that are told apart.
_STRENGTHS = 50


def drawn(sheet: Sheet) -> str:
    """Return the text of an SVG file."""
    size = f"{_n(sheet.width)} {_n(sheet.height)}"
    width, height = size.split()
    names = "; ".join(escape(_name(grid)) for grid in sheet.grids)
    cells = [line for number, grid in enumerate(sheet.grids) for line in _cells(grid, f"unread-{number}")]
    swatches = [
        f'<rect x="{_n(swatch.x)}" y="{_n(swatch.y)}" width="{_n(swatch.side)}" height="{_n(swatch.side)}" '
        f'fill="{swatch.colour}"/>'
        for swatch in sheet.swatches
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {size}" '
            f'role="img" font-family="{_SANS}" fill="{_INK}">',
            f"<title>Which keys each query reads: {names}</title>",
            *cells,
            *swatches,
            *map(_text, sheet.labels),
            "</svg>\n",
        ]
    )


def _name(grid: Grid) -> str:
    """Say in words what is shown, for those who do not see it."""
    return ", ".join(filter(None, [grid.panel.caption, grid.panel.title]))


def _cells(grid: Grid, tile: str) -> list[str]:
    """Return a tile for what is not read, and one path for all cells of a colour."""
    cell, inner = _n(grid.cell), _n(grid.cell - grid.gap)
    width, height = map(_n, grid.size)
    lines = [
        f'<pattern id="{tile}" x="{_n(grid.x)}" y="{_n(grid.y)}" width="{cell}" height="{cell}" '
        f'patternUnits="userSpaceOnUse"><rect width="{inner}" height="{inner}" fill="{_UNREAD}" '
        f'fill-opacity="0.17"/></pattern>'
        if grid.gap
        else "",
        f'<rect x="{_n(grid.x)}" y="{_n(grid.y)}" width="{width}" height="{height}" '
        + (f'fill="url(#{tile})"/>' if grid.gap else f'fill="{_UNREAD}" fill-opacity="0.17"/>'),
    ]
    colours, opacity = grid.panel.inks
    strength = np.rint(opacity * _STRENGTHS).astype(np.int64)
    ink = (colours.astype(np.int64) * [1 << 16, 1 << 8, 1]).sum(axis=-1)
    rows, columns = (grid.edges(cells) for cells in grid.panel.shape)
    paths: dict[tuple[int, int], list[str]] = {}
    for row, (top, bottom) in enumerate(pairwise(rows)):
        for first, last in _runs(ink[row], strength[row], joined=not grid.gap):
            across, down = columns[last] - columns[first] - grid.gap, bottom - top - grid.gap
            path = f"M{_n(grid.x + columns[first])} {_n(grid.y + top)}h{_n(across)}v{_n(down)}h{_n(-across)}z"
            paths.setdefault((int(ink[row, first]), int(strength[row, first])), []).append(path)
    for (colour, strong), pieces in paths.items():
        faded = "" if strong == _STRENGTHS else f' fill-opacity="{strong / _STRENGTHS:g}"'
        lines.append(f'<path fill="#{colour:06x}"{faded} d="{"".join(pieces)}"/>')
    return [line for line in lines if line]


def _runs(ink: np.ndarray, strength: np.ndarray, *, joined: bool) -> list[tuple[int, int]]:
    """Return where neighbouring cells of one colour begin and end, or each cell for itself."""
    differs = (np.diff(ink) != 0) | (np.diff(strength) != 0)
    cuts = np.flatnonzero(differs) + 1 if joined else np.arange(1, len(ink))
    return [(a, b) for a, b in pairwise([0, *cuts.tolist(), len(ink)]) if strength[a]]


def _text(label: Label) -> str:
    place = f'x="{_n(label.x)}" y="{_n(label.y)}"'
    styles = [
        f'transform="translate({_n(label.x)} {_n(label.y)}) rotate(90)"' if label.turned else place,
        f'font-size="{label.size}"',
        f'font-family="{_MONO}"' if label.mono else "",
        'font-weight="600"' if label.bold else "",
        'text-anchor="end"' if label.end else "",
    ]
    return f"<text {' '.join(filter(None, styles))}>{escape(label.text)}</text>"


def _n(number: float) -> str:
    """Write a length with two decimals at most."""
    return f"{round(float(number), 2):g}"
