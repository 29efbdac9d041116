"""`longspan digest`: a long text chunk by chunk through a model that is not extended, and an answer from the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longspan.cli import options
from longspan.cli.output import check_output, save
from longspan.cli.read import text_of


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The text, UTF-8.")],
    model: options.ModelOption = None,
    question: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What to answer from every chunk and at the end.", show_default="a summary"
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of text at a time.", show_default="what the model has room for"
        ),
    ] = None,
    overlap: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of a chunk that the next one begins with.")
    ] = 0,
    answer: Annotated[int, typer.Option(min=1, metavar="N", help="The most tokens of an answer.")] = 64,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Answer a question about a text that is longer than a model reads, for models that are not extended.

    The model answers from each chunk alone; answers are joined, as many as fit into a chunk, and it answers again
    from those, until there is one. What no single chunk tells is not found so.

    Example: longspan digest novel.txt --question "Who is the hero?" --overlap 32
    """
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from rich.console import Console

    from longspan.cli.progress import Progress
    from longspan.evaluate.digest import digest
    from longspan.hf.device import device as device_named
    from longspan.hf.model import load_config, load_model
    from longspan.hf.precision import reading_dtype

    place = device_named(device)
    check_output(json, (".json",))
    text = text_of(file)
    config = load_config(model)
    kind = reading_dtype(dtype, config, place)
    loaded, tokenizer = load_model(model, config=config, dtype=kind, device=place)
    with Progress() as progress:
        found = digest(
            loaded,
            tokenizer,
            text,
            question,
            chunk=chunk,
            overlap=overlap,
            budget=answer,
            task=progress.task,
        )
    console = Console()
    counts = ", then ".join(f"{len(answers):,}" for answers in found.rounds)
    console.print(f"{Path(file).name}: {counts} answers", highlight=False, markup=False)
    console.print(question or "Summary", style="bold", highlight=False, markup=False)
    console.print(found.answer or "(nothing)", highlight=False, markup=False)
    if json is not None:
        save(
            {
                "file": file,
                "model": model or "default",
                "question": question,
                "overlap": overlap,
                "rounds": [list(answers) for answers in found.rounds],
                "answer": found.answer,
            },
            json,
        )
        console.print(f"figures in {json}", highlight=False, markup=False, soft_wrap=True)
