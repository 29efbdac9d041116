"""A corpus: documents as one run of token ids, from which windows are cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longspan.errors import InputError, message


@dataclass(frozen=True)
class Corpus:
    """Token ids of many documents, end to end, each closed by the separator where there is one.

    Attributes:
        ids: every token, int64 `[tokens]`.
        starts: where each document begins in `ids`, int64 `[documents]`.

    Example:
        >>> corpus = Corpus.from_ids([[5, 6, 7], [8, 9]], separator=0)
        >>> corpus.ids.tolist(), corpus.starts.tolist()
        ([5, 6, 7, 0, 8, 9, 0], [0, 4])
        >>> corpus.window(np.random.default_rng(0), 3).shape
        (3,)
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_ids(cls, documents: Iterable[Sequence[int] | np.ndarray], *, separator: int | None) -> Corpus:
        """Join documents that are already token ids, with the separator after each unless it is None."""
        closing = np.array([] if separator is None else [separator], dtype=np.int64)
        parts = [np.concatenate([np.asarray(document, dtype=np.int64), closing]) for document in documents]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]) if parts else ends
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        return cls(ids, starts)

    def __len__(self) -> int:
        return len(self.ids)

    def require(self, tokens: int, *, name: str) -> None:
        """Refuse a text that is too short for one window.

        Args:
            tokens: length of the longest window that will be cut.
            name: what to call the text.

        Raises:
            InputError: the corpus has fewer tokens.
        """
        if len(self) < tokens:
            raise InputError(
                message(
                    "There is too little text for one window.",
                    {
                        "asked": f"a window of {tokens:,} tokens of {name}",
                        "found": f"{len(self):,} tokens",
                    },
                    fix="a longer text, or a shorter length",
                )
            )

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Return `length` consecutive tokens from a random place."""
        start = int(rng.integers(0, len(self.ids) - length + 1))
        return self.ids[start : start + length]
