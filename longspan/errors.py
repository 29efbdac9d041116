"""Errors: what was asked, what is wrong, why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


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
            lines.append(f"  {label if number == 0 else '':<{width}}  {item}")
    return "\n".join(lines)
