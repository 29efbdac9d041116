"""A sheet: where everything on a drawn picture stands, in pixels, so that all formats look alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np

from longspan.derive.panel import Panel

SIDE = 192
_GUTTER, _MARGIN, _TITLE, _AXIS, _LINE = 28, 12, 26, 18, 17
# Cells of this size and more are drawn apart from one another.
_APART = 5
_SMALL, _LARGE, _CODE = 11, 15, 10
# Widths of a letter over the height of the type, on the safe side for any font.
_MONO, _SANS = 0.61, 0.58
_SWATCH = 10


@dataclass(frozen=True)
class Label:
    """One line of text; `x`, `y` are where it begins on its baseline, or ends where `end` is set."""

    x: float
    y: float
    text: str
    size: int = _SMALL
    bold: bool = False
    mono: bool = False
    end: bool = False
    # Read downward instead of to the right.
    turned: bool = False


@dataclass(frozen=True)
class Swatch:
    """A small square of one colour beside its meaning."""

    x: float
    y: float
    colour: str
    side: float = _SWATCH


@dataclass(frozen=True)
class Grid:
    """The cells of a panel, with its upper left corner at `x`, `y`."""

    x: float
    y: float
    panel: Panel

    @property
    def cell(self) -> float:
        return SIDE / max(self.panel.shape)

    @property
    def gap(self) -> int:
        """What is left free between two cells."""
        return 1 if self.cell >= _APART else 0

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        rows, columns = self.panel.shape
        return columns * self.cell, rows * self.cell

    def edges(self, cells: int) -> np.ndarray:
        """Return where cells begin; those that touch begin on whole pixels, or seams would show."""
        begins = np.arange(cells + 1) * self.cell
        return begins if self.gap else np.rint(begins)


@dataclass(frozen=True)
class Sheet:
    """All that is drawn."""

    width: float
    height: float
    grids: tuple[Grid, ...]
    swatches: tuple[Swatch, ...]
    labels: tuple[Label, ...]


def sheet(panels: Sequence[Panel]) -> Sheet:
    """Lay out panels side by side: title, axes, grid, caption, legend and note of each."""
    top = _MARGIN + _AXIS + (_TITLE if any(panel.title for panel in panels) else 0)
    grids: list[Grid] = []
    swatches: list[Swatch] = []
    labels: list[Label] = []
    bottom = 0.0
    for number, panel in enumerate(panels):
        grid = Grid(_MARGIN + _AXIS + number * (SIDE + _AXIS + _GUTTER), top, panel)
        grids.append(grid)
        labels += _around(grid)
        below, beneath = _beneath(grid, swatches)
        labels += beneath
        bottom = max(bottom, below)
    width = grids[-1].x + SIDE + _MARGIN
    return Sheet(width, bottom + _MARGIN, tuple(grids), tuple(swatches), tuple(labels))


def _around(grid: Grid) -> list[Label]:
    """Return title and axes of a grid."""
    panel, (width, height) = grid.panel, grid.size
    up, left = grid.y - 6, grid.x - 15
    title = [Label(grid.x, grid.y - _AXIS - 9, panel.title, _LARGE, bold=True)] if panel.title else []
    return [
        *title,
        Label(grid.x, up, f"key {panel.keys[0]:,} →"),
        Label(grid.x + width, up, f"{panel.keys[-1]:,}", end=True),
        Label(left, grid.y, f"query {panel.queries[0]:,} →", turned=True),
        Label(left, grid.y + height, f"{panel.queries[-1]:,}", end=True, turned=True),
    ]


def _beneath(grid: Grid, swatches: list[Swatch]) -> tuple[float, list[Label]]:
    """Return what stands below a grid and where that ends; its swatches are added to the others."""
    panel, baseline = grid.panel, grid.y + grid.size[1]
    labels = []
    for line in wrap(panel.caption, int(SIDE / (_MONO * _CODE))):
        baseline += _LINE
        labels.append(Label(grid.x, baseline, line, _CODE, mono=True))
    at = float(SIDE)
    for colour, meaning in panel.legend:
        needed = _SWATCH + 5 + _SANS * _SMALL * len(meaning) + 12
        if at + needed > SIDE + 12:
            baseline, at = baseline + _LINE, 0.0
        swatches.append(Swatch(grid.x + at, baseline - 9, colour))
        labels.append(Label(grid.x + at + _SWATCH + 5, baseline, meaning))
        at += needed
    for line in wrap(panel.note, int(SIDE / (_SANS * _SMALL))):
        baseline += _LINE
        labels.append(Label(grid.x, baseline, line))
    return baseline, labels
