"""What attend and plan say when they refuse, whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longspan import attend, attend_with_lse, plan
from longspan.errors import LongspanError, PatternError, PlanError, ShapeError
from longspan.pattern import SCCA, Causal, Dilated, PerHead, Window
from longspan.score import SoftCap


def side(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of any size that takes no memory."""
    return torch.zeros((), dtype=dtype).expand(shape)


def facts(
    problem: str,
    fix: str,
    *,
    pattern: str = "Causal()",
    query: str = "[1, 4, 9, 8] float32, cpu",
    key: str = "[1, 2, 9, 8] float32, cpu",
    value: str = "[1, 2, 9, 8] float32, cpu",
    queries: str = "the last ones",
) -> str:
    return f"""\
{problem}
  pattern  {pattern}
  query    {query}
  key      {key}
  value    {value}
  queries  {queries}
  try      {fix}"""


QUERY, KEY = side(1, 4, 9, 8), side(1, 2, 9, 8)

MESSAGES: list[tuple[str, Callable[[], object], type[LongspanError], str]] = [
    (
        "no pattern",
        lambda: attend(QUERY, KEY, KEY, "Causal()"),
        ShapeError,
        facts("The fourth argument is a pattern, got str.", "Causal(), for example"),
    ),
    (
        "three dimensions",
        lambda: attend(side(4, 9, 8), KEY, KEY, Causal()),
        ShapeError,
        facts(
            "Query, key and value have four dimensions: batch, heads, length and width.",
            "tensor.unsqueeze(0) for a batch of one",
            query="[4, 9, 8] float32, cpu",
        ),
    ),
    (
        "two dtypes",
        lambda: attend(side(1, 4, 9, 8, dtype=torch.bfloat16), KEY, KEY, Causal()),
        ShapeError,
        facts(
            "Query, key and value share one floating-point dtype.",
            "tensor.to(query.dtype)",
            query="[1, 4, 9, 8] bfloat16, cpu",
        ),
    ),
    (
        "integers",
        lambda: attend(*[side(1, 1, 9, 8, dtype=torch.int64)] * 3, Causal()),
        ShapeError,
        facts(
            "Query, key and value share one floating-point dtype.",
            "tensor.to(query.dtype)",
            query="[1, 1, 9, 8] int64, cpu",
            key="[1, 1, 9, 8] int64, cpu",
            value="[1, 1, 9, 8] int64, cpu",
        ),
    ),
    (
        "two devices",
        lambda: attend(QUERY, side(1, 2, 9, 8).to("meta"), KEY, Causal()),
        ShapeError,
        facts(
            "Query, key and value lie on one device.",
            "tensor.to(query.device)",
            key="[1, 2, 9, 8] float32, meta",
        ),
    ),
    (
        "fewer values than keys",
        lambda: attend(QUERY, KEY, side(1, 2, 8, 8), Causal()),
        ShapeError,
        facts(
            "Key and value have one batch, number of heads and length.",
            "a value for every key",
            value="[1, 2, 8, 8] float32, cpu",
        ),
    ),
    (
        "two batches",
        lambda: attend(side(3, 4, 9, 8), KEY, KEY, Causal()),
        ShapeError,
        facts(
            "Query and key have one batch and one width.",
            "a key made for this query",
            query="[3, 4, 9, 8] float32, cpu",
        ),
    ),
    (
        "two widths",
        lambda: attend(side(1, 4, 9, 6), KEY, KEY, Causal()),
        ShapeError,
        facts(
            "Query and key have one batch and one width.",
            "a key made for this query",
            query="[1, 4, 9, 6] float32, cpu",
        ),
    ),
    (
        "heads that cannot be shared",
        lambda: attend(side(1, 5, 9, 8), KEY, KEY, Causal()),
        ShapeError,
        facts(
            "5 query heads cannot share 2 key heads equally.",
            "a number of key heads that divides the number of query heads",
            query="[1, 5, 9, 8] float32, cpu",
        ),
    ),
    (
        "more queries than positions",
        lambda: attend_with_lse(side(1, 4, 12, 8), KEY, KEY, Causal()),
        ShapeError,
        facts(
            "12 queries are not the last of 9 positions.",
            "queries=range(12) says where they are",
            query="[1, 4, 12, 8] float32, cpu",
        ),
    ),
    (
        "a range of another length",
        lambda: attend(QUERY, KEY, KEY, Causal(), queries=range(5)),
        ShapeError,
        facts(
            "`queries` names 5 positions for 9 queries.",
            "queries=range(start, start + 9)",
            queries="range(0, 5)",
        ),
    ),
    (
        "heads that do not divide",
        lambda: attend(side(1, 3, 9, 8), side(1, 1, 9, 8), side(1, 1, 9, 8), PerHead([Causal(), Window(4)])),
        PatternError,
        """\
The heads cannot be divided equally among the parts of this pattern.
  pattern  PerHead([Causal(), Window(4)])
  parts    2
  heads    3
  try      a number of parts that divides the number of heads""",
    ),
    (
        "unknown kernel",
        lambda: attend(QUERY, KEY, KEY, Causal(), kernel="fast"),
        PlanError,
        """\
There is no kernel called fast.
  asked  fast
  try    one of native, sdpa, flash, flex, reference""",
    ),
    (
        "a kernel that cannot",
        lambda: attend(QUERY, KEY, KEY, Causal(), scores=SoftCap(50.0), kernel="sdpa"),
        PlanError,
        """\
The kernel sdpa cannot run this pattern on these tensors.
  pattern  Causal()
  query    [1, 4, 9, 8] float32, cpu
  key      [1, 2, 9, 8] float32, cpu
  value    [1, 2, 9, 8] float32, cpu
  queries  range(0, 9)
  refused  native  cannot cap scores softly
           sdpa  cannot cap scores softly: the flash attention that it calls has no tanh
           flash  runs on cuda, got cpu
           flex  is taken on cpu only where it is asked for
  try      kernel=None, which takes the first that can""",
    ),
    (
        "no kernel that can",
        lambda: attend(
            side(1, 32, 32768, 8),
            side(1, 32, 32768, 8),
            side(1, 32, 32768, 6),
            Causal() & Dilated(3),
            scores=SoftCap(50.0),
        ),
        PlanError,
        """\
No kernel can run this pattern on these tensors.
  pattern  Causal() & Dilated(3)
  query    [1, 32, 32768, 8] float32, cpu
  key      [1, 32, 32768, 8] float32, cpu
  value    [1, 32, 32768, 6] float32, cpu
  queries  range(0, 32768)
  refused  native  cannot cap scores softly
           sdpa  cannot cap scores softly: the flash attention that it calls has no tanh
           flash  runs on cuda, got cpu
           flex  is taken on cpu only where it is asked for
           reference  would need 137.4 GB for the scores, limit is 8 GB
  try      fewer queries at a time, or tensors that a kernel above takes""",
    ),
    (
        "a dtype that no kernel knows",
        lambda: plan(Causal(), length=9, dtype="int8"),
        ShapeError,
        """\
There is no such dtype here.
  asked  int8
  try    one of float64, float32, bfloat16, float16""",
    ),
    (
        "a plan of the reference that is too large",
        lambda: plan(Causal(), length=65_536, heads=8, dtype=torch.float64, kernel="reference"),
        PlanError,
        """\
The kernel reference cannot run this pattern on these tensors.
  pattern  Causal()
  refused  native  takes float32 or bfloat16, got float64
           reference  would need 274.9 GB for the scores, limit is 8 GB
  try      kernel=None, which takes the first that can""",
    ),
]


