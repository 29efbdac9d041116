"""The picture: which keys each query reads, drawn, whatever the length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from longspan.derive import png, svg
from longspan.derive.bins import bins
from longspan.derive.extent import extent
from longspan.derive.panel import Layer, Panel
from longspan.derive.sheet import sheet
from longspan.errors import InputError, ShapeError, elided, message
from longspan.pattern import Pattern, Progression

_BLANK, _SHADES, _FULL = "·", "░▒▓", "█"
# Up to so many columns a cell is two characters wide, which makes it square.
_WIDE = 36
_PAGE = 100


@dataclass(frozen=True, eq=False)
class Picture:
    """One or more panels side by side. Print it, show it in a notebook, or save it.

    Attributes:
        panels: grids of cells, exact: what is drawn is counted from the pattern and not sampled.
    """

    panels: tuple[Panel, ...]

    @property
    def text(self) -> str:
        """The picture in characters: `·` nothing, `░▒▓█` the share of pairs read, a digit how often."""
        blocks = [_lines(panel) for panel in self.panels]
        widths = [max(map(len, block)) for block in blocks]
        if sum(widths) + 3 * len(widths) > _PAGE:
            return "\n\n".join("\n".join(block) for block in blocks)
        tallest = max(map(len, blocks))
        rows = zip(*(block + [""] * (tallest - len(block)) for block in blocks), strict=True)
        return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    @property
    def svg(self) -> str:
        """The picture as an SVG file, complete in itself, for light and dark pages alike."""
        return svg.drawn(sheet(self.panels))

    def save(self, path: str | Path) -> None:
        """Write the picture in the format that the ending of the path names: .txt, .svg or .png.

        Raises:
            InputError: another ending, or .png without matplotlib.
        """
        path = Path(path)
        writers: dict[str, Callable[[], object]] = {
            ".txt": lambda: path.write_text(self.text + "\n", encoding="utf-8"),
            ".svg": lambda: path.write_text(self.svg, encoding="utf-8"),
            ".png": lambda: png.save(sheet(self.panels), path),
        }
        if path.suffix.lower() not in writers:
            raise InputError(
                message(
                    "A picture is saved as text, SVG or PNG.",
                    {"asked": str(path), "ending": path.suffix or "none"},
                    fix=f"{path.with_suffix('.svg').name}; the endings are {', '.join(writers)}",
                )
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix.lower()]()

    def __str__(self) -> str:
        return self.text

    def _repr_svg_(self) -> str:
        return self.svg


def picture(
    pattern: Pattern,
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    heads: int | None = None,
    title: str = "",
    cells: int = 64,
) -> Picture:
    """Draw a pattern in one panel: queries downward, keys to the right.

    Law: a cell is as strong as the share of its pairs that are read. Up to `cells` tokens a cell is one pair.

    Args:
        pattern: what is read.
        length: number of tokens, short for both ranges.
        queries, keys: absolute positions.
        heads: number of heads; heads that read differently are told apart by colour, or by strength where they
            read in more than six ways. None draws a pattern that is the same on all heads.
        title: what stands above the panel.
        cells: cells on the longer side, at most.

    Raises:
        PatternError: a pattern that differs from head to head, without `heads`.
        ShapeError: a range that is missing, empty or negative, a number of cells below 1.

    Example:
        >>> from longspan.pattern import Causal, Dilated, Window
        >>> print(picture(Causal() & (Window(2) | Dilated(4)), length=8))
        query ↓  key → 0 to 7
        ██· · · · · · ·
        ████· · · · · ·
        · ████· · · · ·
        · · ████· · · ·
        ██· · ████· · ·
        · ██· · ████· ·
        · · ██· · ████·
        · · · ██· · ████
        Causal() & (Window(2) | Dilated(4))
    """
    return gallery({title: pattern}, length=length, queries=queries, keys=keys, heads=heads, cells=cells)


def gallery(
    patterns: Mapping[str, Pattern],
    *,
    length: int | None = None,
    queries: range | None = None,
    keys: range | None = None,
    heads: int | None = None,
    cells: int = 64,
) -> Picture:
    """Draw patterns side by side on the same grid, each under its name; what differs is the pattern.

    Args:
        patterns: what is read, name to pattern.
        length, queries, keys, heads, cells: as for `picture`.

    Example:
        >>> from longspan.pattern import SlidingWindow
        >>> print(gallery({"two": SlidingWindow(2), "three": SlidingWindow(3)}, length=4))
        two                     three
        query ↓  key → 0 to 3   query ↓  key → 0 to 3
        ██· · ·                 ██· · ·
        ████· ·                 ████· ·
        · ████·                 ██████·
        · · ████                · ██████
        SlidingWindow(2)        SlidingWindow(3)
    """
    queries, keys = extent(length, queries, keys)
    if not queries or not keys or cells < 1 or (heads is not None and heads < 1):
        raise ShapeError(
            message(
                "A picture shows at least one query, one key, one head and one cell.",
                {"queries": str(queries), "keys": str(keys), "heads": str(heads), "cells": str(cells)},
                fix="length=64",
            )
        )
    # Cells take in as many positions downward as across, so that a diagonal stays one.
    places = -(-max(len(queries), len(keys)) // cells)
    shape = (-(-len(queries) // places), -(-len(keys) // places))
    return Picture(
        tuple(
            Panel(title, elided(str(pattern)), queries, keys, _layers(pattern, queries, keys, heads, shape))
            for title, pattern in patterns.items()
        )
    )


def _layers(
    pattern: Pattern, queries: range, keys: range, heads: int | None, cells: tuple[int, int]
) -> tuple[Layer, ...]:
    if heads is None:
        # Reads one pair, so as to refuse a pattern that differs from head to head.
        pattern.count(Progression.of(queries[:1]), Progression.of(keys[:1]))
    alike: dict[Pattern, list[int]] = {}
    for head in range(heads or 1):
        alike.setdefault(pattern.at_head(head, heads or 1), []).append(head)
    return tuple(
        Layer(tuple(members), bins(single, queries=queries, keys=keys, cells=cells))
        for single, members in alike.items()
    )


def _lines(panel: Panel) -> list[str]:
    """Return a panel in characters, line by line."""
    width = 2 if panel.shape[1] <= _WIDE else 1
    head = [panel.title] if panel.title else []
    head.append(f"query ↓  key → {panel.keys[0]:,} to {panel.keys[-1]:,}")
    rows = ["".join(_glyph(float(often), width) for often in row).rstrip() for row in panel.often]
    return [*head, *rows, panel.caption, *([panel.note] if panel.note else [])]


def _glyph(often: float, width: int) -> str:
    if not often:
        return _BLANK.ljust(width)
    if often >= 1.5:
        return str(min(9, round(often))) * width
    return (_FULL if often >= 1 else _SHADES[int(often * len(_SHADES))]) * width
