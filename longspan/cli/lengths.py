"""Lengths: numbers of tokens as people write them, such as 512, 4k or 1m."""

from __future__ import annotations

import re

from longspan.errors import InputError, message

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_LENGTH = re.compile(r"(\d[\d_]*)([km]?)")


def parse_length(text: str) -> int:
    """Return a length in tokens; k stands for 1,024 of them and m for 1,048,576.

    Raises:
        InputError: the text is not a length, or is zero.

    Example:
        >>> parse_length("4k"), parse_length("131072"), parse_length("1M")
        (4096, 131072, 1048576)
    """
    parts = _LENGTH.fullmatch(text.strip().lower())
    length = int(parts[1]) * _UNITS[parts[2]] if parts else 0
    if length == 0:
        raise InputError(
            message(
                "This is not a length.",
                {
                    "asked": f"a length of {text.strip()!r}",
                    "wanted": "a positive number of tokens, with k or m",
                },
                fix="4096, or 4k",
            )
        )
    return length


def parse_lengths(text: str) -> tuple[int, ...]:
    """Return lengths that stand between commas, in rising order, each once.

    Raises:
        InputError: one of them is not a length.

    Example:
        >>> parse_lengths("4k,512,2k")
        (512, 2048, 4096)
    """
    return tuple(sorted({parse_length(part) for part in text.split(",")}))