@pytest.mark.parametrize(("act", "kind", "text"), [pytest.param(*row[1:], id=row[0]) for row in MESSAGES])
def test_errors_say_what_to_do(act: Callable[[], object], kind: type[LongspanError], text: str):
    with pytest.raises(LongspanError) as raised:
        act()
    assert type(raised.value) is kind
    assert str(raised.value) == text


def test_negative_positions_are_refused():
    with pytest.raises(ShapeError):
        attend(QUERY, KEY, KEY, Causal(), queries=range(-3, 6))
    with pytest.raises(ShapeError):
        plan(Causal(), length=9, queries=range(-3, 6))
    with pytest.raises(ShapeError):
        plan(Causal(), length=-1)


def test_positions_that_run_backwards_are_refused():
    with pytest.raises(ShapeError):
        attend(QUERY, KEY, KEY, Causal(), queries=range(8, -1, -1))
    with pytest.raises(ShapeError):
        plan(Causal(), length=9, queries=range(8, -1, -1))


def test_a_named_pattern_is_named_where_its_heads_do_not_divide():
    """The user wrote SCCA and is told about SCCA, not about what it is made of."""
    with pytest.raises(PatternError) as raised:
        plan(SCCA(4), length=9, heads=3)
    assert "SCCA(4)" in str(raised.value)
