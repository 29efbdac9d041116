"""Measure everything about one CUDA device: rates, planning, memory, a billion tokens, and exactness, against the goals.

Each table is made by a process of its own (`table.py`), and files are written with every row that it measures. So a
table that fails, or takes longer than it may, costs no other, and a run that is cut off has left the tables before, of which
the most important come first. Below each table stand the goals that it decides. To miss one is no failure; the program
ends with an error where a table could not be made.

The yardstick is a matrix product of 8192 x 8192 x 8192 in bfloat16. A pattern of P pairs takes 4 · width · P
floating-point operations forward and 10 · width · P backward; what a kernel computes and masks away does not count.

    python benchmarks/gpu.py --json out/gpu.json --table out/gpu.md
    python benchmarks/gpu.py --only window,stream
    python benchmarks/gpu.py --device cpu --toy
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from goals import counted, decided
from listing import section
from table import Bench

SCRIPT = Path(__file__).with_name("table.py")


@dataclass(frozen=True)
class Job:
    """A table, or what one kernel adds to it, and the seconds that it may take."""

    table: str
    seconds: int
    kernel: str = ""

    @property
    def asked(self) -> str:
        return f"{self.table}:{self.kernel}" if self.kernel else self.table


# The most important first.
JOBS = (
    Job("dense", 60),
    Job("window", 120),
    Job("lengths", 120),
    Job("stream", 120),
    Job("memory", 60),
    Job("errors", 120, "chosen"),
    Job("errors", 90, "triton"),
    Job("planning", 60),
    Job("costs", 60),
    Job("sanitizer", 90, "triton"),
    Job("sanitizer", 60, "flash"),
    Job("decoding", 30),
    Job("errors", 180, "flex"),
)
TABLES = tuple(dict.fromkeys(job.table for job in JOBS))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, so nothing was measured.")
    unknown = set(options.only or ()) - set(TABLES)
    if unknown:
        sys.exit(f"There is no table {sorted(unknown)[0]}: there are {', '.join(TABLES)}.")
    report: dict[str, Any] = {}
    failed = []
    end = time.monotonic() + options.seconds
    jobs = [job for job in JOBS if not options.only or job.table in options.only]
    for number, job in enumerate(jobs):
        print(job.asked, file=sys.stderr)
        rows = report.setdefault(job.table, [])
        seconds = min(job.seconds, end - time.monotonic())
        if seconds > 0:
            why = _made(job, seconds, options, report)
        else:
            why = f"was not begun: {options.seconds} seconds were over"
        if why:
            failed.append(job.asked)
            kernel = {"kernel": job.kernel} if job.kernel else {}
            rows.append({"what": "failed", **kernel, "refused": f"{job.asked} {why}"})
        _write(report, options)
        if job.table not in {other.table for other in jobs[number + 1 :]}:
            print(_section(report, job.table), end="\n\n", flush=True)
    print(counted(decided(report)))
    if failed:
        sys.exit(f"These tables failed: {', '.join(failed)}.")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--toy", action="store_true", help="sizes at which figures mean nothing")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), metavar="TABLE,TABLE", help=", ".join(TABLES)
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600,
        metavar="N",
        help="begin no table after these, and end one then (default: 600)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables here, as Markdown")
    return parser.parse_args(arguments)


def _made(job: Job, seconds: float, options: argparse.Namespace, report: dict[str, Any]) -> str:
    """Add the rows of a table as they come, and return why it ended too early, or nothing."""
    command = [sys.executable, str(SCRIPT), job.asked, "--device", options.device]
    over = threading.Event()
    with subprocess.Popen(
        command + ["--toy"] * options.toy, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:

        def end() -> None:
            over.set()
            _kill(process)

        watch = threading.Timer(seconds, end)
        watch.start()
        try:
            for line in process.stdout:
                # Libraries print too.
                if not line.startswith('{"'):
                    print(line, end="", file=sys.stderr)
                    continue
                found = json.loads(line)
                report.update(found.get("facts", {}))
                if "row" in found:
                    report[job.table].append(found["row"])
                    _write(report, options)
            process.wait()
        finally:
            watch.cancel()
            # Where this program is interrupted, its table is too.
            if process.poll() is None:
                _kill(process)
    if over.is_set():
        return f"was stopped after {seconds:.0f} seconds"
    return f"ended with {process.returncode}" if process.returncode else ""


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process that runs, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    texts: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (options.json, lambda: json.dumps(report | {"goals": decided(report)}, indent=2)),
        (options.table, lambda: page(report)),
    )
    for path, text in texts:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A run that is cut off while it writes leaves the file as it was.
            beside = path.with_name(f"{path.name}.new")
            beside.write_text(text() + "\n")
            beside.replace(path)


def page(report: dict[str, Any]) -> str:
    """Return all tables as Markdown, each with the goals that it decides."""
    made = [_section(report, table) for table in TABLES if report.get(table)]
    if "sizes" not in report:
        return "\n\n".join(made)
    sizes = report["sizes"]
    heads = f"{sizes['heads'][0]} heads on {sizes['heads'][1]} of width {sizes['width']}"
    product = f"the matrix product runs at {report['product_tflops']:,.3g} TFLOP/s"
    facts = (
        f"{report['machine']}; {report['dtype']}, {heads}, medians of {sizes['repeats']} rounds; {product}."
    )
    return "\n\n".join([facts, counted(decided(report)), *made])


def _section(report: dict[str, Any], table: str) -> str:
    title = (getattr(Bench, table).__doc__ or table).splitlines()[0]
    verdicts = [goal["verdict"] for goal in decided(report).get(table, [])]
    return section(table, title, report[table], verdicts)


if __name__ == "__main__":
    # Told to end, it ends its table first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
