"""What an error says, whole: what was asked, what is wrong, why, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from longspan.derive.blocks import blocks
from longspan.derive.mask import counts
from longspan.errors import LongspanError, PatternError, ShapeError
from longspan.pattern import (
    S2,
    SCCA,
    SDA,
    Causal,
    Chunk,
    Dilated,
    Every,
    Longformer,
    LongMixed,
    LongNet,
    PerHead,
    Prefix,
    Sink,
    SlidingWindow,
    Streaming,
    Window,
    parse,
)

KNOWN = (
    "BigBird, Causal, Chosen, Chunk, Dilated, Documents, Every, Everything, Fixed, Keys, LongMixed, LongNet, "
    "Longformer, Neighborhood, Nothing, PerHead, Prefix, Random, S2, SCCA, SDA, Sink, SlidingWindow, Streaming, "
    "Strided, Window"
)


def size(name: str, field: str, got: str, least: int = 1) -> str:
    return f"""\
{name} takes an integer of at least {least} for `{field}`.
  got  {field}={got}
  try  {name}({field}=4); sizes count tokens"""


def offset(name: str, got: str, step: int) -> str:
    return f"""\
The offset of {name} is a place from 0 to {step - 1}.
  got  offset={got} with {step}
  try  offset=0, the default"""


MESSAGES: list[tuple[str, Callable[[], object], type[LongspanError], str]] = [
    ("window 0", lambda: Window(0), PatternError, size("Window", "size", "0")),
    ("window -3", lambda: Window(-3), PatternError, size("Window", "size", "-3")),
    ("window half", lambda: Window(1.5), PatternError, size("Window", "size", "1.5")),
    ("window text", lambda: Window("512"), PatternError, size("Window", "size", "'512'")),
    ("window bool", lambda: Window(True), PatternError, size("Window", "size", "True")),
    ("sink 0", lambda: Sink(0), PatternError, size("Sink", "size", "0")),
    ("prefix 0", lambda: Prefix(0), PatternError, size("Prefix", "size", "0")),
    ("dilated 0", lambda: Dilated(0), PatternError, size("Dilated", "step", "0")),
    ("dilated offset", lambda: Dilated(3, offset=3), PatternError, offset("Dilated", "3", 3)),
    ("chunk 0", lambda: Chunk(0), PatternError, size("Chunk", "size", "0")),
    ("chunk offset", lambda: Chunk(8, offset=-1), PatternError, offset("Chunk", "-1", 8)),
    ("chunk shift", lambda: Chunk(8, shift=-1), PatternError, size("Chunk", "shift", "-1", 0)),
    ("every 0", lambda: Every(0), PatternError, size("Every", "step", "0")),
    ("every offset", lambda: Every(4, offset="1"), PatternError, offset("Every", "'1'", 4)),
    ("every within", lambda: Every(4, within=-1), PatternError, size("Every", "within", "-1", 0)),
    ("sliding window 0", lambda: SlidingWindow(0), PatternError, size("SlidingWindow", "window", "0")),
    ("longformer window", lambda: Longformer(0), PatternError, size("Longformer", "window", "0")),
    (
        "longformer dilation",
        lambda: Longformer(4, dilation=0),
        PatternError,
        size("Longformer", "dilation", "0"),
    ),
    (
        "longformer globals",
        lambda: Longformer(4, global_tokens=-1),
        PatternError,
        size("Longformer", "global_tokens", "-1", 0),
    ),
    ("s2 group", lambda: S2(1), PatternError, size("S2", "group", "1", 2)),
    ("scca window", lambda: SCCA(0), PatternError, size("SCCA", "window", "0")),
    ("scca flow", lambda: SCCA(4, flow=-1), PatternError, size("SCCA", "flow", "-1", 0)),
    ("sda dilation", lambda: SDA(0), PatternError, size("SDA", "dilation", "0")),
    ("longmixed window", lambda: LongMixed(0), PatternError, size("LongMixed", "window", "0")),
    (
        "longmixed dilation",
        lambda: LongMixed(8, dilation=0),
        PatternError,
        size("LongMixed", "dilation", "0"),
    ),
    ("streaming window", lambda: Streaming(0), PatternError, size("Streaming", "window", "0")),
    ("streaming sinks", lambda: Streaming(8, sinks=0), PatternError, size("Streaming", "sinks", "0")),
    (
        "sda rows",
        lambda: SDA(4, rows="some"),
        PatternError,
        """\
