"""Frequencies: equal to transformers bit by bit, to the papers' words, and refused where they have no meaning."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longspan.errors import InputError, ShapeError
from longspan.frequency import (
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKByParts,
    Plain,
    YaRN,
    factors,
)

ORIGINAL = 2048
WIDTHS = [8, 64, 80, 128]
THETAS = [10000.0, 500000.0]
FACTORS = [1.0, 1.7, 8.0, 32]


def foreign(width, kind, *, theta, length=None, positions=ORIGINAL, **keys):
    """What transformers computes: angles and scale."""
    config = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": kind, "rope_theta": theta} | keys,
    )
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)


def check(frequency, wanted, *, width, length=None):
    angles, scale = wanted
    got = frequency.angles_per_token(width, length)
    assert got.dtype == torch.float32
    assert torch.equal(got, angles)
    assert frequency.scale() == scale


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theta", THETAS)
def test_plain_is_that_of_transformers(width, theta):
    check(Plain(theta=theta), foreign(width, "default", theta=theta), width=width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("factor", FACTORS)
def test_one_factor_is_that_of_transformers(width, theta, factor):
    check(Linear(factor, theta=theta), foreign(width, "linear", theta=theta, factor=factor), width=width)
    scaled = {"factor": factor, "original_max_position_embeddings": ORIGINAL}
    yarn = foreign(width, "yarn", theta=theta, positions=ORIGINAL * 8, **scaled)
    check(YaRN(factor, original=ORIGINAL, theta=theta), yarn, width=width)
    llama = foreign(
        width,
        "llama3",
        theta=theta,
        positions=ORIGINAL * 8,
        low_freq_factor=1.5,
        high_freq_factor=5.0,
        **scaled,
    )
    check(Llama3(factor, original=ORIGINAL, low=1.5, high=5.0, theta=theta), llama, width=width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("length", [None, 1, 2047, 2048, 2049, 3001, 65536])
def test_dynamic_is_that_of_transformers(width, factor, length):
    wanted = foreign(width, "dynamic", theta=10000.0, factor=factor, length=length)
    check(DynamicNTK(ORIGINAL, factor), wanted, width=width, length=length)


YARN_KEYS = [
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"truncate": False},
    {"attention_factor": 0.7},
    {"mscale": 0.707, "mscale_all_dim": 1.1},
    {"mscale": 0.707},
]
NAMES = {"beta_fast": "fast", "beta_slow": "slow"}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keys", YARN_KEYS, ids=str)
def test_options_of_yarn_are_those_of_transformers(width, keys):
    scaled = {"factor": 8.0, "original_max_position_embeddings": ORIGINAL}
    wanted = foreign(width, "yarn", theta=10000.0, positions=ORIGINAL * 8, **scaled, **keys)
    ours = {NAMES.get(name, name): value for name, value in keys.items() if name != "truncate"}
    if "truncate" in keys:
        ours["ramp"] = "unrounded"
    check(YaRN(8.0, original=ORIGINAL, **ours), wanted, width=width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [None, 1, 2048, 2049, 4096])
@pytest.mark.parametrize("options", [{}, {"attention_factor": 1.3}], ids=str)
def test_longrope_is_that_of_transformers(width, length, options):
    short = [1 + 0.01 * pair for pair in range(width // 2)]
    long = [1 + 0.37 * pair for pair in range(width // 2)]
    keys = {
        "short_factor": short,
        "long_factor": long,
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    wanted = foreign(width, "longrope", theta=10000.0, length=length, positions=16384, **keys, **options)
    check(LongRoPE(short, long, original=ORIGINAL, factor=8.0, **options), wanted, width=width, length=length)


def test_a_share_of_the_head_is_that_of_transformers():
    for share in (0.25, 0.5, 0.4):
        scaled = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": share}
        wanted = foreign(80, "yarn", theta=10000.0, positions=8192, **scaled)
        check(YaRN(4.0, original=ORIGINAL, share=share), wanted, width=80)
        wanted = foreign(80, "linear", theta=10000.0, factor=4.0, partial_rotary_factor=share)
        check(Linear(4.0, share=share), wanted, width=80)


# The paper's formulas by loops in float64.


def plain(width, theta=10000.0):
    return [theta ** (-2 * d / width) for d in range(width // 2)]


def close(got, wanted):
    # An exponent rounded to float32 moves a power by ln(theta), about 10, roundings; a ramp doubles that.
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_ntk_reaches_linear_at_the_slowest_pair_and_keeps_the_fastest(width):
    wanted = plain(width, 10000.0 * 8 ** (width / (width - 2)))
    close(NTK(8).angles_per_token(width), wanted)
    slowest = factors(NTK(8), width)
    assert slowest[0] == 1 and slowest[-1] == pytest.approx(8, rel=1e-6)
    assert Plain(theta=NTK(8).base(width)).angles_per_token(width).equal(NTK(8).angles_per_token(width))
    assert NTK(2, theta=NTK(4).base(width)).base(width) == pytest.approx(NTK(8).base(width))


def test_dynamic_ntk_with_a_factor_of_one_is_the_definition_and_with_eight_is_not():
    eight = 8 * ORIGINAL
    close(DynamicNTK(ORIGINAL).angles_per_token(128, eight), NTK(8).angles_per_token(128).tolist())
    raised = 57 ** (128 / 126)
    assert raised == pytest.approx(60.8, abs=0.05)
    close(DynamicNTK(ORIGINAL, 8.0).angles_per_token(128, eight), plain(128, 10000.0 * raised))


def by_parts(width, theta, factor, original, slow, fast):
    result = []
    for frequency in plain(width, theta):
        turns = original * frequency / (2 * math.pi)
        kept = min(max((turns - slow) / (fast - slow), 0), 1)
        result.append((1 - kept) * frequency / factor + kept * frequency)
    return result


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("slow", "fast"), [(1, 32), (2, 9)])
def test_by_parts_is_the_papers(width, slow, fast):
    frequency = NTKByParts(8, original=4096, slow=slow, fast=fast)
    close(frequency.angles_per_token(width), by_parts(width, 10000.0, 8, 4096, slow, fast))
    assert frequency.scale() == 1
    same = YaRN(8, original=4096, slow=slow, fast=fast, ramp="turns")
    assert same.angles_per_token(width).equal(frequency.angles_per_token(width))
    assert same.scale() == 0.1 * math.log(8) + 1


@pytest.mark.parametrize(
    ("width", "theta", "original", "bounds"),
    [
        (128, 1e4, 2048, (16, 41)),
        (128, 1e4, 4096, (20, 46)),
        (128, 5e5, 8192, (18, 35)),
        (128, 1e6, 32768, (23, 40)),
        (64, 1e4, 4096, (10, 23)),
    ],
)
def test_the_ramp_of_yarn_lies_between_these_pairs(width, theta, original, bounds):
    frequency = YaRN(8, original=original, theta=theta)
    assert frequency.bounds(width) == bounds
    stretches = factors(frequency, width)
    low, high = bounds
    assert stretches[: low + 1] == pytest.approx([1] * (low + 1), rel=1e-6)
    assert stretches[high:] == pytest.approx([8] * (width // 2 - high), rel=1e-6)
    assert all(1.001 < stretch < 7.999 for stretch in stretches[low + 1 : high])


def test_the_two_ramps_of_yarn_differ_by_what_their_docstring_says():
    rows = [NTKByParts(1e9, original=4096, ramp=ramp).angles_per_token(128) for ramp in ("turns", "rounded")]
    kept = [row / Plain().angles_per_token(128) for row in rows]
    assert (kept[0] - kept[1]).abs().max().item() == pytest.approx(0.37, abs=0.005)


@pytest.mark.parametrize("width", WIDTHS)
def test_any_frequency_can_be_said_in_factors(width):
    for frequency in (
        NTK(8),
        Linear(8),
        NTKByParts(8, original=512),
        Llama3(8, original=512),
        DynamicNTK(512),
    ):
        said = factors(frequency, width, 4096)
        again = LongRoPE(said, said, original=512, factor=8)
        assert not again.varies
        close(again.angles_per_token(width), frequency.angles_per_token(width, 4096).tolist())


def test_only_those_that_say_so_vary_with_the_length():
    still = [
        Plain(),
        Linear(2),
        NTK(2),
        NTKByParts(2, original=64),
        YaRN(2, original=64),
        Llama3(original=64),
    ]
    still.append(LongRoPE([1, 2], [1, 2], original=64, factor=2))
    moving = [DynamicNTK(64), LongRoPE([1, 1], [1, 2], original=64, factor=2)]
    for frequency in still + moving:
        same = frequency.angles_per_token(4, 64).equal(frequency.angles_per_token(4, 100))
        assert same == (not frequency.varies), frequency


def test_angles_are_float32_whatever_surrounds_them():
    wanted = YaRN(8, original=512).angles_per_token(64)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            got = YaRN(8, original=512).angles_per_token(64)
    finally:
        torch.set_default_dtype(default)
    assert got.dtype == torch.float32 and got.equal(wanted)


def test_equal_values_are_equal_and_frozen():
    assert LongRoPE([1.0], [2.0], original=8, factor=2) == LongRoPE((1.0,), (2.0,), original=8, factor=2)
    assert len({YaRN(8, original=512), YaRN(8, original=512), YaRN(8, original=512, ramp="turns")}) == 2
    with pytest.raises(AttributeError):
        Plain().theta = 5.0


REFUSALS = {
    "factor": (
        lambda: Linear(0.5),
        """Linear cannot have this `factor`.
  got  factor=0.5
  try  a number of 1 or more""",
    ),
    "not a number": (
        lambda: NTK(math.nan),
        """NTK cannot have this `factor`.
  got  factor=nan
  try  a number of 1 or more""",
    ),
    "theta": (
        lambda: Plain(theta="10000"),
        """Plain cannot have this `theta`.
  got  theta='10000'
  try  a number over 1""",
    ),
    "share": (
        lambda: Plain(share=0),
        """Plain cannot have this `share`.
  got  share=0
  try  a number over 0 and at most 1""",
    ),
    "original": (
        lambda: DynamicNTK(2048.0),
        """DynamicNTK cannot have this `original`.
  got  original=2048.0
  try  an integer of 2 or more, in tokens""",
    ),
    "turns": (
        lambda: YaRN(8, original=512, fast=1),
        """YaRN cannot have this `fast`.
  got  fast=1
  try  a number over `slow`, which is 1.0""",
    ),
    "slow": (
        lambda: NTKByParts(8, original=512, slow=0),
        """NTKByParts cannot have this `slow`.
  got  slow=0
  try  a number over 0""",
    ),
    "ramp": (
        lambda: YaRN(8, original=512, ramp="paper"),
        """YaRN cannot have this `ramp`.
  got  ramp='paper'
  try  "rounded" or "unrounded" or "turns\"""",
    ),
    "scale": (
        lambda: YaRN(8, original=512, mscale=-1),
        """YaRN cannot have this `mscale`.
  got  mscale=-1
  try  a number of 0 or more, or None""",
    ),
    "low": (
        lambda: Llama3(low=0),
        """Llama3 cannot have this `low`.
  got  low=0
  try  a number over 0""",
    ),
    "high": (
        lambda: Llama3(high=1),
        """Llama3 cannot have this `high`.
  got  high=1
  try  a number over `low`, which is 1.0""",
    ),
    "factors": (
        lambda: LongRoPE([1, 0], [1, 2], original=64, factor=2),
        """LongRoPE cannot have this `short`.
  got  short=[1, 0]
  try  a list of numbers over 0, one for each pair""",
    ),
    "no factors": (
        lambda: LongRoPE([1, 2], [], original=64, factor=2),
        """LongRoPE cannot have this `long`.
  got  long=[]
  try  a list of numbers over 0, one for each pair""",
    ),
    "scale of LongRoPE": (
        lambda: LongRoPE([1], [2], original=64, factor=2, attention_factor=math.inf),
        """LongRoPE cannot have this `attention_factor`.
  got  attention_factor=inf
  try  a number over 0, or None""",
    ),
    "scale of nothing": (
        lambda: YaRN(8, original=512, attention_factor=0),
        """YaRN cannot have this `attention_factor`.
  got  attention_factor=0
  try  a number over 0, or None""",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_field(case):
    build, text = REFUSALS[case]
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value) == text


WIDTH_REFUSALS = {
    "odd": (
        lambda: Plain().angles_per_token(5),
        """A head cannot be turned in pairs.
  head    5 numbers wide
  turned  5
  try     an even width of 2 or more, or another share of it""",
    ),
    "less than a pair": (
        lambda: Linear(2, share=0.2).angles_per_token(8),
        """A head cannot be turned in pairs.
  head    8 numbers wide
  turned  1
  try     an even width of 2 or more, or another share of it""",
    ),
    "one pair": (
        lambda: NTK(2, share=0.25).base(8),
        """NTK scaling needs heads with more than one pair of turned numbers.
  head  8 numbers wide, 2 of them turned
  try   linear scaling, which presses positions together""",
    ),
    "other number of pairs": (
        lambda: LongRoPE([1, 1], [1, 1], original=64, factor=2).angles_per_token(8),
        """LongRoPE needs as many factors as a head has pairs.
  head   8 numbers wide, 4 pairs
  short  2 factors
  try    4 factors""",
    ),
}


@pytest.mark.parametrize("case", WIDTH_REFUSALS)
def test_refused_width(case):
    ask, text = WIDTH_REFUSALS[case]
    with pytest.raises(ShapeError) as caught:
        ask()
    assert str(caught.value) == text
