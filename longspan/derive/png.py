"""A sheet as a PNG file, drawn by matplotlib, which is imported only here and only when a file is saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longspan.derive.panel import rgb
from longspan.derive.sheet import Grid, Sheet
from longspan.errors import InputError, message

_UNREAD, _INK = "#ebedef", "#57606a"
# Pixels of the file to a pixel of the sheet.
_SHARPNESS = 2
# At so many dots to the inch a point of type is a pixel of the sheet.
_DOTS = 72


def save(sheet: Sheet, path: Path) -> None:
    """Draw a sheet on white and save it.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise InputError(
            message(
                "A PNG picture needs matplotlib, which is not installed.",
                {"asked": str(path)},
                fix=f"pip install matplotlib, or {path.with_suffix('.svg').name}, which needs nothing",
            )
        ) from None
    figure = Figure(figsize=(sheet.width / _DOTS, sheet.height / _DOTS), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for grid in sheet.grids:
        width, height = grid.size
        axes.imshow(
            _painted(grid),
            extent=(grid.x, grid.x + width, grid.y + height, grid.y),
            interpolation="nearest",
            aspect="auto",
        )
    for swatch in sheet.swatches:
        axes.add_patch(Rectangle((swatch.x, swatch.y), swatch.side, swatch.side, color=swatch.colour))
    for label in sheet.labels:
        axes.text(
            label.x,
            label.y,
            label.text,
            fontsize=label.size,
            fontweight="bold" if label.bold else "normal",
            family="monospace" if label.mono else "sans-serif",
            color=_INK,
            rotation=270 if label.turned else 0,
            rotation_mode="anchor",
            horizontalalignment="right" if label.end else "left",
            verticalalignment="baseline",
        )
    axes.set(xlim=(0, sheet.width), ylim=(sheet.height, 0))
    figure.savefig(path, dpi=_DOTS * _SHARPNESS)


def _painted(grid: Grid) -> np.ndarray:
    """Return a grid in the pixels of the file, uint8 `[height, width, 3]`."""
    colours, opacity = grid.panel.inks
    share = opacity[:, :, None]
    cells = np.rint(share * colours + (1 - share) * rgb(_UNREAD)[0]).astype(np.uint8)
    rows, columns = (np.rint(grid.edges(number) * _SHARPNESS).astype(np.int64) for number in grid.panel.shape)
    pixels = cells.repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1)
    if grid.gap:
        width = np.arange(-grid.gap * _SHARPNESS, 0)
        pixels[(rows[1:, None] + width).ravel()] = 255
        pixels[:, (columns[1:, None] + width).ravel()] = 255
    return pixels
