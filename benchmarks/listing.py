"""What benchmarks share: lists of numbers asked for, tables and files of figures, the machine in words, a cleared memory."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> str:
    """Return what the figures were measured on."""
    facts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if device == "cpu":
        return ", ".join([processor(), *facts])
    card = torch.cuda.get_device_properties()
    named = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} processors"
    return ", ".join([named, f"CUDA {torch.version.cuda}", *facts])


def processor() -> str:
    """Return the name of the processor, as Linux tells it, or its kind."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def forget() -> None:
    """Clear whatever the functions of Longspan keep for the next call."""
    for name, module in list(sys.modules.items()):
        if name.startswith("longspan"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def numbers(text: str) -> list[int]:
    """Return the numbers that an option lists, with commas between them."""
    return [int(part) for part in text.split(",")]


def save(report: dict[str, Any], file: Path | None) -> None:
    """Write all figures as JSON where a file is asked for, in a folder that need not be there yet."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n")


def aligned(lines: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return lines of cells as those of a table for the terminal, the first columns flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [*map(str.ljust, line[:left], widths), *map(str.rjust, line[left:], widths[left:])]
        ).rstrip()
        for line in lines
    ]


def section(name: str, title: str, rows: Sequence[dict[str, Any]], verdicts: Sequence[str] = ()) -> str:
    """Return a table as Markdown, and below it what it decides."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"## {name}", "", title, "", f"| {' | '.join(column.replace('_', ' ') for column in columns)} |"]
    lines.append("|---" * len(columns) + "|")
    for row in rows:
        cells = (cell(row.get(column)).replace("|", "\\|") for column in columns)
        lines.append(f"| {' | '.join(cells)} |")
    if verdicts:
        lines += ["", *(f"- {verdict}" for verdict in verdicts)]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Return what stands for a figure in a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
