"""Sizes: numbers of bytes as people read them."""

from __future__ import annotations


def size(count: float | None) -> str:
    """Write a number of bytes with three digits or more, or that it is not known.

    Example:
        >>> size(900), size(4_194_304), size(33_554_432), size(8_796_093_022_208), size(None)
        ('900 bytes', '4.19 MB', '33.6 MB', '8,796.1 GB', 'not known')
    """
    if count is None:
        return "not known"
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            value = count / scale
            return f"{value:.2f} {unit}" if value < 10 else f"{value:,.1f} {unit}"
    return f"{count:.0f} bytes"
