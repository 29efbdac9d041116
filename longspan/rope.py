"""RoPE: queries and keys turned by angles that grow with their positions, so that scores depend on distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.errors import InputError, ShapeError, message
from longspan.frequency import Frequency

PAIRS = ("halves", "interleaved")


def rotate(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    frequency: Frequency,
    *,
    length: int | None = None,
    pairs: str = "halves",
    angles: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys at the same positions.

    Where several layers turn at the same positions, `rotation` computes the angles once for all.

    Law: the score of a turned query at `q` and a turned key at `k` is that of the unturned ones turned by `q - k`,
    times `frequency.scale() ** 2`.

    Args:
        query: `[batch, heads, length, width]`, floating point.
        key: `[batch, key heads, length, width]`.
        positions: integers `[length]`, or `[batch, length]` where rows differ (left padding, packed documents).
        frequency: how fast each pair turns.
        length: tokens of the text so far, for frequencies that vary; None takes the largest position and one.
        pairs: "halves" pairs number `d` with `d + D / 2` of the `D` turned ones (transformers, GPT-NeoX), and
            "interleaved" pairs neighbours (GPT-J, Meta's own Llama weights). A checkpoint fits one of them.
        angles: float32 computes angles as transformers does, which is off by up to 0.004 at 131,072 tokens and by
            0.03 at a million; float64 is exact enough for any length. Neither depends on autocast or the dtype of
            the tensors, and products are taken in float32 (float64 for float64) and rounded once.

    Returns:
        Query and key turned, of the same shapes and dtypes. Gradients flow to both.

    Raises:
        InputError: another name for pairs, or another dtype for angles.
        ShapeError: tensors that do not fit together, or a head that the frequency cannot turn.

    Example:
        >>> from longspan.frequency import Plain
        >>> query = key = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
        >>> query, key = rotate(query, key, torch.tensor([0, 1, 2]), Plain())
        >>> (query @ key.mT)[0, 0].acos().round(decimals=3)
        tensor([[0., 1., 2.],
                [1., 0., 1.],
                [2., 1., 0.]])

    References:
        Su et al., RoFormer (arXiv 2104.09864), section 3.2.
    """
    width = _width(query)
    if _width(key) != width:
        raise ShapeError(
            message(
                "Query and key have one width.",
                {"query": str(list(query.shape)), "key": str(list(key.shape))},
                fix="a key made for this query",
            )
        )
    found = rotation(positions, frequency, width=width, length=length, pairs=pairs, angles=angles)
    return found.turn(query), found.turn(key)


def rotation(
    positions: Tensor,
    frequency: Frequency,
    *,
    width: int,
    length: int | None = None,
    pairs: str = "halves",
    angles: torch.dtype = torch.float32,
) -> Rotation:
    """Return the angles of positions, to be used by every layer of a model and for queries and keys apart.

    Law: `rotate(query, key, ...)` is `turn(query), turn(key)` of this.

    Args:
        positions: integers `[length]` or `[batch, length]`, on the device of the tensors to be turned.
        width: numbers in a head.
        frequency, length, pairs, angles: see `rotate`.

    Raises:
        InputError, ShapeError: as `rotate`.

    Example:
        >>> from longspan.frequency import Linear
        >>> found = rotation(torch.arange(3), Linear(2), width=2)
        >>> found.turn(torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2))[0, 0]
        tensor([[1.0000, 0.0000],
                [0.8776, 0.4794],
                [0.5403, 0.8415]])
    """
    _check_positions(positions)
    if length is None and frequency.varies and positions.numel():
        length = int(positions.max()) + 1
    return _rotation(positions, frequency, frequency.scale(), width, length, pairs, angles)


