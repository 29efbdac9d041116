"""Longspan: a pattern says which keys each query may read, and how often. Everything else follows."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.attention import attend, attend_with_lse
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

# What is no pattern, and where it is defined.
_ELSEWHERE = {
    "attend": "longspan.attention",
    "attend_with_lse": "longspan.attention",
    "plan": "longspan.kernel.plan",
}


def __getattr__(name: str) -> object:
    """Load a name or a part when it is first used: torch takes seconds, which `longspan --help` need not wait for."""
    if name in __all__:
        # From now on it is found here and nobody asks again.
        globals()[name] = getattr(import_module(_ELSEWHERE.get(name, "longspan.pattern")), name)
        return globals()[name]
    if find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
