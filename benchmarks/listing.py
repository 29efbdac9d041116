"""Tables of figures as Markdown, and the machine that they come from in words."""

from __future__ import annotations

import platform
from typing import Any

import torch


def machine(device: str) -> str:
    """Return what the figures were measured on."""
    facts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if device == "cpu":
        return ", ".join([platform.machine(), *facts])
    card = torch.cuda.get_device_properties()
    named = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} processors"
    return ", ".join([named, f"CUDA {torch.version.cuda}", *facts])


def page(report: dict[str, Any], titles: dict[str, str]) -> str:
    """Return all tables as Markdown."""
    lines = [
        f"{report['machine']}; {report['dtype']}, {report['sizes']['heads']} heads of width {report['sizes']['width']}, "
        f"medians of {report['sizes']['repeats']}; the matrix product runs at {report['product_tflops']:,.3g} TFLOP/s."
    ]
    for name, title in titles.items():
        rows = report.get(name)
        if not rows:
            continue
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [
            "",
            f"## {name}",
            "",
            title,
            "",
            f"| {' | '.join(column.replace('_', ' ') for column in columns)} |",
        ]
        lines.append("|---" * len(columns) + "|")
        lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")
