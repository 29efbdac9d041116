"""Longspan: a pattern says which keys each query may read, and how often. Everything else follows."""

from longspan.attend import attend, attend_with_lse
from longspan.kernel.plan import plan
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
)

__all__ = [
    "S2",
    "SCCA",
    "SDA",
    "Causal",
    "Chunk",
    "Dilated",
    "Every",
    "LongMixed",
    "LongNet",
    "Longformer",
    "PerHead",
    "Prefix",
    "Sink",
    "SlidingWindow",
    "Streaming",
    "Window",
    "attend",
    "attend_with_lse",
    "plan",
]
