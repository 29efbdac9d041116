"""Measure decoding: tokens per second and memory as a text grows, by pattern and beside transformers' own caches.

Every case writes the same number of tokens, greedily and one at a time, and is looked at in equal parts: a cache of
constant size takes the same time for a token in the last part as in the second. Cases run one after the other, so
that memory in use is each one's own. Milliseconds per token are those of the processor where it does the work, which
what else a machine does changes less than tokens per second.

    python benchmarks/generate.py --json out/generate.json
    python benchmarks/generate.py --tokens 4096 --window 1024 --cases window,transformers-sliding
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from listing import aligned, processor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from longspan import Causal, SlidingWindow, Streaming
from longspan.errors import LongspanError
from longspan.hf import load_model, reset, set_pattern
from longspan.hf.cache import PatternCache
from longspan.hf.stream import StreamCache

_CASES = ("dense", "window", "window-int8", "sinks", "transformers-dense", "transformers-sliding")
_SINKS = 4
_STATM = Path("/proc/self/statm")
_PAGE = 4096


@dataclass
class Row:
    """What was measured of one case: seconds, on the clock and of the processor, and bytes at the end of every part."""

    name: str
    seconds: list[float] = field(default_factory=list)
    busy_seconds: list[float] = field(default_factory=list)
    cache_bytes: list[int] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured.")
    if options.window <= _SINKS or options.tokens < options.parts or options.parts < 2:
        sys.exit(
            f"A window is longer than {_SINKS} tokens, and there are two parts or more of a token or more."
        )
    if unknown := set(options.cases) - set(_CASES):
        sys.exit(f"There is no case {', '.join(sorted(unknown))}; there are {', '.join(_CASES)}.")
    try:
        model, _ = load_model(options.model, dtype=getattr(torch, options.dtype), device=options.device)
    except LongspanError as error:
        sys.exit(str(error))
    rows = []
    for name in options.cases:
        row = Row(name)
        _decode(model, row, options)
        rows.append(row)
        print(f"{name}: {options.tokens / sum(row.seconds):,.0f} tokens/s", file=sys.stderr)
    report = _report(rows, options)
    print(_table(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hugging Face id (default: the default model)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--tokens", type=int, default=32_768, metavar="N", help="tokens to write (default: 32768)"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=512,
        metavar="N",
        help="keys that windows read, sinks included (default: 512)",
    )
    parser.add_argument("--parts", type=int, default=8, metavar="N", help="parts that are timed (default: 8)")
    parser.add_argument(
        "--cases",
        type=lambda text: text.split(","),
        default=_CASES,
        metavar="NAMES",
        help=f"what to measure, in this order (default: {','.join(_CASES)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    return parser.parse_args(arguments)


def _cache(name: str, model: Any, window: int) -> Any:
    """Return the cache of a case, and set the model's patterns for it."""
    reset(model)
    if name.startswith("transformers"):
        cache = DynamicCache(config=model.config)
        if name.endswith("sliding"):
            layers = range(len(cache.layers))
            cache.layers = [DynamicSlidingWindowLayer(sliding_window=window) for _ in layers]
        return cache
    set_pattern(
        model,
        {
            "dense": Causal(),
            "window": SlidingWindow(window),
            "window-int8": SlidingWindow(window),
            "sinks": Streaming(window - _SINKS, sinks=_SINKS),
        }[name],
    )
    if name == "sinks":
        return StreamCache(model)
    return PatternCache(model, storage="int8" if name == "window-int8" else None)


def _decode(model: Any, row: Row, options: argparse.Namespace) -> None:
    """Write tokens one at a time, and note time and memory after every part."""
    device = torch.device(options.device)
    gc.collect()
    cache = _cache(row.name, model, options.window)
    token = torch.full((1, 1), 65, device=device)
    with torch.inference_mode(), cache if isinstance(cache, StreamCache) else nullcontext():
        done = 0
        for part in range(1, options.parts + 1):
            begin, busy = _now(device), time.process_time()
            while done < options.tokens * part // options.parts:
                # Positions are the cache's own count, so a sliding layer that lets keys go still counts them.
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                done += 1
            row.seconds.append(_now(device) - begin)
            row.busy_seconds.append(time.process_time() - busy)
            row.cache_bytes.append(_bytes(cache))
            row.memory_bytes.append(_memory(device))
    reset(model)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _bytes(cache: Any) -> int:
    if isinstance(cache, PatternCache):
        return cache.nbytes
    sides = (side for layer in cache.layers for side in (layer.keys, layer.values))
    return sum(side.numel() * side.element_size() for side in sides)


def _memory(device: torch.device) -> int:
    """Return bytes in use by the process, on CUDA by tensors there; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return int(_STATM.read_text().split()[1]) * _PAGE if _STATM.exists() else 0


def _report(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    sizes = [
        options.tokens * (part + 1) // options.parts - options.tokens * part // options.parts
        for part in range(options.parts)
    ]
    measured = []
    for row in rows:
        spent = row.seconds if options.device.startswith("cuda") else row.busy_seconds
        each = [seconds / size for seconds, size in zip(spent, sizes, strict=True)]
        measured.append(
            asdict(row)
            | {
                "tokens_per_second": options.tokens / sum(row.seconds),
                "seconds_per_token": each,
                # The first part warms up and fills the window.
                "last_to_second_part": each[-1] / each[1],
            }
        )
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
        "parts": sizes,
        "rows": measured,
    }


def _table(report: dict[str, Any]) -> str:
    lines = [("", "tokens/s", "ms/token, 2nd part", "last part", "last / 2nd", "cache", "process")]
    for row in report["rows"]:
        each = row["seconds_per_token"]
        lines.append(
            (
                row["name"],
                f"{row['tokens_per_second']:,.0f}",
                f"{1000 * each[1]:.2f}",
                f"{1000 * each[-1]:.2f}",
                f"{row['last_to_second_part']:.2f}",
                f"{row['cache_bytes'][-1] / 1e6:,.2f} MB",
                f"{row['memory_bytes'][-1] / 1e6:,.0f} MB",
            )
        )
    described = (
        f"{report['machine']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, "
        f"{report['tokens']:,} tokens written, windows of {report['window']:,}"
    )
    return "\n".join([described, "", *aligned(lines)])


if __name__ == "__main__":
    main()
