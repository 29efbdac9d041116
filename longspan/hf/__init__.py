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
from longspan.hf.config import extended, rope_parameters, write_config
from longspan.hf.model import load_config, load_model

__all__ = [
    "Causality",
    "Leak",
    "PatternCache",
    "check_causality",
    "extended",
    "load_config",
    "load_model",
    "reset",
    "rope_parameters",
    "set_pattern",
    "write_config",
]
