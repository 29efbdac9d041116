"""Harness: models that read by a pattern, in EleutherAI's lm-eval, for RULER, LongBench and all its other tasks.

lm-eval finds models by names that are registered when it runs, so it is started from here, with its own options:

    pip install "lm_eval[hf,ruler,longbench]"
    python -m longspan.evaluate.harness --model longspan --tasks ruler \
        --model_args pretrained=out/longer,max_length=8448 --metadata '{"max_seq_lengths": [4096, 8192]}'
    python -m longspan.evaluate.harness --model longspan --tasks longbench \
        --model_args '{"pretrained": "out/longer", "pattern": "Streaming(1020, sinks=4)"}'

Arguments of the model: `pretrained`, a folder or Hugging Face id; `pattern`, an expression, without which the model
reads densely; `dtype`, float32 by default; `device` and `batch_size`, by lm-eval's options of these names; and whatever
lm-eval's own `hf` model takes for a model that is loaded already, such as `max_length`. A pattern with commas needs
the arguments as JSON, as in the second example. RULER looks for its tokenizer by the same name, so that it needs a
folder or id, not "default"; it fetches its essays and questions from the network, LongBench all of its data. RULER does
not count the words with which it opens an answer: without a `max_length` above the longest length by more than those,
lm-eval cuts off the beginning of prompts.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from longspan.errors import InputError, LongspanError, message
from longspan.hf.attention import set_pattern
from longspan.hf.device import device as device_named
from longspan.hf.model import load_model
from longspan.hf.precision import DTYPES, named_dtype
from longspan.pattern.expression import parse

NAME = "longspan"
# What lm-eval's command line says where nobody named a device; its own models then take what is there.
_UNSAID = ("cuda", "cuda:0")
_DTYPES = (*DTYPES, "float64")


def register() -> type:
    """Register the model with lm-eval under the name "longspan" and return its class, the same one every time.

    The class is lm-eval's `hf` model around a model that `longspan.hf.load_model` has loaded and
    `longspan.hf.set_pattern` has set a pattern on.

    Raises:
        InputError: lm-eval is not installed.
    """
    try:
        registry = import_module("lm_eval.api.registry")
        # Names of lm-eval's own models are registered by this.
        import_module("lm_eval.models")
        base: Any = import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise InputError(
            message(
                "lm-eval is not installed.",
                {"asked": "its tasks, such as RULER and LongBench", "because": str(error)},
                fix='pip install "lm_eval[hf,ruler,longbench]"',
            )
        ) from error
    if NAME in registry.model_registry:
        return registry.get_model(NAME)

    @registry.register_model(NAME)
    class LongspanLM(base):
        """A model of transformers that reads by a pattern, for lm-eval."""

        def __init__(
            self,
            pretrained: str = "default",
            *,
            pattern: str | None = None,
            device: str | None = None,
            dtype: str = "float32",
            **options: Any,
        ) -> None:
            kind = named_dtype(dtype, _DTYPES)
            read = None if pattern is None else parse(pattern)
            place = device_named(None if device in _UNSAID else device)
            model, tokenizer = load_model(pretrained, dtype=kind, device=place)
            if read is not None:
                set_pattern(model, read)
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    return LongspanLM


def main() -> None:
    """Run lm-eval's command line with the model registered; bad input leaves with its message and code 2."""
    try:
        register()
        import_module("lm_eval.__main__").cli_evaluate()
    except LongspanError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
