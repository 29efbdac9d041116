"""Frequencies read from text: what is written is read again, and every refusal says what is known."""

from __future__ import annotations

import pytest

from longspan.errors import InputError
from longspan.frequency import (
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKByParts,
    Plain,
    YaRN,
)
from longspan.frequency.expression import FREQUENCIES, parse

KNOWN = "DynamicNTK, Linear, Llama3, LongRoPE, NTK, NTKByParts, Plain, YaRN"
EACH = [
    Plain(theta=500.0, share=0.5),
    Linear(4.0),
    NTK(8),
    DynamicNTK(512, 2.0),
    NTKByParts(8, original=512, ramp="unrounded"),
    YaRN(8, original=512, attention_factor=1.1),
    LongRoPE([1.0, 2.5], (1, 8.0), original=512, factor=8.0),
    Llama3(8, original=128),
]


@pytest.mark.parametrize("frequency", EACH, ids=lambda frequency: type(frequency).__name__)
def test_what_is_written_is_read_again(frequency):
    assert parse(str(frequency), theta=3.0, share=0.1) == frequency
    assert {type(each) for each in EACH} == set(FREQUENCIES.values())


def test_what_is_not_said_is_the_models_own():
    assert parse(" YaRN(8, original=512) ", theta=500.0, share=0.5) == YaRN(
        8, original=512, theta=500.0, share=0.5
    )
    assert parse("Linear(8, theta=20.0)", theta=500.0).theta == 20.0


@pytest.mark.parametrize(
    ("text", "wrong", "fix"),
    [
        ("Linear(4", "it is no expression: '(' was never closed", '"YaRN(8, original=4096)", for example'),
        ("Linear", "it is no call of a frequency's name", '"YaRN(8, original=4096)", for example'),
        ("Yarn(8)", f"there is no frequency called Yarn, but {KNOWN}", "YaRN(...)"),
        (
            "NTK(exit())",
            "its arguments are no numbers, texts or lists of them",
            '"YaRN(8, original=4096)", for example',
        ),
        (
            "NTK(8, original=4)",
            "NTK: got an unexpected keyword argument 'original'; it takes factor, theta, share",
            "NTK(...)",
        ),
    ],
)
def test_refusals(text, wrong, fix):
    with pytest.raises(InputError) as refused:
        parse(text)
    assert str(refused.value).splitlines() == [
        "This text is no frequency.",
        f"  asked  {text}",
        f"  wrong  {wrong}",
        f"  try    {fix}",
    ]


def test_values_out_of_range_are_refused_as_anywhere():
    with pytest.raises(InputError, match="Linear cannot have this `factor`"):
        parse("Linear(0.5)")
