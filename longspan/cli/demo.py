"""`longspan demo`: the default model, extended eight times, measured before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Prompts at each length and depth, of three models.
_TRIALS = 4


def command(
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the model, figures and curves go.")
    ] = Path("out/demo"),
) -> None:
    """Extend the default model from 512 to 4,096 tokens and show that it worked.

    Trains it, measures it as it was, with stretched positions alone, and trained; prints the table and draws the curves.
    Takes a few minutes on two cores and downloads nothing.
    """
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from platform import python_version

    from rich.console import Console

    from longspan.cli.extend import described
    from longspan.cli.output import check_output
    from longspan.cli.progress import Progress
    from longspan.evaluate.chart import chart
    from longspan.evaluate.evaluation import Protocol, evaluate
    from longspan.evaluate.report import Report
    from longspan.evaluate.table import table
    from longspan.extend import extension
    from longspan.extend.recipe import Recipe
    from longspan.extend.stretch import stretched
    from longspan.hf.model import load_model
    from longspan.text.documents import documents, split
    from longspan.text.encoding import encode

    output.mkdir(parents=True, exist_ok=True)
    picture, figures, folder = output / "curves.png", output / "figures.json", output / "model"
    check_output(picture, (".png",))
    recipe = Recipe()
    held = split(documents())[1]
    models = [
        ("before", None, None),
        (f"{recipe.rope} alone", None, stretched(recipe)),
        ("after", str(folder), None),
    ]
    evaluations = []
    with Progress() as progress:
        progress.note(described(recipe))
        try:
            extension.extend(recipe, folder, progress=lambda name, done: progress.task(name, done=done))
        except extension.Interrupted as stop:
            progress.note(f"stopped after step {stop.step} of {stop.steps}")
            raise typer.Exit(130) from None
        for label, source, config in models:
            model, tokenizer = load_model(source, config=config)
            evaluations.append(
                evaluate(
                    model,
                    tokenizer,
                    encode(held, tokenizer),
                    label=label,
                    source=source or "default",
                    protocol=Protocol(trials=_TRIALS),
                    progress=progress.task,
                )
            )

    report = Report(f"the standard library of Python {python_version()}", len(held), tuple(evaluations))
    Console().print(table(report))
    report.save(figures)
    chart(report, picture)
    typer.echo(f"the extended model is in {folder}, figures in {figures}, curves in {picture}")
