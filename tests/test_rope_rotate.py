"""Turning queries and keys: equal to transformers in float32, a function of distance, exact gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

from longspan.errors import InputError, ShapeError
from longspan.frequency import NTK, DynamicNTK, Linear, Llama3, LongRoPE, NTKByParts, Plain, YaRN
from longspan.rope import rotate, rotation, shift

LENGTHS = [1, 2, 31, 97, 129]
STILL = [Plain(), Linear(3), NTK(4), NTKByParts(4, original=64), YaRN(8, original=64), Llama3(original=64)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles_of(frequency, positions, width, length=None):
    """Angles and scale as transformers computes cosines from them."""
    return positions[..., None].float() * frequency.angles_per_token(width, length), frequency.scale()


def shapes(length):
    return random(2, 6, length, 16), random(2, 3, length, 16, seed=1)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("frequency", STILL, ids=lambda frequency: type(frequency).__name__)
@pytest.mark.parametrize("rows", ["shared", "apart"])
def test_halves_are_those_of_transformers(length, frequency, rows):
    query, key = shapes(length)
    positions = (
        torch.arange(length) if rows == "shared" else torch.arange(length) + torch.tensor([[0], [900]])
    )
    angles, scale = angles_of(frequency, positions, 16)
    doubled = torch.cat([angles, angles], dim=-1).expand(2, length, 16)
    wanted = halves(query, key, doubled.cos() * scale, doubled.sin() * scale)
    got = rotate(query, key, positions, frequency)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_module_of_transformers_gives_the_same():
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=parameters
    )
    query, key = shapes(129)
    positions = torch.arange(129) + torch.tensor([[0], [300]])
    wanted = halves(query, key, *LlamaRotaryEmbedding(config)(query, positions))
    got = rotate(query, key, positions, YaRN(8.0, original=64))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(
    "frequency", [DynamicNTK(64, 2.0), LongRoPE([1] * 8, [5] * 8, original=64, factor=4)]
)
@pytest.mark.parametrize("length", [63, 64, 65, 129])
def test_the_length_is_that_of_the_positions_unless_told(frequency, length):
    query, key = shapes(length)
    positions = torch.arange(length)
    got = rotate(query, key, positions, frequency)
    told = rotate(query, key, positions, frequency, length=length)
    other = rotate(query, key, positions, frequency, length=1000 if length <= 64 else 10)
    assert torch.equal(got[0], told[0]) and not torch.equal(got[0], other[0])
    angles, scale = angles_of(frequency, positions, 16, length)
    doubled = torch.cat([angles, angles], dim=-1)[None]
    assert torch.equal(got[1], halves(query, key, doubled.cos() * scale, doubled.sin() * scale)[1])


@pytest.mark.parametrize("length", LENGTHS)
def test_interleaved_is_that_of_gptj(length):
    query, key = shapes(length)
    angles, _ = angles_of(Plain(), torch.arange(length), 16)
    # GPT-J keeps heads behind the length.
    wanted = [gptj(side.transpose(1, 2), angles.sin()[None], angles.cos()[None]) for side in (query, key)]
    got = rotate(query, key, torch.arange(length), Plain(), pairs="interleaved")
    assert all(torch.equal(one, other.transpose(1, 2)) for one, other in zip(got, wanted, strict=True))


def test_interleaved_is_halves_of_reordered_heads():
    query, key = shapes(31)
    order = torch.arange(16).view(8, 2).T.flatten()
    got = rotate(query, key, torch.arange(31), Plain(), pairs="interleaved")
    wanted = rotate(query[..., order], key[..., order], torch.arange(31), Plain())
    assert torch.equal(got[0][..., order], wanted[0]) and torch.equal(got[1][..., order], wanted[1])


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_the_head_is_that_of_neox_and_glm(share):
    query, key = shapes(31)
    frequency = Plain(share=share)
    angles, _ = angles_of(frequency, torch.arange(31), 16)
    doubled = torch.cat([angles, angles], dim=-1)[None]
    wanted = neox(query, key, doubled.cos(), doubled.sin())
    got = rotate(query, key, torch.arange(31), frequency)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    # GLM pairs neighbours and takes its cosines in halves.
    wanted = glm(query, key, doubled.cos(), doubled.sin())
    got = rotate(query, key, torch.arange(31), frequency, pairs="interleaved")
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    turned = int(16 * share)
    assert torch.equal(got[0][..., turned:], query[..., turned:])


@given(
    positions=st.lists(st.integers(0, 4000), min_size=2, max_size=9),
    move=st.integers(0, 4000),
    pairs=st.sampled_from(["halves", "interleaved"]),
    frequency=st.sampled_from([*STILL, Plain(share=0.5)]),
)
def test_scores_depend_on_distance_alone(positions, move, pairs, frequency):
    positions = torch.tensor(positions)
    query, key = (side[:, :3, : len(positions)].double() for side in shapes(9))
    options = {"pairs": pairs, "angles": torch.float64}
    here = rotate(query, key, positions, frequency, **options)
    there = rotate(query, key, positions + move, frequency, **options)
    scores = [one @ other.mT for one, other in (here, there)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-9)
    own = torch.diagonal(scores[0], dim1=-2, dim2=-1)
    unturned = slice(frequency.rotated(16), None)
    expected = (query * key)[..., : unturned.start].sum(-1) * frequency.scale() ** 2
    torch.testing.assert_close(own, expected + (query * key)[..., unturned].sum(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_gradients_are_exact(pairs):
    query, key = (side[:, :2, :3, :6].double().requires_grad_() for side in shapes(5))
    positions = torch.tensor([[3, 4, 5], [0, 0, 1]])
    frequency = YaRN(8, original=64, share=0.7)

    def turned(query, key):
        return rotate(query, key, positions, frequency, pairs=pairs)

    assert torch.autograd.gradcheck(turned, (query, key))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("surroundings", ["plain", "autocast"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_low_precision_is_rounded_once(dtype, surroundings, share):
    frequency = YaRN(8, original=64, share=share)
    query, key = (side.to(dtype) for side in shapes(31))
    # Positions that bfloat16 cannot tell apart.
    positions = torch.arange(100_000, 100_031)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=surroundings == "autocast"):
        got = rotate(query, key, positions, frequency)
    wanted = rotate(query.float(), key.float(), positions, frequency)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


def test_float64_angles_are_right_at_a_million_and_float32_angles_are_not():
    positions = torch.tensor([1_000_003])
    query = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    query[..., 0] = 1
    exact, rounded = (
        rotate(query, query, positions, Plain(theta=100.0), angles=angles)[0][0, 0, 0, 0].item()
        for angles in (torch.float64, torch.float32)
    )
    assert exact == pytest.approx(math.cos(1_000_003), abs=1e-12)
    query = torch.eye(8, dtype=torch.float64)[1].view(1, 1, 1, 8)
    angle = 1_000_003 * Plain(theta=100.0).angles_per_token(8)[1].item()
    exact, rounded = (
        rotate(query, query, positions, Plain(theta=100.0), angles=angles)[0][0, 0, 0, 1].item()
        for angles in (torch.float64, torch.float32)
    )
    assert exact == pytest.approx(math.cos(angle), abs=1e-9)
    assert abs(rounded - exact) > 1e-4


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("frequency", STILL, ids=lambda frequency: type(frequency).__name__)
def test_unturn_is_the_inverse_of_turn(pairs, frequency):
    query, _ = shapes(97)
    found = rotation(torch.arange(97) + 4000, frequency, width=16, pairs=pairs)
    torch.testing.assert_close(found.unturn(found.turn(query)), query, rtol=0, atol=4e-6)


@given(
    position=st.integers(0, 100_000),
    target=st.integers(0, 100_000),
    pairs=st.sampled_from(["halves", "interleaved"]),
    frequency=st.sampled_from([*STILL, Plain(share=0.5)]),
)
def test_a_shift_is_turning_at_the_new_position_within_its_bound(position, target, pairs, frequency):
    key = shapes(3)[1]
    steps = torch.arange(3)
    here = rotation(steps + position, frequency, width=16, pairs=pairs).turn(key)
    there = rotation(steps + target, frequency, width=16, pairs=pairs).turn(key)
    moved = shift(here, target - position, frequency, pairs=pairs)
    # Of the angles, and a few roundings of the products.
    bound = (position + abs(target - position) + target + 20) * 2**-24 * frequency.scale()
    size = key.abs().max().item() * math.sqrt(2)
    assert (moved - there).abs().max().item() <= bound * size
    rows = (target - position) + torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(shift(here, rows, frequency, pairs=pairs), moved)


def test_a_shift_takes_the_scale_once_and_passes_gradients():
    frequency = YaRN(8, original=64)
    key = shapes(4)[1].double().requires_grad_()
    turned = rotation(torch.arange(4), frequency, width=16, angles=torch.float64).turn(key)
    moved = shift(turned, 7, frequency, angles=torch.float64)
    wanted = rotation(torch.arange(7, 11), frequency, width=16, angles=torch.float64).turn(key)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(side.sin().sum(), key, retain_graph=True)[0] for side in (moved, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_nothing_to_turn():
    empty = torch.zeros(2, 3, 0, 16)
    for frequency in (Plain(), DynamicNTK(64)):
        got = rotate(empty, empty, torch.arange(0), frequency)
        assert got[0].shape == empty.shape


def test_a_varying_frequency_shifts_with_its_length():
    frequency = DynamicNTK(64)
    key = shapes(5)[1]
    here = rotation(torch.arange(5), frequency, width=16, length=128).turn(key)
    there = rotation(torch.arange(5) + 9, frequency, width=16, length=128).turn(key)
    torch.testing.assert_close(shift(here, 9, frequency, length=128), there, rtol=0, atol=1e-5)


def test_on_every_device_the_same_angles(device):
    query, key = (side.to(device) for side in shapes(31))
    got = rotate(query, key, torch.arange(31, device=device), YaRN(8, original=64))
    wanted = rotate(query.cpu(), key.cpu(), torch.arange(31), YaRN(8, original=64))
    torch.testing.assert_close(got[0].cpu(), wanted[0], rtol=0, atol=1e-5)


ONES = torch.ones(2, 3, 5, 16)
REFUSALS = {
    "pairs": (
        InputError,
        lambda: rotate(ONES, ONES, torch.arange(5), Plain(), pairs="neighbours"),
        """There is no such way to pair the numbers of a head.
  got  pairs='neighbours'
  try  "halves" for transformers' checkpoints, or "interleaved" for GPT-J's and Meta's own""",
    ),
    "angles": (
        InputError,
        lambda: rotate(ONES, ONES, torch.arange(5), Plain(), angles=torch.bfloat16),
        """Angles need more digits than this dtype has.
  got  angles=torch.bfloat16
  why  bfloat16 cannot tell positions over 256 apart
  try  torch.float32, or torch.float64 for a million tokens and more""",
    ),
    "positions": (
        ShapeError,
        lambda: rotate(ONES, ONES, torch.arange(5.0), Plain()),
        """Positions are integers, one row for all or one row for each of the batch.
  got  [5] float32
  try  torch.arange(length), or integers [batch, length]""",
    ),
    "length": (
        ShapeError,
        lambda: rotate(ONES, ONES, torch.arange(4), Plain()),
        """This tensor does not fit the positions that it is to be turned to.
  tensor     [2, 3, 5, 16] float32, cpu
  positions  4, heads 16 wide, cpu
  try        [batch, heads, length, width] in floating point, on the device of the positions""",
    ),
    "batch": (
        ShapeError,
        lambda: rotate(ONES, ONES, torch.zeros(3, 5, dtype=torch.long), Plain()),
        """This tensor does not fit the positions that it is to be turned to.
  tensor     [2, 3, 5, 16] float32, cpu
  positions  3 rows of 5, heads 16 wide, cpu
  try        [batch, heads, length, width] in floating point, on the device of the positions""",
    ),
    "width": (
        ShapeError,
        lambda: rotate(ONES, ONES[..., :8], torch.arange(5), Plain()),
        """Query and key have one width.
  query  [2, 3, 5, 16]
  key    [2, 3, 5, 8]
  try    a key made for this query""",
    ),
    "positions in a list": (
        ShapeError,
        lambda: rotate(ONES, ONES, [0, 1, 2, 3, 4], Plain()),
        """Positions are integers, one row for all or one row for each of the batch.
  got  a list
  try  torch.arange(length), or integers [batch, length]""",
    ),
    "dimensions": (
        ShapeError,
        lambda: shift(ONES[0], 3, Plain()),
        """Queries and keys have four dimensions: batch, heads, length and width.
  got  [3, 5, 16]
  try  tensor.unsqueeze(0) for a batch of one""",
    ),
    "another head": (
        ShapeError,
        lambda: rotation(torch.arange(5), Plain(share=0.5), width=8).turn(ONES),
        """This tensor does not fit the positions that it is to be turned to.
  tensor     [2, 3, 5, 16] float32, cpu
  positions  5, heads 8 wide, cpu
  try        [batch, heads, length, width] in floating point, on the device of the positions""",
    ),
    "integers": (
        ShapeError,
        lambda: rotate(ONES.long(), ONES, torch.arange(5), Plain()),
        """This tensor does not fit the positions that it is to be turned to.
  tensor     [2, 3, 5, 16] int64, cpu
  positions  5, heads 16 wide, cpu
  try        [batch, heads, length, width] in floating point, on the device of the positions""",
    ),
    "stale": (
        InputError,
        lambda: shift(ONES, 3, DynamicNTK(64)),
        """Keys cannot be moved without the length that they were turned with.
  frequency  DynamicNTK
  why        its angles change with the length of the text
  try        length=..., or hold keys as they are before turning and turn them at every step""",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    kind, ask, text = REFUSALS[case]
    with pytest.raises(kind) as caught:
        ask()
    assert str(caught.value) == text
