"""Sizes: numbers of bytes as people read them."""

from __future__ import annotations


def size(count: float | None) -> str:
    """Write a number of bytes in the unit that leaves a few digits, or that it is not known.

    Example:
        >>> size(900), size(4_194_304), size(33_554_432), size(8_796_093_022_208), size(None)
        ('900 bytes', '4.2 MB', '33.6 MB', '8,796.1 GB', 'not known')
    """
    if count is None:
        return "not known"
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} bytes"
