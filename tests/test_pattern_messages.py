"""What the patterns of tables, blocks and whole texts say to arguments that they cannot take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longspan.errors import LongspanError
from longspan.pattern import (
    S2,
    SCCA,
    BigBird,
    Chosen,
    Documents,
    Every,
    Fixed,
    Keys,
    Longformer,
    LongMixed,
    LongNet,
    Neighborhood,
    Random,
    Strided,
    parse,
    top_blocks,
)

MESSAGES: list[tuple[Callable[[], object], str]] = [
    (
        lambda: Keys((3, -1)),
        """\
Keys takes a list of integers of at least 0 for `positions`.
  got  positions=(3, -1)
  try  Keys((0, 4))""",
    ),
    (
        lambda: Keys([0.5] * 40),
        """\
Keys takes a list of integers of at least 0 for `positions`.
  got  positions=[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5,...
  try  Keys((0, 4))""",
    ),
    (
        lambda: Keys(9),
        """\
Keys takes a list of integers of at least 0 for `positions`.
  got  positions=9
  try  Keys((0, 4))""",
    ),
    (
        lambda: Documents((4, 0)),
        """\
Documents takes a list of integers of at least 1 for `lengths`.
  got  lengths=(4, 0)
  try  Documents((1, 5))""",
    ),
    (
        lambda: Documents((4, 5), ids=(1,)),
        """\
Documents takes one id for each stretch.
  lengths  2 of them
  ids      1 of them
  try      Documents((3, 9), ids=(-1, 0))""",
    ),
    (
        lambda: Documents((2**30, 2**30)),
        """\
The documents of a row are longer than any row.
  got   2,147,483,648 tokens
  most  2,147,483,647
  try   lengths in tokens, such as Documents((4096, 1024))""",
    ),
    (
        lambda: Chosen(9),
        """\
Chosen takes a list of blocks for each block of queries.
  got  blocks=9
  try  Chosen(((0,), (0, 1)), size=128)""",
    ),
    (
        lambda: Chosen([["a"]]),
        """\
Chosen takes a list of integers of at least 0 for `blocks`.
  got  blocks=['a']
  try  Chosen((0, 4))""",
    ),
    (
        lambda: Random(0),
        """\
Random takes an integer of at least 1 for `blocks`.
  got  blocks=0
  try  Random(blocks=4); sizes count tokens""",
    ),
    (
        lambda: Every(4, offset=2, run=3),
        """\
A run of Every ends before the next one may begin.
  got  offset=2, run=3 with step 4
  try  run=2, or a larger step""",
    ),
    (
        lambda: Longformer(4, dilation=(1, 0)),
        """\
Longformer takes a list of positive integers for `dilation`.
  got  dilation=(1, 0)
  try  dilation=(2048, 4096)""",
    ),
    (
        lambda: Longformer(4, dilation=(1, 2)).at_head(0, 3),
        """\
The heads cannot be divided equally among the parts of this pattern.
  pattern  PerHead([Window(4) | Sink(1) | Sink(1).T, Window(7) & Dilated(2) | Sink(1) | Sink(1).T])
  parts    2
  heads    3
  try      a number of parts that divides the number of heads""",
    ),
    (
        lambda: LongNet((4,), (1,), offset="fairseq"),
        """\
The offset of LongNet is "paper" or "torchscale".
  got  offset='fairseq'
  try  offset="paper\"""",
    ),
    (
        lambda: S2(8, wrap="roll", length=30),
        """\
Groups that roll need the length of the text, a multiple of an even group; others need none.
  got  group=8, wrap='roll', length=30
  try  S2(8), which leaks nothing""",
    ),
    (
        lambda: SCCA(8, mask="rolled"),
        """\
A rolled mask needs the length of the text, a multiple of the window; others need none.
  got  window=8, mask='rolled', length=0
  try  SCCA(8), which leaks nothing""",
    ),
    (
        lambda: LongMixed(8, flow=2, shifts=(0, 4)),
        """\
The shifts of LongMixed are distances in tokens, where there is no flow.
  got  shifts=(0, 4), flow=2
  try  shifts=(0, 8)""",
    ),
    (
        lambda: Strided(8, factor="middle"),
        """\
The factor of Strided is "both" or "divided" or "near" or "far".
  got  factor='middle'
  try  factor="both\"""",
    ),
    (
        lambda: Fixed(8, summary=3, variants=3),
        """\
The summaries of Fixed lie side by side in one block.
  got  3 summaries of 3 tokens in blocks of 8
  try  a stride of at least 9""",
    ),
    (
        lambda: BigBird(64, causal=False),
        """\
The last block of an encoder is known from the length of its text; a decoder's text has no end.
  got  length=0, causal=False
  try  BigBird(64), or BigBird(64, length=4096, causal=False)""",
    ),
    (
        lambda: Neighborhood(7, dilation=2, length=13, causal=False),
        """\
A neighborhood in both directions needs the length of the text, at least kernel times dilation; a causal one needs none.
  got     length=13, causal=False
  window  7 keys, 2 apart
  try     Neighborhood(7), or length=4096 with causal=False""",
    ),
    (
        lambda: top_blocks(torch.zeros(3, 8, 4), torch.zeros(2, 8, 4), size=4, count=0),
        """\
Blocks are chosen for the queries and keys of one text.
  query  [3, 8, 4], wanted [heads, length, width]
  key    [2, 8, 4], wanted [key heads, length, width]
  size   4, wanted at least 1
  count  0, wanted at least 1
  try    top_blocks(query[0], key[0], size=128, count=8) for the first text of a batch""",
    ),
]


@pytest.mark.parametrize(("act", "text"), MESSAGES, ids=[text.split("\n")[0][:50] for _, text in MESSAGES])
def test_errors_say_what_to_do(act: Callable[[], object], text: str):
    with pytest.raises(LongspanError) as raised:
        act()
    assert str(raised.value) == text


@pytest.mark.parametrize(
    "text",
    [
        "Keys('abc')",
        "Keys(None)",
        "Keys([[1], [2, 3]])",
        "Keys([99999999999999999999])",
        "Documents([1], ids=3)",
        "Chosen('abc')",
        "Chosen([1])",
        "Chosen([[0]], size=0)",
        "Random(2, of=-1)",
        "Longformer(3, global_tokens=[-1])",
        "Longformer(3, global_tokens='a')",
        "SCCA(4, shifts=3)",
        "Factored()",
        "Listed()",
        "Blockwise()",
    ],
)
def test_arguments_that_are_none_are_refused(text: str):
    with pytest.raises(LongspanError):
        parse(text)