The rows of SDA are "all" or "selected".
  got  rows='some'
  try  rows="all\"""",
    ),
    (
        "longnet lists",
        lambda: LongNet((4, 8), (1, 2, 4)),
        PatternError,
        """\
LongNet takes one dilation for each segment length.
  segments   (4, 8), 2 of them
  dilations  (1, 2, 4), 3 of them
  try        LongNet((2048, 4096), (1, 2))""",
    ),
    (
        "longnet sizes",
        lambda: LongNet((4, 0), (1, 2)),
        PatternError,
        """\
LongNet takes a list of positive integers for `segments`.
  got  segments=(4, 0)
  try  segments=(2048, 4096)""",
    ),
    (
        "longnet dilation",
        lambda: LongNet((4, 8), 2),
        PatternError,
        """\
LongNet takes a list of positive integers for `dilations`.
  got  dilations=2
  try  dilations=(2048, 4096)""",
    ),
    (
        "per head of nothing",
        lambda: PerHead([]),
        PatternError,
        """\
PerHead takes a list of patterns, one per group of heads.
  got  []
  try  PerHead([Causal(), Causal() & Window(512)])""",
    ),
    (
        "per head of one pattern",
        lambda: PerHead(Causal()),
        PatternError,
        """\
PerHead takes a list of patterns, one per group of heads.
  got  Causal()
  try  PerHead([Causal(), Causal() & Window(512)])""",
    ),
    (
        "heads that do not divide",
        lambda: PerHead([Causal(), Window(4), Window(8)]).at_head(0, 4),
        PatternError,
        """\
The heads cannot be divided equally among the parts of this pattern.
  pattern  PerHead([Causal(), Window(4), Window(8)])
  parts    3
  heads    4
  try      a number of parts that divides the number of heads""",
    ),
    (
        "no single relation",
        lambda: counts(S2(8), length=4),
        PatternError,
        """\
This pattern differs from head to head, so it has no single relation.
  pattern  S2(8)
  try      pattern.at_head(head, heads), or name the number of heads where one is asked for""",
    ),
    (
        "operator with a number",
        lambda: Causal() & 4,
        PatternError,
        """\
An operator joins two patterns.
  asked  Intersection with 4
  got    int
  try    a pattern on both sides, such as Causal() & Window(512)""",
    ),
    (
        "unknown name",
        lambda: parse("Causal() & Windw(512)"),
        PatternError,
        f"""\
There is no pattern called Windw.
  asked  Causal() & Windw(512)
  known  {KNOWN}
  try    Window""",
    ),
    (
        "unknown name like no other",
        lambda: parse("os()"),
        PatternError,
        f"""\
There is no pattern called os.
  asked  os()
  known  {KNOWN}
  try    one of the known names""",
    ),
    (
        "name without parentheses",
        lambda: parse("Causal & Window(512)"),
        PatternError,
        """\
This text is no pattern.
  asked  Causal & Window(512)
  wrong  Causal needs parentheses
  try    Causal(...)""",
    ),
    (
        "typo in an argument",
        lambda: parse("LongMixed(1024, dilatoin=4)"),
        PatternError,
        """\
This text is no pattern.
  asked  LongMixed(1024, dilatoin=4)
  wrong  LongMixed has no argument `dilatoin`; it takes window, dilation, flow, shifts, empty, rows, causal
  try    LongMixed(dilation=...)""",
    ),
    (
        "argument of a pattern without any",
        lambda: parse("Causal(size=4)"),
        PatternError,
        """\
This text is no pattern.
  asked  Causal(size=4)
  wrong  Causal has no argument `size`; it takes nothing
  try    Causal()""",
    ),
    (
        "missing argument",
        lambda: parse("Window()"),
        PatternError,
        """\
This text is no pattern.
  asked  Window()
  wrong  Window: missing a required argument: 'size'
  try    Window(size: 'int')""",
    ),
    (
        "too many arguments",
        lambda: parse("Window(4, 5)"),
        PatternError,
        """\
This text is no pattern.
  asked  Window(4, 5)
  wrong  Window: too many positional arguments
  try    Window(size: 'int')""",
    ),
    (
        "argument that is computed",
        lambda: parse("Window(2 * 256)"),
        PatternError,
        """\
This text is no pattern.
  asked  Window(2 * 256)
  wrong  `2 * 256` is no number, text or list of them
  try    "Causal() & Window(512)", for example""",
    ),
    (
        "open parenthesis",
        lambda: parse("Window(512"),
        PatternError,
        """\
This text is no pattern.
  asked  Window(512
  wrong  it is no expression: '(' was never closed
  try    "Causal() & Window(512)", for example""",
    ),
    (
        "no text",
        lambda: parse(""),
        PatternError,
        """\
This text is no pattern.
  asked  \n\
  wrong  it is no expression: invalid syntax
  try    "Causal() & Window(512)", for example""",
    ),
    (
        "a number",
        lambda: parse("512"),
        PatternError,
        """\
This text is no pattern.
  asked  512
  wrong  `512` is no pattern
  try    "Causal() & Window(512)", for example""",
    ),
    (
        "an operator without a meaning",
        lambda: parse("Causal() ^ Window(4)"),
        PatternError,
        """\
This text is no pattern.
  asked  Causal() ^ Window(4)
  wrong  `Causal() ^ Window(4)` is no pattern
  try    "Causal() & Window(512)", for example""",
    ),
    (
        "a call of something else",
        lambda: parse("__import__('os').system('true')"),
        PatternError,
        """\
This text is no pattern.
  asked  __import__('os').system('true')
  wrong  `__import__('os').system('true')` is no pattern
  try    "Causal() & Window(512)", for example""",
    ),
    (
        "a wrong size in a text",
        lambda: parse("Causal() & Window(0)"),
        PatternError,
        size("Window", "size", "0"),
    ),
    (
        "no range of keys",
        lambda: counts(Causal(), queries=range(4)),
        ShapeError,
        """\
A pattern is read over a range of queries and a range of keys; one is missing.
  length   None
  queries  range(0, 4)
  keys     None
  try      length=1024, or queries=range(512, 1024) and keys=range(1024)""",
    ),
    (
        "negative positions",
        lambda: counts(Causal(), queries=range(-2, 4), length=4),
        ShapeError,
        """\
Positions are 0 or more and grow.
  length   4
  queries  range(-2, 4)
  keys     range(0, 4)
  try      range(start, stop) with start >= 0""",
    ),
    (
        "blocks of nothing",
        lambda: blocks(Causal(), length=4, size=0),
        ShapeError,
        """\
A block and a step hold at least one position.
  asked  size=0, steps=(1, 1)
  try    size=128, steps=(1, 1)""",
    ),
]


@pytest.mark.parametrize(("act", "kind", "text"), [pytest.param(*row[1:], id=row[0]) for row in MESSAGES])
def test_errors_say_what_to_do(act: Callable[[], object], kind: type[LongspanError], text: str):
    with pytest.raises(LongspanError) as raised:
        act()
    assert type(raised.value) is kind
    assert str(raised.value) == text
