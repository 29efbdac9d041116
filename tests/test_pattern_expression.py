"""Expressions: whatever text comes in, out comes a pattern or a message; nothing is run."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import patterns

from longspan.errors import PatternError
from longspan.pattern import (
    SDA,
    Causal,
    Chunk,
    Dilated,
    LongMixed,
    LongNet,
    Pattern,
    PerHead,
    Sink,
    Window,
    parse,
)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Causal()", Causal()),
        ("  Causal() &\tWindow(512) ", Causal() & Window(512)),
        ("Window(size=512)", Window(512)),
        ("LongMixed(1024) & Causal()", LongMixed(1024) & Causal()),
        ("Causal() & (Window(8) | Sink(4))", Causal() & (Window(8) | Sink(4))),
        ("Causal() & Window(8) | Sink(4)", (Causal() & Window(8)) | Sink(4)),
        ("Window(8) + Sink(4) & Causal()", (Window(8) + Sink(4)) & Causal()),
        ("Window(8) - Chunk(4)", Window(8) - Chunk(4)),
        ("~Window(8).T", ~(Window(8).T)),
        ("(~Window(8)).T", (~Window(8)).T),
        ("PerHead([Causal(), ~Window(4), Sink(2).T])", PerHead([Causal(), ~Window(4), Sink(2).T])),
        ("PerHead([~Window(4)])", PerHead([~Window(4)])),
        ("PerHead([Window(4).T])", PerHead([Window(4).T])),
        ("LongNet([4, 8], [1, 2])", LongNet((4, 8), (1, 2))),
        ("LongNet((4, 8), (1, 2), causal=False)", LongNet((4, 8), (1, 2), causal=False)),
        ("SDA(rows='selected')", SDA(rows="selected")),
        ("Dilated(4, offset=3)", Dilated(4, offset=3)),
    ],
)
def test_text_means_what_it_means_in_python(text: str, pattern: Pattern):
    assert parse(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        "PerHead(3)",
        "PerHead('Causal()')",
        "Window({[]: 1})",
        "Window(**{'size': 4})",
        "LongNet(*[(4, 8), (1, 2)])",
        "Window(size=4, size=5)",
        "SDA(rows=Causal())",
        "PerHead([1, Causal()])",
        "Causal().contains",
        "Causal().__class__",
        "(lambda: Causal())()",
        "[Causal()]",
        "Causal(), Window(4)",
        "Causal() if True else Window(4)",
        "(x := Causal())",
        "Window(1) and Window(2)",
        "Window(f'{4}')",
        "Window(None)",
        "Window(4) & 4",
        "Pattern()",
        "Named()",
        "Atom()",
        "Intersection(())",
        "\\0",
        "~" * 9000 + "Causal()",
        " & ".join(["Causal()"] * 9000),
        "(" * 9000 + "Causal()" + ")" * 9000,
    ],
    ids=lambda text: text[:40],
)
def test_text_that_is_no_pattern_is_refused(text: str):
    with pytest.raises(PatternError):
        parse(text)


def refused_or_read(text: str) -> None:
    with contextlib.suppress(PatternError):
        assert isinstance(parse(text), Pattern)


@given(st.text())
def test_any_text_is_a_pattern_or_refused(text: str):
    refused_or_read(text)


@given(patterns.map(str), st.data())
@example("Causal()", None)
def test_any_text_like_a_pattern_is_a_pattern_or_refused(text: str, data: st.DataObject | None):
    """One character of an expression is changed, lost or added."""
    if data is not None:
        place = data.draw(st.integers(0, len(text)))
        new = data.draw(st.text("()[]{},.=&|+-~T0159'* aW_:#", max_size=2))
        text = text[:place] + new + text[place + data.draw(st.integers(0, 1)) :]
    refused_or_read(text)
