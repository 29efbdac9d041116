"""The page of `papers.py`: what each part compares, its table, and which claims of the papers came out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One way is better than another, says a paper.

    Attributes:
        better, worse: names of ways.
        said: where, and with which figures.
    """

    better: str
    worse: str
    said: str


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
        title: of its table.
        about: what is compared, and how.
        judged: kinds of figures that claims are judged by; less is better.
        shown: kinds of figures in the table.
        claims: of the papers, by the names of ways without what stands after a comma.
    """

    title: str
    about: str
    judged: tuple[str, ...]
    shown: tuple[str, ...]
    claims: tuple[Claim, ...]


_PG19 = "on PG19 at 8,192 tokens"
PARTS = {
    "patterns": Part(
        "Patterns of sparse training",
        "LoRA+, which is LoRA with embeddings and norms whole; text alone, positions by YaRN, to four and to eight times the model's own length. "
        "Windows and groups are a quarter of the length. Every model is read densely and by the pattern it was "
        "trained with.",
        ("dense", "sparse"),
        ("dense", "sparse", "passkeys", "step"),
        (
            Claim("LongMixed", "SCCA fixed", f"8.73 and 9.17 {_PG19}, arXiv 2312.07305"),
            Claim("SCCA fixed", "S2", f"9.17 and 9.41 {_PG19}, arXiv 2312.07305"),
            Claim("S2", "SCCA flow", f"9.41 and 9.47 {_PG19}, arXiv 2312.07305"),
        ),
    ),
    "positions": Part(
        "Positions",
        "To eight times the length with dense attention, before and after the same training. `Plain` leaves positions as "
        "they are, `linear` is PI, factors of `longrope` are searched on the training text.",
        ("dense",),
        ("dense", "passkeys"),
        (
            Claim("yarn", "ntk", "11.33 and 34.80 on PG19 at 128k, arXiv 2309.10400"),
            Claim("yarn", "linear", "11.33 and 31.18 on PG19 at 128k, arXiv 2309.10400"),
            Claim("longrope", "yarn", "arXiv 2402.13753, section 4"),
            Claim("ntk, untrained", "linear, untrained", "arXiv 2309.00071, section 3.1"),
        ),
    ),
    "windows": Part(
        "Windows by layer",
        "A model of a million parameters trained from random weights, the same number of keys read by all ways; bits "
        "per byte of held-out text, read as trained. `dilated` is `increasing` with a dilation of 2 on two of the eight heads of the upper layers.",
        ("bits",),
        ("bits", "step"),
        (
            Claim("increasing", "fixed", "1.21 and 1.23 bits on text8, arXiv 2004.05150, table 4"),
            Claim("fixed", "decreasing", "1.23 and 1.24 bits on text8, arXiv 2004.05150, table 4"),
            Claim("dilated", "increasing", "1.20 and 1.21 bits on text8, arXiv 2004.05150, table 4"),
        ),
    ),
    "adapters": Part(
        "Which weights are trained",
        "To eight times the length with dense attention. LoRA+ is LoRA with embeddings and norms whole; full training at its usual rate of 2e-5 and at 3e-4.",
        ("dense",),
        ("dense", "passkeys", "step"),
        (
            Claim("LoRA+", "LoRA", "8.12 and 11.44 on PG19, arXiv 2309.12307, table 2"),
            Claim("full", "LoRA+", "8.08 and 8.12 on PG19, arXiv 2309.12307, table 2"),
        ),
    ),
    "skipping": Part(
        "Short windows whose positions skip",
        "PoSE: windows of the model's own length with positions up to eight times as far, beside windows of full length; "
        "as many tokens in each step.",
        ("dense",),
        ("dense", "passkeys", "step"),
        (Claim("full length", "PoSE", "4.59 and 4.60 on GovReport at 16k, arXiv 2309.10400"),),
    ),
    "leak": Part(
        "Groups that wrap around the end",
        "S2 as in its pseudo-code, where the first half group reads the end of the text, beside S2 without: the model "
        "trained whole, at half of its own length, on windows that end as they began, for half a group, so that the "
        "end can give the beginning away. `loss` is that of the last third of the training, `leaks` the pairs that "
        "`check_causality` finds among 32 positions.",
        ("loss",),
        ("loss", "leaks"),
        (Claim("wrapped", "S2", "a loss too good to be true; reported as LongLoRA's issues 15 and 90"),),
    ),
}


def figures(cell: dict[str, Any]) -> dict[str, float]:
    """Return all figures of one cell, by kind and, where there is one, length."""
    found: dict[str, float] = {}
    if cell.get("losses"):
        last = cell["losses"][-max(1, len(cell["losses"]) // 3) :]
        found["loss"] = statistics.fmean(last)
    for kind in ("dense", "sparse", "bits", "passkeys"):
        lengths = list(cell.get(kind, {}).items())
        # Passkeys at one length, perplexity at all.
        for length, value in lengths[-1:] if kind == "passkeys" else lengths:
            found[f"{kind} {int(length):,}"] = value
    if cell.get("step_seconds") is not None:
        found["step"] = cell["step_seconds"]
    if "leaks" in cell:
        found["leaks"] = cell["leaks"]
    return found


def table(report: dict[str, Any], name: str) -> str:
    """Return the table of a part, and what became of its claims, as Markdown that reads well as it is."""
    part, rows = PARTS[name], {}
    for way in report["parts"][name]:
        rows[way["name"]] = [figures(report["cells"][key]) for key in way["cells"]]
    kinds = {kind: None for cells in rows.values() for cell in cells for kind in cell}
    columns = sorted(
        (kind for kind in kinds if kind.split()[0] in part.shown),
        key=lambda kind: (part.shown.index(kind.split()[0]), *_length(kind)),
    )
    lines = [["", *columns]]
    for way, cells in rows.items():
        lines.append([way, *(_mean([cell[kind] for cell in cells if kind in cell]) for kind in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in lines
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    verdicts = [said for claim in part.claims for said in _verdicts(claim, part, rows)]
    return "\n".join([f"## {part.title}", "", part.about, "", drawn[0], rule, *drawn[1:], "", *verdicts, ""])


def page(report: dict[str, Any]) -> str:
    """Return the page with all parts that have been run."""
    return "\n".join(
        [
            "# The papers in small",
            "",
            "Written by `python benchmarks/papers.py` from `papers.json`. The default model (3.3 million parameters, "
            f"bytes, 512 tokens) and {report['steps']} steps are not the papers' seven billion and their thousand: "
            "what comes out alike here is an order, not a figure.",
            "",
            f"{report['machine']}, torch {report['torch']}; mean over seeds and, behind ±, their standard "
            "deviation. `dense` and `sparse` are perplexities of the same held-out tokens by context length, "
            "`passkeys` the share retrieved, `step` seconds. A claim is reproduced where all seeds agree on it.",
            "",
            *(table(report, name) for name in PARTS if name in report["parts"]),
        ]
    )


def _verdicts(claim: Claim, part: Part, rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """Say of a claim, for each kind of figure and each length of training, whether it came out."""
    said = []
    for better, worse in _pairs(claim, rows):
        for judged in part.judged:
            shared = [
                kind for kind in rows[better][0] if kind.split()[0] == judged and kind in rows[worse][0]
            ]
            if not shared:
                continue
            kind = shared[-1]
            gaps = [worst[kind] - best[kind] for best, worst in zip(rows[better], rows[worse], strict=True)]
            word = (
                "**reproduced**"
                if min(gaps) > 0
                else "**the other way round**"
                if max(gaps) < 0
                else "not told apart"
            )
            one, other = (_mean([cell[kind] for cell in rows[name]]) for name in (better, worse))
            said.append(
                f"- {better} better than {worse} ({claim.said}): {word} by {kind}: {one} and {other}, "
                f"{len(gaps)} {'seed' if len(gaps) == 1 else 'seeds'}."
            )
    return said


def _pairs(claim: Claim, rows: Sequence[str] | dict[str, Any]) -> list[tuple[str, str]]:
    """Return the ways that a claim speaks of: the two themselves, or both at each length of training."""
    if claim.better in rows and claim.worse in rows:
        return [(claim.better, claim.worse)]
    ends = [name.rpartition(", ")[2] for name in rows if name.startswith(f"{claim.better}, ")]
    return [
        (f"{claim.better}, {end}", f"{claim.worse}, {end}") for end in ends if f"{claim.worse}, {end}" in rows
    ]


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    digits = 0 if mean >= 100 or mean == int(mean) else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{spread}"


def _length(kind: str) -> tuple[int, ...]:
    return tuple(int(part.replace(",", "")) for part in kind.split()[1:])
