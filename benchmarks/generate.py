"""Measure decoding: time for a token and memory as a text grows, by pattern and beside transformers' own caches.

Caches of constant size write the whole text, greedily and one token at a time, in turns of a few tokens each, so that
whatever else a machine does slows all of them down. Caches that hold everything take time that grows with the square of
the text, so they read it in chunks and write only the last tokens before each length that is looked at, in turns too.
Milliseconds per token are those of the processor where it does the work, the median of the turns before a length; the
ratio is that to transformers' cache with as many keys, the median over pairs of turns.

    python benchmarks/generate.py --json docs/generate.json
    python benchmarks/generate.py --tokens 4096 --window 1024 --cases window,transformers-sliding
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from listing import aligned, processor, save
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from longspan import Causal, SlidingWindow, Streaming
from longspan.errors import LongspanError
from longspan.hf import load_model, set_pattern
from longspan.hf.cache import PatternCache, pool_for
from longspan.hf.stream import StreamCache

# Transformers' cache that holds as many keys, for every case; its own have themselves.
_PEERS = {
    "dense": "transformers-dense",
    "window": "transformers-sliding",
    "sinks": "transformers-sliding",
    "window-int8": "transformers-sliding",
    "window-pages": "transformers-sliding",
    "transformers-dense": "transformers-dense",
    "transformers-sliding": "transformers-sliding",
}
_CASES = tuple(name for name in _PEERS if name != "window-pages")
_SINKS = 4
# Tokens of a turn, and of a chunk that is read at once.
_TURN, _CHUNK = 16, 512
_STATM = Path("/proc/self/statm")
_PAGE = 4096


@dataclass
class Case:
    """A cache that a text is written with.

    Attributes:
        seconds: of every turn, for one token.
        found: what is said of it at every length.
    """

    name: str
    model: Any
    cache: Any
    token: torch.Tensor
    seconds: list[float] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)

    def read(self, tokens: int) -> None:
        """Read more of the text, at once and unmeasured."""
        for begin in range(0, tokens, _CHUNK):
            ids = torch.arange(begin, min(begin + _CHUNK, tokens), device=self.token.device)
            self.model((ids * 7919 % 97)[None], past_key_values=self.cache)

    def write(self, tokens: int) -> None:
        """Write tokens one after the other, and note the time."""
        begin = _now(self.token.device)
        for _ in range(tokens):
            # Positions are the cache's own count, so a sliding layer that lets keys go still counts them.
            self.token = self.model(self.token, past_key_values=self.cache).logits[:, -1:].argmax(-1)
        self.seconds.append((_now(self.token.device) - begin) / tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured.")
    if options.window <= _SINKS or options.tokens < 32:
        sys.exit(f"A window is longer than {_SINKS} tokens, and a text has 32 tokens or more.")
    if unknown := set(options.cases) - set(_PEERS):
        sys.exit(f"There is no case {', '.join(sorted(unknown))}; there are {', '.join(_PEERS)}.")
    try:
        model, _ = load_model(options.model, dtype=getattr(torch, options.dtype), device=options.device)
    except LongspanError as error:
        sys.exit(str(error))
    rows = []
    for growing in (False, True):
        names = [name for name in options.cases if name.endswith("dense") == growing]
        if names:
            rows += _measure(model, names, growing, options)
    report = _report(rows, options)
    print(_table(report))
    save(report, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hugging Face id (default: the default model)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--tokens", type=int, default=32_768, metavar="N", help="tokens of the text (default: 32768)"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=512,
        metavar="N",
        help="keys that windows read, sinks included (default: 512)",
    )
    parser.add_argument(
        "--cases",
        type=lambda text: text.split(","),
        default=_CASES,
        metavar="NAMES",
        help=f"what to measure (default: {','.join(_CASES)}; window-pages too)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    return parser.parse_args(arguments)


def _case(name: str, base: Any, options: argparse.Namespace, stack: ExitStack) -> Case:
    """Return a case with a model of its own, whose weights are those of all."""
    model = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    token, window = torch.full((1, 1), 65, device=base.device), options.window
    cache: Any
    if name.startswith("transformers"):
        cache = DynamicCache(config=model.config)
        if name.endswith("sliding"):
            cache.layers = [DynamicSlidingWindowLayer(sliding_window=window) for _ in cache.layers]
        return Case(name, model, cache, token)
    patterns = {"dense": Causal(), "sinks": Streaming(window - _SINKS, sinks=_SINKS)}
    set_pattern(model, patterns.get(name, SlidingWindow(window)))
    if name == "sinks":
        return Case(name, model, stack.enter_context(StreamCache(model)), token)
    pool = pool_for(model, tokens=window + 128) if name == "window-pages" else None
    return Case(name, model, PatternCache(model, storage="int8" if name == "window-int8" else pool), token)


def _measure(
    model: Any, names: list[str], growing: bool, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Write one text with each of some caches, and say what each took at every length."""
    with torch.inference_mode(), ExitStack() as stack:
        cases = {name: _case(name, model, options, stack) for name in names}
        done, sample = 0, options.tokens // 32
        for at in _lengths(options.tokens):
            if growing:
                sample = min(sample, 4 * _TURN)
                for case in cases.values():
                    case.read(at - sample - done)
                done = at - sample
            while done < at:
                tokens = min(_TURN, at - done)
                for case in cases.values():
                    case.write(tokens)
                done += tokens
            for case in cases.values():
                case.found.append(_found(case, cases.get(_PEERS[case.name]), at, -(-sample // _TURN)))
            print(f"{', '.join(names)}: {at:,} tokens", file=sys.stderr)
    return [
        {
            "name": case.name,
            "written": "the last tokens" if growing else "all tokens",
            "lengths": case.found,
            "tokens_per_second": 1 / statistics.mean(case.seconds),
            "last_to_first": case.found[-1]["seconds_per_token"] / case.found[0]["seconds_per_token"],
        }
        for case in cases.values()
    ]


def _lengths(tokens: int) -> list[int]:
    """Return the lengths that are looked at: 1,024, 8,192, 16,384 and 32,768 of 32,768."""
    return [tokens // 32, tokens // 4, tokens // 2, tokens]


def _found(case: Case, peer: Case | None, at: int, turns: int) -> dict[str, Any]:
    device = case.token.device
    mine = case.seconds[-turns:]
    ratios = [] if peer is None else [a / b for a, b in zip(mine, peer.seconds[-turns:], strict=True)]
    return {
        "tokens": at,
        "seconds_per_token": statistics.median(mine),
        "of_transformers": statistics.median(ratios) if ratios else None,
        "cache_bytes": _bytes(case.cache),
        "memory_bytes": _memory(device),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _bytes(cache: Any) -> int:
    if isinstance(cache, PatternCache):
        return cache.nbytes
    sides = (side for layer in cache.layers for side in (layer.keys, layer.values))
    return sum(side.numel() * side.element_size() for side in sides)


def _memory(device: torch.device) -> int:
    """Return bytes in use by the process, all caches together, on CUDA by tensors there; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return int(_STATM.read_text().split()[1]) * _PAGE if _STATM.exists() else 0


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else processor()
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": options.device,
        "dtype": options.dtype,
        "model": options.model or "default",
        "tokens": options.tokens,
        "window": options.window,
        "rows": rows,
    }


def _table(report: dict[str, Any]) -> str:
    lengths = _lengths(report["tokens"])
    lines = [
        (
            "",
            "tokens/s",
            *(f"ms at {at:,}" for at in lengths),
            "last / first",
            "of transformers",
            "cache",
            "process",
        )
    ]
    for row in report["rows"]:
        shares = [found["of_transformers"] for found in row["lengths"]]
        cell = "" if None in shares else f"{min(shares):.2f} to {max(shares):.2f}"
        lines.append(
            (
                row["name"],
                f"{row['tokens_per_second']:,.0f}",
                *(f"{1000 * found['seconds_per_token']:.2f}" for found in row["lengths"]),
                f"{row['last_to_first']:.2f}",
                cell,
                f"{row['lengths'][-1]['cache_bytes'] / 1e6:,.2f} MB",
                f"{row['lengths'][0]['memory_bytes'] / 1e6:,.0f} to {row['lengths'][-1]['memory_bytes'] / 1e6:,.0f} MB",
            )
        )
    described = (
        f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, "
        f"a text of {report['tokens']:,} tokens, windows of {report['window']:,}"
    )
    note = (
        "dense caches read the text in chunks and write the last tokens before each length; the others write all of it; "
        "process is all caches of a kind together"
    )
    return "\n".join([described, note, "", *aligned(lines)])


if __name__ == "__main__":
    main()
