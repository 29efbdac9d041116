"""Frequencies: how fast each pair of numbers in a head turns from token to token, and what longer contexts do to it."""

from longspan.frequency.base import Frequency, Plain
from longspan.frequency.factors import LongRoPE, factors
from longspan.frequency.interpolation import NTK, DynamicNTK, Linear
from longspan.frequency.parts import Llama3, NTKByParts, YaRN

__all__ = [
    "NTK",
    "DynamicNTK",
    "Frequency",
    "Linear",
    "Llama3",
    "LongRoPE",
    "NTKByParts",
    "Plain",
    "YaRN",
    "factors",
]
