"""Errors: what was asked, what is wrong, why, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Members of a list in a text: numbers, or lists of them.
_MEMBERS = (r"-?\d+", r"\([^()]*\)")
# How many members are shown at the beginning and at the end of a list that is longer than both, and some more.
_FIRST, _LAST, _SPARED = 6, 2, 9


class LongspanError(Exception):
    """Base of every error that Longspan raises on purpose; its text is a laid-out message."""


class PatternError(LongspanError):
    """A pattern cannot be built or read as asked."""


class ShapeError(LongspanError):
    """Tensors do not fit together, or do not fit the pattern."""


class PlanError(LongspanError):
    """No kernel can run a pattern on the tensors given."""


class InputError(LongspanError):
    """A command was given a text, a model, an option or a folder that it cannot use."""


def message(problem: str, facts: Mapping[str, str | Sequence[str]] | None = None, *, fix: str) -> str:
    """Lay out a message: the problem, the facts in two columns, and what to do.

    Args:
        problem: one sentence that says what is wrong.
        facts: what was asked and what was found, label to text; a sequence takes one line per item.
        fix: what to do, in words or as something to paste.

    Example:
        >>> print(message("A window must be positive.", {"asked": "Window(0)"}, fix="Window(1) reads itself"))
        A window must be positive.
          asked  Window(0)
          try    Window(1) reads itself
    """
    rows = {**(facts or {}), "try": fix}
    width = max(len(label) for label in rows)
    lines = [problem]
    for label, text in rows.items():
        items = [text] if isinstance(text, str) else list(text)
        for number, item in enumerate(items):
            # What is to be pasted stays whole.
            shown = item if label == "try" else elided(item)
            lines.append(f"  {label if number == 0 else '':<{width}}  {shown}")
    return "\n".join(lines)


def elided(text: str) -> str:
    """Return a text for people to read, in which long lists of numbers, or of lists of them, have no middle.

    Example:
        >>> elided(str(tuple(range(100))))
        '(0, 1, 2, 3, 4, 5, ... 92 more ..., 98, 99)'
        >>> elided("Documents((3, 4, 5))")
        'Documents((3, 4, 5))'
    """
    for member in _MEMBERS:
        long = rf"(?:{member}, ){{{_FIRST + _LAST + _SPARED - 1},}}{member}"
        text = re.sub(long, lambda found, member=member: _ends(re.findall(member, found[0])), text)  # type: ignore[misc]
    return text


def _ends(members: Sequence[str]) -> str:
    left = len(members) - _FIRST - _LAST
    return ", ".join([*members[:_FIRST], f"... {left} more ...", *members[-_LAST:]])
