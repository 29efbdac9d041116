"""`longspan demo`: the default model, extended eight times, measured before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the model, figures and curves go.")
    ] = Path("out/demo"),
) -> None:
    """Extend the default model from 512 to 4,096 tokens and show that it worked.

    Measures it as it is, with stretched positions alone, and trained; prints the table and draws the curves.
    Takes a few minutes on two cores and downloads nothing.
    """
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from platform import python_version

    from rich.console import Console

    from longspan.cli.eval import check_output
    from longspan.cli.extend import described
    from longspan.cli.progress import Progress
    from longspan.evaluate.chart import chart
    from longspan.evaluate.evaluation import Evaluation, Protocol, evaluate
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
    longer = stretched(recipe)
    evaluations: list[Evaluation] = []

    with Progress() as progress:

        def measure(label: str, source: str | None, config: object = None) -> None:
            model, tokenizer = load_model(source, config=config)
            evaluations.append(
                evaluate(
                    model,
                    tokenizer,
                    encode(held, tokenizer),
                    label=label,
                    source=source or "default",
                    protocol=Protocol(),
                    progress=progress.task,
                )
            )

        measure("before", None)
        measure(f"{recipe.rope} alone", None, longer)
        progress.note(described(recipe))
        try:
            extension.extend(recipe, folder, progress=lambda name, done: progress.task(name, done=done))
        except extension.Interrupted as stop:
            progress.note(f"stopped after step {stop.step} of {stop.steps}")
            raise typer.Exit(130) from None
        measure("after", str(folder))

    report = Report(f"the standard library of Python {python_version()}", len(held), tuple(evaluations))
    Console().print(table(report))
    report.save(figures)
    chart(report, picture)
    typer.echo(f"the extended model is in {folder}, figures in {figures}, curves in {picture}")
