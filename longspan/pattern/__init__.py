"""Which keys each query reads, and how often."""

from longspan.pattern.atoms import (
    Causal,
    Chunk,
    Dilated,
    Every,
    Everything,
    Nothing,
    Prefix,
    Sink,
    Window,
)
from longspan.pattern.base import Complement, Intersection, Pattern, PerHead, Sum, Transpose, Union
from longspan.pattern.expression import parse
from longspan.pattern.headwise import S2, SCCA, SDA, LongMixed, LongNet
from longspan.pattern.named import Longformer, SlidingWindow, Streaming
from longspan.pattern.progression import Bracket, Progression

__all__ = [
    "S2",
    "SCCA",
    "SDA",
    "Bracket",
    "Causal",
    "Chunk",
    "Complement",
    "Dilated",
    "Every",
    "Everything",
    "Intersection",
    "LongMixed",
    "LongNet",
    "Longformer",
    "Nothing",
    "Pattern",
    "PerHead",
    "Prefix",
    "Progression",
    "Sink",
    "SlidingWindow",
    "Streaming",
    "Sum",
    "Transpose",
    "Union",
    "Window",
    "parse",
]
