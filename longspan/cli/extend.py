"""`longspan extend`: a pretrained model, made to read further."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.lengths import parse_length
from longspan.errors import InputError, message


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or Hugging Face id; without it, the default model.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(metavar="N", help="Tokens the model shall read; 4k is 4096.", show_default="4096"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|DATASET",
            help="Text to train on; without it, this Python's standard library.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of a dataset that holds the text.", show_default=False),
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(metavar="linear|ntk|yarn", help="How positions are stretched.", show_default="yarn"),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION",
            help='What each query reads while training, such as "S2(1024)"; the result reads densely.',
            show_default="the last 5/16 and the first 1/4",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Updates of the weights.", show_default="175")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Windows per step.", show_default="1")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="Peak learning rate.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Rank of the LoRA matrices.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of all random choices.", show_default="0")
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the extended model goes; empty, or not there yet.")
    ] = Path("extended"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in the output folder.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu or cuda; without it, cuda where there is one.", show_default=False
        ),
    ] = None,
) -> None:
    """Make a pretrained model read a longer text.

    Stretches the positions, trains LoRA, embeddings and norms on long windows with a sparse pattern, and writes a
    plain Hugging Face checkpoint that needs no Longspan.

    Example: longspan extend --length 4096 --text novel.txt --output extended
    """
    asked: dict[str, Any] = {
        "model": model,
        "length": None if length is None else parse_length(length),
        "text": text,
        "column": column,
        "rope": rope,
        "pattern": pattern,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "rank": rank,
        "seed": seed,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if resume and given:
        raise InputError(
            message(
                "A run goes on by the recipe it began with.",
                {"asked": f"--resume with {', '.join(given)}", "recipe": str(output / "recipe.json")},
                fix=f"longspan extend --resume --output {output}",
            )
        )
    run(given, output, resume=resume, device=device)


def run(given: dict[str, Any], output: Path, *, resume: bool, device: str | None) -> None:
    """Carry out a recipe with the options given, showing how far it is; leave with code 130 on Ctrl-C."""
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from longspan.cli.device import device as device_named
    from longspan.cli.progress import Progress
    from longspan.extend import extension
    from longspan.extend.recipe import Recipe

    place = device_named(device)
    with Progress() as progress:

        def task(name: str, done: int) -> Any:
            return progress.task(name, done=done)

        try:
            if resume:
                extension.resume(output, device=place, progress=task)
            else:
                recipe = Recipe(**given)
                progress.note(described(recipe))
                extension.extend(recipe, output, device=place, progress=task)
        except extension.Interrupted as stop:
            progress.note(f"stopped after step {stop.step} of {stop.steps}; nothing is lost")
            progress.note(f"go on with: longspan extend --resume --output {output}")
            raise typer.Exit(130) from None
    typer.echo(
        f"the extended model is in {output}; compare: longspan eval {given.get('model', 'default')} {output}"
    )


def described(recipe: Any) -> str:
    """Return one line that says what a recipe does."""
    parts = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    return "extending {model} to {length:,} tokens: {rope}, {pattern}, {steps} steps of {batch} x {length:,} tokens of {text}".format(
        **parts
        | {
            "model": recipe.model or "the default model",
            "text": recipe.text or "the standard library",
        }
    )