def shift(
    key: Tensor,
    distance: Tensor | int,
    frequency: Frequency,
    *,
    length: int | None = None,
    pairs: str = "halves",
    angles: torch.dtype = torch.float32,
) -> Tensor:
    """Move keys that are turned already to other positions, as a cache does that counts positions within itself.

    Law: `shift(turned at p, d)` is `turned at p + d`, up to rounding: every angle is computed with a relative error
    of 2 ** -24, so values of size 1 differ by at most about `(p + abs(d) + abs(p + d)) * 2 ** -24`. Each shift adds
    its own error; a cache that shifts at every step does better to hold unturned keys.

    Args:
        key: turned keys `[batch, heads, length, width]`.
        distance: tokens to move by, negative towards the beginning: one number, or integers `[length]` or
            `[batch, length]`.
        frequency, pairs, angles: with which the keys were turned, see `rotate`.
        length: the length with which they were turned; frequencies that vary need it.

    Returns:
        The keys at their new positions, of the same shape and dtype. Gradients flow.

    Raises:
        InputError: as `rotate`, or a frequency that varies without the length.
        ShapeError: as `rotate`.

    Example:
        >>> from longspan.frequency import Plain
        >>> key = torch.ones(1, 1, 3, 8)
        >>> moved = shift(rotation(torch.arange(5, 8), Plain(), width=8).turn(key), -5, Plain())
        >>> torch.allclose(moved, rotation(torch.arange(3), Plain(), width=8).turn(key), atol=1e-6)
        True

    References:
        Xiao et al., StreamingLLM (arXiv 2309.17453), section 3.2, on positions within the cache.
    """
    if isinstance(distance, int):
        distance = torch.full((key.shape[-2],), distance, device=key.device)
    found = displacement(distance, frequency, width=_width(key), length=length, pairs=pairs, angles=angles)
    return found.turn(key)


def displacement(
    distance: Tensor,
    frequency: Frequency,
    *,
    width: int,
    length: int | None = None,
    pairs: str = "halves",
    angles: torch.dtype = torch.float32,
) -> Rotation:
    """Return the angles by which keys that are turned already move, to be used by every layer of a model.

    Law: `shift(key, distance, ...)` is `turn(key)` of this. A frequency's scale is in turned keys once, and not in
    this.

    Args:
        distance: tokens to move by, integers `[length]` or `[batch, length]`.
        width: numbers in a head.
        frequency, length, pairs, angles: see `shift`.

    Raises:
        InputError, ShapeError: as `shift`.

    Example:
        >>> from longspan.frequency import Plain
        >>> displacement(torch.tensor([0, -1]), Plain(), width=2).sin
        tensor([[ 0.0000],
                [-0.8415]])
    """
    if frequency.varies and length is None:
        raise InputError(
            message(
                "Keys cannot be moved without the length that they were turned with.",
                {
                    "frequency": type(frequency).__name__,
                    "why": "its angles change with the length of the text",
                },
                fix="length=..., or hold keys as they are before turning and turn them at every step",
            )
        )
    _check_positions(distance)
    return _rotation(distance, frequency, 1.0, width, length, pairs, angles)


