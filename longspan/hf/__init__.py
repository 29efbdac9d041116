"""Models: any transformers decoder with a pattern, its position scaling, and a test that it is causal."""

from __future__ import annotations

from longspan.errors import InputError, message

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise InputError(
        message(
            "Models are read through transformers, which is not installed.",
            {"asked": "longspan.hf"},
            fix='pip install "longspan[extend]"',
        )
    ) from error

from longspan.hf.attention import reset, set_pattern
from longspan.hf.cache import PatternCache
from longspan.hf.causality import Causality, Leak, check_causality
from longspan.hf.config import extended, rope_parameters, with_frequency, write_config
from longspan.hf.loader import share_batches
from longspan.hf.model import load_config, load_model
from longspan.hf.rope import from_config, to_config
from longspan.hf.sequence import Split, sequence_parallel
from longspan.hf.stream import StreamCache

__all__ = [
    "Causality",
    "Leak",
    "PatternCache",
    "Split",
    "StreamCache",
    "check_causality",
    "extended",
    "from_config",
    "load_config",
    "load_model",
    "reset",
    "rope_parameters",
    "sequence_parallel",
    "set_pattern",
    "share_batches",
    "to_config",
    "with_frequency",
    "write_config",
]
