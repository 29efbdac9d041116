"""`longspan eval`: perplexity by context length and passkey retrieval by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from platform import python_version
from typing import Annotated

import typer

from longspan.cli.lengths import parse_lengths
from longspan.errors import InputError, message

_PICTURES = (".png", ".svg", ".pdf")


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Folders or Hugging Face ids, several to compare; without one, the default model.",
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Context lengths in tokens; 4k is 4096.")
    ] = "512,1k,2k,4k",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|DATASET",
            help="Text whose held-out part is read; without it, this Python's standard library.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of a dataset that holds the text.", show_default=False),
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens predicted at the end of each window.")
    ] = 256,
    segments: Annotated[int, typer.Option(min=1, metavar="N", help="Windows at each length.")] = 24,
    depths: Annotated[
        str, typer.Option(metavar="D,D,...", help="Where passkeys are hidden, 0 (beginning) to 1 (end).")
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passkey prompts at each length and depth.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the passkey prompts.")] = 0,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION",
            help='Attention pattern, such as "SlidingWindow(512)".',
            show_default="dense",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu or cuda; without it, cuda where there is one.", show_default=False
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures here.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curves here (PNG, SVG, PDF).", show_default=False),
    ] = None,
) -> None:
    """Measure how well models read long texts, side by side.

    Perplexity: the same held-out tokens, predicted from contexts of every length.
    Passkeys: five digits hidden in a long text and asked for at its end.

    Example: longspan eval default out --lengths 512,2k,8k --picture curves.png
    """
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from rich.console import Console

    from longspan.cli.device import device as device_named
    from longspan.cli.progress import Progress
    from longspan.evaluate.chart import chart
    from longspan.evaluate.evaluation import Protocol, evaluate
    from longspan.evaluate.report import Report
    from longspan.evaluate.table import table
    from longspan.hf.attention import set_pattern
    from longspan.hf.model import load_config, load_model
    from longspan.pattern.expression import parse
    from longspan.text.documents import documents, split
    from longspan.text.encoding import encode

    # Whatever can be refused is refused before the first minute of work.
    protocol = Protocol(
        lengths=parse_lengths(lengths),
        stride=stride,
        segments=segments,
        depths=parse_depths(depths),
        trials=trials,
        seed=seed,
    )
    sparse = None if pattern is None else parse(pattern)
    place = device_named(device)
    check_output(json, (".json",))
    check_output(picture, _PICTURES)
    sources = models or ["default"]
    for source in sources:
        load_config(source)
    held = split(documents(text, column=column))[1]

    evaluations = []
    with Progress() as progress:
        for source, label in zip(sources, labels(sources), strict=True):
            model, tokenizer = load_model(source, device=place)
            if sparse is not None:
                set_pattern(model, sparse)
            evaluations.append(
                evaluate(
                    model,
                    tokenizer,
                    encode(held, tokenizer),
                    label=label,
                    source=source,
                    protocol=protocol,
                    progress=progress.task,
                )
            )
    described = text or f"the standard library of Python {python_version()}"
    report = Report(described, len(held), tuple(evaluations), pattern=None if sparse is None else str(sparse))
    console = Console()
    console.print(table(report))
    if json is not None:
        report.save(json)
        console.print(f"figures in {json}", highlight=False, markup=False)
    if picture is not None:
        chart(report, picture)
        console.print(f"curves in {picture}", highlight=False, markup=False)


def labels(sources: Sequence[str]) -> list[str]:
    """Return a short name for each model: the last part of its path, where that tells them apart.

    Example:
        >>> labels(["runs/base", "runs/long"]), labels(["a/model", "b/model"])
        (['base', 'long'], ['a/model', 'b/model'])
    """
    short = [Path(source).name or source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def parse_depths(text: str) -> tuple[float, ...]:
    """Return depths that stand between commas, in rising order, each once.

    Raises:
        InputError: one of them is not a number from 0 to 1.

    Example:
        >>> parse_depths("1,0,0.5")
        (0.0, 0.5, 1.0)
    """
    depths = set()
    for part in text.split(","):
        try:
            depth = float(part)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise InputError(
                message(
                    "This is not a depth.",
                    {"asked": f"a depth of {part.strip()!r}", "wanted": "0 (the beginning) to 1 (the end)"},
                    fix="--depths 0,0.5,1",
                )
            )
        depths.add(depth)
    return tuple(sorted(depths))


def check_output(path: Path | None, endings: Sequence[str]) -> None:
    """Refuse a file that could not be written after the work is done.

    Raises:
        InputError: its folder does not exist, it is a folder itself, or it has another ending.
    """
    if path is None:
        return
    facts = {"asked": f"to write {str(path)!r}"}
    if path.suffix.lower() not in endings:
        raise InputError(
            message(
                "A file of this kind cannot be written.",
                facts | {"wanted": f"a name that ends in {' or '.join(endings)}"},
                fix=str(path.with_suffix(endings[0])),
            )
        )
    if not path.parent.is_dir() or path.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise InputError(
            message("A file cannot be written.", facts | {"because": reason}, fix="another path")
        )
