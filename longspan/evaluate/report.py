"""The report: evaluations of several models on one text, as a value and as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longspan.evaluate.evaluation import Evaluation

SCHEMA = "longspan/evaluation/1"


@dataclass(frozen=True)
class Report:
    """Evaluations of several models by the same protocol on the same held-out text.

    Attributes:
        text: what the text is.
        documents: how many documents of it were held out.
        evaluations: one per model, in the order to show.
        pattern: what the models attended by, None if by their own dense attention.
    """

    text: str
    documents: int
    evaluations: tuple[Evaluation, ...]
    pattern: str | None = None

    def json(self) -> dict[str, Any]:
        """Return the report as plain values.

        The keys of schema `longspan/evaluation/1`:

        - `schema`, `versions` (of longspan, python, torch, transformers), `text`: `{source, documents}`.
        - `protocol`: `{lengths, stride, segments, predicted_tokens, crossing_documents, depths, trials, seed,
          pattern}`.
        - `models`: a list of `{label, source, context, parameters, tokens, seconds, perplexity, bits_per_byte,
          loss, passkey}`. The last four have a key for each length, as a string; under `passkey` are the share
          over all depths, `share`, and a list with the share at each depth, `by_depth`.

        A figure that is not finite is null.
        """
        first = self.evaluations[0]
        return {
            "schema": SCHEMA,
            "versions": _versions(),
            "text": {"source": self.text, "documents": self.documents},
            "protocol": {
                "lengths": list(first.perplexity.lengths),
                "stride": first.perplexity.stride,
                "segments": first.perplexity.segments,
                "predicted_tokens": first.perplexity.tokens,
                "crossing_documents": first.perplexity.crossing,
                "depths": list(first.passkey.depths),
                "trials": first.passkey.trials,
                "seed": first.passkey.seed,
                "pattern": self.pattern,
            },
            "models": [_model(evaluation) for evaluation in self.evaluations],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _model(evaluation: Evaluation) -> dict[str, Any]:
    perplexity, passkey = evaluation.perplexity, evaluation.passkey
    return {
        "label": evaluation.label,
        "source": evaluation.source,
        "context": evaluation.context,
        "parameters": evaluation.parameters,
        "tokens": evaluation.tokens,
        "seconds": round(evaluation.seconds, 1),
        "perplexity": _by_length(perplexity.lengths, perplexity.values),
        "bits_per_byte": _by_length(perplexity.lengths, perplexity.bits_per_byte),
        "loss": _by_length(perplexity.lengths, perplexity.losses),
        "passkey": {
            str(length): {"share": share, "by_depth": list(by_depth)}
            for length, share, by_depth in zip(
                passkey.lengths, passkey.by_length, passkey.shares, strict=True
            )
        },
    }


def _by_length(lengths: Sequence[int], figures: Sequence[float]) -> dict[str, float | None]:
    return {
        str(length): round(figure, 6) if math.isfinite(figure) else None
        for length, figure in zip(lengths, figures, strict=True)
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("longspan", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
