"""Speed and memory by context length: reading a prompt, writing after it, and what both take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longspan.evaluate.forward import Progress
from longspan.text.corpus import Corpus

RUNS = 3
# Tokens written after each prompt.
WRITTEN = 16
_LINUX = Path("/proc/self")


@dataclass(frozen=True)
class Speed:
    """How fast a model reads and writes at each length, and how much memory that takes.

    Attributes:
        lengths: tokens in the prompt.
        reading: seconds to read a prompt, the median of three runs after one to warm up.
        writing: seconds for each token written after it, the median.
        cache: bytes of keys and values kept after the prompt, exactly.
        peak: bytes in use at most, weights included: those of torch on CUDA, of the whole process on the CPU under
            Linux; None where the system does not tell.
        device: what it ran on.
        dtype: of the weights.
    """

    lengths: tuple[int, ...]
    reading: tuple[float, ...]
    writing: tuple[float, ...]
    cache: tuple[int, ...]
    peak: tuple[int | None, ...]
    device: str
    dtype: str

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """Tokens of a prompt read per second, at each length."""
        return tuple(length / seconds for length, seconds in zip(self.lengths, self.reading, strict=True))


def speed(model: Any, text: Corpus, *, lengths: Sequence[int], progress: Progress | None = None) -> Speed:
    """Time a model at several prompt lengths, a batch of one.

    Args:
        model: a causal language model of transformers.
        text: what is read; its content does not matter.
        lengths: tokens in the prompt.
        progress: called with the tokens read so far and the tokens in all.

    Raises:
        InputError: the text is shorter than the longest prompt.
    """
    lengths = tuple(sorted(set(lengths)))
    text.require(max(lengths), name="held-out text")
    device, training = model.device, model.training
    read, total = 0, sum(lengths) * (RUNS + 1)
    reading, writing, caches, peaks = [], [], [], []
    model.eval()
    try:
        for length in lengths:
            ids = torch.from_numpy(text.ids[:length][None]).to(device)
            forgotten = _forget_peak(device)
            seconds = []
            for run in range(RUNS + 1):
                # The keys and values of the last run are let go before those of the next are held.
                cache = None
                begun = _now(device)
                cache, token = _read(model, ids)
                if run:
                    seconds.append(_now(device) - begun)
                read += length
                if progress is not None:
                    progress(read, total)
            reading.append(median(seconds))
            caches.append(_bytes(cache))
            writing.append(_write(model, cache, token))
            peaks.append(_peak(device) if forgotten else None)
    finally:
        model.train(training)
    return Speed(
        lengths,
        tuple(reading),
        tuple(writing),
        tuple(caches),
        tuple(peaks),
        device=_named(device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _read(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Read a prompt; return the keys and values that are kept, and the likeliest next token."""
    with torch.no_grad():
        found = model(ids, use_cache=True, logits_to_keep=1)
    return found.past_key_values, found.logits[:, -1:].argmax(dim=-1)


def _write(model: Any, cache: Any, token: torch.Tensor) -> float:
    """Return the median seconds per token written after a prompt."""
    seconds = []
    for _ in range(WRITTEN):
        begun = _now(token.device)
        with torch.no_grad():
            found = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = found.logits[:, -1:].argmax(dim=-1)
        seconds.append(_now(token.device) - begun)
    return median(seconds)


def _bytes(cache: Any) -> int:
    """Count the bytes of all keys and values in a cache."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _now(device: torch.device) -> float:
    """Return the time once all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _forget_peak(device: torch.device) -> bool:
    """Let the peak of memory be counted from now on; say whether that can be done here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # By this Linux takes the memory in use now for the most that was ever in use.
        (_LINUX / "clear_refs").write_text("5")
    except OSError:
        return False
    return device.type == "cpu"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = (_LINUX / "status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