@dataclass(frozen=True, eq=False)
class Rotation:
    """The angles of a row of positions, ready to turn tensors by; see `rotation`.

    Attributes:
        cos, sin: times `scale`, `[length, pairs]`, or `[batch, 1, length, pairs]` where rows differ.
        scale: what turned tensors are multiplied by.
        width: numbers in a head, turned or not.
        pairs: how numbers are paired, "halves" or "interleaved".
    """

    cos: Tensor
    sin: Tensor
    scale: float
    width: int
    pairs: str

    def turn(self, tensor: Tensor) -> Tensor:
        """Return queries or keys `[batch, heads, length, width]` turned to their positions.

        Raises:
            ShapeError: a tensor of another length, batch, width or device.
        """
        return self._turned(tensor, self.cos, self.sin)

    def unturn(self, tensor: Tensor) -> Tensor:
        """Return queries or keys as they were before `turn`, up to rounding.

        Raises:
            ShapeError: a tensor of another length, batch, width or device.
        """
        # Sine and cosine carry the scale once, which has to be divided away twice.
        square = self.scale**2
        return self._turned(tensor, self.cos / square, -self.sin / square)

    def _turned(self, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        self._check(tensor)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        rotated = 2 * cos.shape[-1]
        # Autocast would join the parts in a dtype of its own choice.
        with torch.autocast(tensor.device.type, enabled=False):
            cos, sin = cos.to(dtype), sin.to(dtype)
            part = tensor[..., :rotated].to(dtype)
            first, second = _apart(part, self.pairs)
            turned = _together(first * cos - second * sin, second * cos + first * sin, self.pairs)
            turned = turned.to(tensor.dtype)
            whole = rotated == tensor.shape[-1]
            return turned if whole else torch.cat([turned, tensor[..., rotated:]], dim=-1)

    def _check(self, tensor: Tensor) -> None:
        batch = self.cos.shape[0] if self.cos.dim() == 4 else None
        length, shape = self.cos.shape[-2], tensor.shape
        fits = tensor.dim() == 4 and shape[2:] == (length, self.width) and batch in (None, 1, shape[0])
        if fits and tensor.is_floating_point() and tensor.device == self.cos.device:
            return
        rows = "" if batch is None else f"{batch} rows of "
        found = f"{list(shape)} {str(tensor.dtype).removeprefix('torch.')}, {tensor.device}"
        raise ShapeError(
            message(
                "This tensor does not fit the positions that it is to be turned to.",
                {
                    "tensor": found,
                    "positions": f"{rows}{length}, heads {self.width} wide, {self.cos.device}",
                },
                fix="[batch, heads, length, width] in floating point, on the device of the positions",
            )
        )


def _apart(tensor: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """Return the first and the second number of each pair."""
    if pairs == "halves":
        return tensor.chunk(2, dim=-1)
    return tensor[..., ::2], tensor[..., 1::2]


def _together(first: Tensor, second: Tensor, pairs: str) -> Tensor:
    if pairs == "halves":
        return torch.cat([first, second], dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def _rotation(
    positions: Tensor,
    frequency: Frequency,
    scale: float,
    width: int,
    length: int | None,
    pairs: str,
    angles: torch.dtype,
) -> Rotation:
    if pairs not in PAIRS:
        raise InputError(
            message(
                "There is no such way to pair the numbers of a head.",
                {"got": f"pairs={pairs!r}"},
                fix='"halves" for transformers\' checkpoints, or "interleaved" for GPT-J\'s and Meta\'s own',
            )
        )
    if angles not in (torch.float32, torch.float64):
        raise InputError(
            message(
                "Angles need more digits than this dtype has.",
                {"got": f"angles={angles}", "why": "bfloat16 cannot tell positions over 256 apart"},
                fix="torch.float32, or torch.float64 for a million tokens and more",
            )
        )
    per_token = frequency.angles_per_token(width, length).to(positions.device)
    turns = positions[..., None].to(angles) * per_token.to(angles)
    if turns.dim() == 3:
        turns = turns[:, None]
    return Rotation(turns.cos() * scale, turns.sin() * scale, scale, width, pairs)


def _width(tensor: Tensor) -> int:
    if tensor.dim() != 4:
        raise ShapeError(
            message(
                "Queries and keys have four dimensions: batch, heads, length and width.",
                {"got": str(list(tensor.shape))},
                fix="tensor.unsqueeze(0) for a batch of one",
            )
        )
    return tensor.shape[-1]


def _check_positions(positions: Tensor) -> None:
    found = f"a {type(positions).__name__}"
    fits = False
    if isinstance(positions, Tensor):
        found = f"{list(positions.shape)} {str(positions.dtype).removeprefix('torch.')}"
        whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
        fits = whole and positions.dim() in (1, 2)
    if not fits:
        raise ShapeError(
            message(
                "Positions are integers, one row for all or one row for each of the batch.",
                {"got": found},
                fix="torch.arange(length), or integers [batch, length]",
            )
        )
