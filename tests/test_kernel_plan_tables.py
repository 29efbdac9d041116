"""Long tables, as plans and errors show them."""

from __future__ import annotations

from longspan import plan
from longspan.errors import message
from longspan.pattern import Causal, Chosen, Documents, parse


def test_long_tables_are_shown_without_their_middle():
    """A plan and an error; the pattern itself is still written whole, so that it can be pasted."""
    pattern = Causal() & Documents([3] * 60)
    assert "Documents((3, 3, 3, 3, 3, 3, ... 52 more ..., 3, 3))" in str(plan(pattern, length=180, heads=2))
    assert parse(str(pattern)) == pattern
    table = Chosen(tuple((row,) for row in range(40)), size=4)
    text = message("No.", {"pattern": str(table)}, fix=str(table))
    assert "Chosen(((0,), (1,), (2,), (3,), (4,), (5,), ... 32 more ..., (38,), (39,)), size=4)" in text
    assert text.endswith(f"try      {table}")
