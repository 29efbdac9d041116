"""The report: evaluations of several models on one text, as a value and as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.evaluate.evaluation import Evaluation, Protocol
from longspan.evaluate.passkey import Passkey
from longspan.evaluate.reading import Reading
from longspan.evaluate.task import THRESHOLD, Scores, means
from longspan.version import version

SCHEMA = "longspan/evaluation/1"


@dataclass(frozen=True)
class Report:
    """Evaluations of several models by the same protocol on the same held-out text.

    Attributes:
        text: what the text is.
        documents: how many documents of it were held out.
        evaluations: one per model, in the order to show.
        pattern: what the models attended by, None if by their own dense attention.
        protocol: what was measured; None where only the evaluations say.
        command: what to type to repeat it, None if it is not known.
        day: when it was measured, None if it is not known.
        readings: patterns to draw in reports.
    """

    text: str
    documents: int
    evaluations: tuple[Evaluation, ...]
    pattern: str | None = None
    protocol: Protocol | None = None
    command: str | None = None
    day: str | None = None
    readings: tuple[Reading, ...] = ()

    @property
    def versions(self) -> dict[str, str | None]:
        """Versions of Python and of the packages that the figures depend on, None for those not installed."""
        found = {package: version(package) for package in ("longspan", "torch", "transformers")}
        return {"python": platform.python_version()} | found

    def json(self) -> dict[str, Any]:
        """Return the report as plain values.

        The keys of schema `longspan/evaluation/1`:

        - `schema`, `versions` (of longspan, python, torch, transformers), `text`: `{source, documents}`.
        - `command`, where it is known.
        - `protocol`: `{lengths, pattern}`; with perplexity `{stride, segments, predicted_tokens,
          crossing_documents}`; with passkeys or tasks `{depths, trials, seed}`; with tasks `effective_threshold`.
        - `models`: a list of `{label, source, context, parameters, dtype, tokens, seconds}`, and of what was
          measured, each with a key for each length, as a string: `perplexity`, `bits_per_byte` and `loss`; `passkey` with
          the share over all depths, `share`, and a list with the share at each depth, `by_depth`; `tasks`, which
          has by the name of each task the same two (`by_depth` only where the task has depths); `tasks_mean`;
          `speed` with `{reading_seconds, writing_seconds, cache_bytes, peak_bytes}`, the second for each token. With tasks there is
          `effective_length` too, null if it is below all lengths; with speed `speed_on`: `{device, dtype}`.

        A figure that is not finite is null.
        """
        protocol: dict[str, Any] = {"lengths": list(self.evaluations[0].lengths), "pattern": self.pattern}
        perplexity, passkey = self.evaluations[0].perplexity, self.evaluations[0].passkey
        if perplexity is not None:
            protocol |= {
                "stride": perplexity.stride,
                "segments": perplexity.segments,
                "predicted_tokens": perplexity.tokens,
                "crossing_documents": perplexity.crossing,
            }
        if passkey is not None:
            protocol |= {"depths": list(passkey.depths), "trials": passkey.trials, "seed": passkey.seed}
        elif self.protocol is not None and self.evaluations[0].tasks:
            asked = self.protocol
            protocol |= {"depths": list(asked.depths), "trials": asked.trials, "seed": asked.seed}
        if self.evaluations[0].tasks:
            protocol["effective_threshold"] = THRESHOLD
        return {
            "schema": SCHEMA,
            "versions": self.versions,
            **({} if self.command is None else {"command": self.command}),
            "text": {"source": self.text, "documents": self.documents},
            "protocol": protocol,
            "models": [_model(evaluation) for evaluation in self.evaluations],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _model(evaluation: Evaluation) -> dict[str, Any]:
    perplexity, passkey, speed = evaluation.perplexity, evaluation.passkey, evaluation.speed
    found: dict[str, Any] = {
        "label": evaluation.label,
        "source": evaluation.source,
        "context": evaluation.context,
        "parameters": evaluation.parameters,
        "dtype": evaluation.dtype,
        "tokens": evaluation.tokens,
        "seconds": round(evaluation.seconds, 1),
    }
    if perplexity is not None:
        found["perplexity"] = _by_length(perplexity.lengths, perplexity.values)
        found["bits_per_byte"] = _by_length(perplexity.lengths, perplexity.bits_per_byte)
        found["loss"] = _by_length(perplexity.lengths, perplexity.losses)
    if passkey is not None:
        found["passkey"] = _shares(passkey)
    if evaluation.tasks:
        found["tasks"] = {scores.task: _shares(scores) for scores in evaluation.tasks}
        found["tasks_mean"] = _by_length(evaluation.lengths, means(evaluation.tasks))
        found["effective_length"] = evaluation.effective_length
    if speed is not None:
        columns = zip(speed.lengths, speed.reading, speed.writing, speed.cache, speed.peak, strict=True)
        found["speed"] = {
            str(length): {
                "reading_seconds": round(reading, 6),
                "writing_seconds": round(writing, 6),
                "cache_bytes": cache,
                "peak_bytes": peak,
            }
            for length, reading, writing, cache, peak in columns
        }
        found["speed_on"] = {"device": speed.device, "dtype": speed.dtype}
    return found


def _shares(found: Passkey | Scores) -> dict[str, dict[str, Any]]:
    """Return the share at each length, and at each depth of it where there are depths."""
    return {
        str(length): {"share": share} | ({"by_depth": list(by_depth)} if found.depths else {})
        for length, share, by_depth in zip(found.lengths, found.by_length, found.shares, strict=True)
    }


def _by_length(lengths: Sequence[int], figures: Sequence[float]) -> dict[str, float | None]:
    return {
        str(length): round(figure, 6) if math.isfinite(figure) else None
        for length, figure in zip(lengths, figures, strict=True)
    }
