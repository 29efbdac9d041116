"""Plots of a report as SVG without colours of their own: the page that holds them gives each model its class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

# One unit is a pixel on a phone; wider screens scale it up.
WIDTH, _HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 36
_CELL = 30
# Spans of values above which a linear scale would hide the lower ones.
_WIDE = 20
_MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.5 -3.5h7v7h-7z",
    "M0 -4.8L4.6 3.6H-4.6z",
    "M0 -5L5 0L0 5L-5 0z",
    "M0 4.8L4.6 -3.6H-4.6z",
    "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
)
HUES = len(_MARKS)


def curves(
    lengths: Sequence[int],
    lines: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    percent: bool = False,
    context: int | None = None,
) -> str:
    """Draw a line per model over context lengths, on a scale of powers of two.

    Args:
        lengths: tokens, rising.
        lines: label and values of each model; what is not finite is left out.
        title: what the values are, for readers who hear the plot.
        percent: whether values are shares, drawn from 0 to 100 %.
        context: what lies beyond this length is shaded.

    Returns:
        An `<svg>` element whose lines have the classes `m0`, `m1` and so on.
    """
    finite = [value for _, values in lines for value in values if math.isfinite(value)]
    scale = _Scale(finite, percent=percent)
    across = _across(lengths)
    floor = _HEIGHT - _BOTTOM
    parts = []
    if context is not None and lengths[0] <= context < lengths[-1]:
        at = across(context)
        parts.append(
            f'<rect class="beyond" x="{at:.1f}" y="{_TOP}" width="{WIDTH - _RIGHT - at:.1f}" height="{floor - _TOP}"/>'
        )
    for tick in scale.ticks:
        at = scale.height(tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{scale.named(tick)}</text>')
    every = -(-len(lengths) // 8)
    for length in lengths[::-every]:
        parts.append(
            f'<text x="{across(length):.1f}" y="{floor + 16}" text-anchor="middle">{short(length)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="faint" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">context, tokens</text>'
    )
    for number, (label, values) in enumerate(lines):
        places = [
            (across(length), scale.height(value), f"{label}, {length:,} tokens: {scale.told(value)}")
            for length, value in zip(lengths, values, strict=True)
            if math.isfinite(value)
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        parts.append(f'<g class="m{number % HUES}">')
        if len(places) > 1:
            parts.append(f'<path class="line" d="M{path}"/>')
        parts += [
            f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{_MARKS[number % HUES]}">'
            f"<title>{escape(told)}</title></path>"
            for x, y, told in places
        ]
        parts.append("</g>")
    return _svg(_HEIGHT, title, parts)


def heat(
    lengths: Sequence[int],
    depths: Sequence[float],
    shares: Sequence[Sequence[float]],
    *,
    title: str,
    model: int = 0,
) -> str:
    """Draw shares by length (across) and depth (down, the beginning of the text on top).

    Args:
        lengths: tokens.
        depths: 0 to 1.
        shares: `shares[length][depth]`, 0 to 1.
        title: what the shares are.
        model: number of the model, which has a colour.

    Returns:
        An `<svg>` element whose cells have the class `m0`, `m1` and so on.
    """
    wide = (WIDTH - _LEFT - _RIGHT) / len(lengths)
    bottom = _TOP + _CELL * len(depths)
    parts = [f'<g class="m{model % HUES}">']
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            share = shares[column][row]
            x, y = _LEFT + column * wide, _TOP + row * _CELL
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1}" width="{wide - 2:.1f}" height="{_CELL - 2}" '
                f'rx="3" fill-opacity="{0.06 + 0.6 * share:.3f}"><title>{length:,} tokens, depth {depth:g}: '
                f"{share:.0%}</title></rect>"
            )
            # Figures would not fit into narrower cells.
            if wide >= 26:
                parts.append(
                    f'<text x="{x + wide / 2:.1f}" y="{y + _CELL / 2 + 4}" text-anchor="middle">'
                    f"{100 * share:.0f}</text>"
                )
    parts.append("</g>")
    every = -(-len(lengths) // 8)
    for column in range(len(lengths) - 1, -1, -every):
        at = _LEFT + (column + 0.5) * wide
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{short(lengths[column])}</text>'
        )
    for row, depth in enumerate(depths):
        at = _TOP + (row + 0.5) * _CELL + 4
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" text-anchor="end">{depth:g}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="faint" x="{middle}" y="{bottom + 33}" text-anchor="middle">depth by context, tokens</text>'
    )
    return _svg(bottom + 40, title, parts)


def mark(model: int) -> str:
    """Draw the mark of a model, for a legend."""
    return (
        f'<svg class="key m{model % HUES}" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="mark" d="{_MARKS[model % HUES]}"/></svg>'
    )


def shade() -> str:
    """Draw what lies beyond a context, for a legend."""
    return (
        '<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">'
        '<rect class="beyond" x="-6" y="-6" width="12" height="12"/></svg>'
    )


def short(length: int) -> str:
    """Write a length as people do on the command line.

    Example:
        >>> short(512), short(4096), short(131072), short(1000), short(1 << 20)
        ('512', '4k', '128k', '1,000', '1m')
    """
    for unit, tokens in (("m", 1 << 20), ("k", 1 << 10)):
        if length >= tokens and length % tokens == 0:
            return f"{length // tokens}{unit}"
    return f"{length:,}"


class _Scale:
    """Where values stand on the upright axis."""

    def __init__(self, values: Sequence[float], *, percent: bool) -> None:
        self._percent = percent
        low, high = min(values, default=0.0), max(values, default=1.0)
        self._log = not percent and low > 0 and high > _WIDE * low
        if percent:
            self.ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
        elif self._log:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
            below = max((step for step in steps if step <= low), default=low)
            above = min((step for step in steps if step >= high), default=high)
            self.ticks = [step for step in steps if below <= step <= above]
            self.ticks = self.ticks[:: -(-len(self.ticks) // 8)]
        else:
            step = _step(high / 4)
            self.ticks = [number * step for number in range(math.ceil(high / step - 1e-9) + 1)]
        self._low, self._high = self._at(min([*self.ticks, low])), self._at(max([*self.ticks, high]))

    def _at(self, value: float) -> float:
        return math.log(value) if self._log else value

    def height(self, value: float) -> float:
        """Return the y of a value."""
        share = (self._at(value) - self._low) / ((self._high - self._low) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    def named(self, tick: float) -> str:
        return f"{tick:.0%}" if self._percent else f"{tick:,.10g}"

    def told(self, value: float) -> str:
        return f"{value:.0%}" if self._percent else f"{value:,.4g}"


def _step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, ... and their fractions that is not below a number."""
    if least <= 0:
        return 1.0
    decade = 10.0 ** math.floor(math.log10(least))
    return next(step * decade for step in (1, 2, 5, 10) if step * decade >= least * (1 - 1e-9))


def _across(lengths: Sequence[int]) -> _Place:
    return _Place(math.log2(lengths[0]), math.log2(lengths[-1]))


class _Place:
    """Where lengths stand on the level axis: half a step is left free at both ends."""

    def __init__(self, first: float, last: float) -> None:
        self._first, self._span = first - 0.25, (last - first) + 0.5

    def __call__(self, length: int) -> float:
        share = (math.log2(length) - self._first) / self._span
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img"><title>{escape(title)}</title>'
        + "".join(parts)
        + "</svg>"
    )
