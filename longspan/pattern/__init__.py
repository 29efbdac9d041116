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
from longspan.pattern.bigbird import BigBird
from longspan.pattern.choice import Chosen, Random
from longspan.pattern.expression import parse
from longspan.pattern.headwise import S2, LongNet
from longspan.pattern.listing import Documents, Keys
from longspan.pattern.named import Longformer, SlidingWindow, Streaming
from longspan.pattern.neighborhood import Neighborhood
from longspan.pattern.progression import Bracket, Progression
from longspan.pattern.selection import top_blocks
from longspan.pattern.shifted import SCCA, SDA, LongMixed
from longspan.pattern.simplify import simplify
from longspan.pattern.sparse import Fixed, Strided

__all__ = [
    "S2",
    "SCCA",
    "SDA",
    "BigBird",
    "Bracket",
    "Causal",
    "Chosen",
    "Chunk",
    "Complement",
    "Dilated",
    "Documents",
    "Every",
    "Everything",
    "Fixed",
    "Intersection",
    "Keys",
    "LongMixed",
    "LongNet",
    "Longformer",
    "Neighborhood",
    "Nothing",
    "Pattern",
    "PerHead",
    "Prefix",
    "Progression",
    "Random",
    "Sink",
    "SlidingWindow",
    "Streaming",
    "Strided",
    "Sum",
    "Transpose",
    "Union",
    "Window",
    "parse",
    "simplify",
    "top_blocks",
]
