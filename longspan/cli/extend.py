"""`longspan extend`: a pretrained model, made to read further."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli import options
from longspan.cli.lengths import parse_length
from longspan.errors import InputError, message
from longspan.extend.recipe import CHOICES, RATE, RATES, Recipe

_OUTPUT = Path("extended")


def command(
    model: options.Model = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file with any of these options by name; what stands on the command line wins.",
            show_default=False,
        ),
    ] = None,
    length: options.Length = None,
    text: Annotated[str | None, options.text("Text to train on")] = None,
    column: options.Column = None,
    rope: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How positions are stretched: linear, ntk, yarn, llama3; longrope (factors searched on the text); "
            'a file of factors; or a frequency such as "YaRN(8, original=4096)".',
            show_default=Recipe.rope,
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Stretch this much further than the lengths ask for.",
            show_default=options.by_length("margin"),
        ),
    ] = None,
    pattern: options.Pattern = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(CHOICES["method"]),
            help="Which weights are trained; lora+ is LoRA, and embeddings and norms whole.",
            show_default=Recipe.method,
        ),
    ] = None,
    window: options.Window = None,
    stages: options.Stages = None,
    positions: options.Positions = None,
    documents: options.Documents = None,
    steps: options.Steps = None,
    batch: options.Batch = None,
    accumulate: options.Accumulate = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Peak learning rate.",
            show_default=", ".join([f"{RATE:g}", *(f"{rate:g} for {name}" for name, rate in RATES.items())]),
        ),
    ] = None,
    rank: options.Rank = None,
    repeats: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Steps on windows in which segments recur.",
            show_default=options.by_length("repeats"),
        ),
    ] = None,
    passkeys: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Steps on windows that hide a passkey, and teach to find it.",
            show_default=options.by_length("passkeys"),
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(CHOICES["activations"]),
            help="Recomputing them on the way back (gradient checkpointing) takes far less memory; so does moving "
            "them from a CUDA device to the CPU's memory.",
            show_default=Recipe.activations,
        ),
    ] = None,
    loss: options.Loss = None,
    sequence_ranks: options.SequenceRanks = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of all random choices.", show_default=str(Recipe.seed)),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the extended model goes; empty, or not there yet.",
            show_default=str(_OUTPUT),
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in the output folder.")
    ] = False,
    device: options.Device = None,
    timeout: options.Timeout = 600.0,
) -> None:
    """Make a pretrained model read a longer text.

    Stretches the positions, trains LoRA, embeddings and norms on long windows with a sparse pattern, and writes a
    plain Hugging Face checkpoint that needs no Longspan.

    Killed at any moment, it goes on with --resume. The options are kept in recipe.yaml beside the result, and
    --config with that file repeats the run. Several devices: torchrun --nproc-per-node 8 -m longspan extend ..., each with
    windows of its own, or with --sequence-ranks 0 all of them with a part of each window.

    Example: longspan extend --length 4096 --text novel.txt --output extended
    """
    asked: dict[str, Any] = {
        "model": model,
        "length": length,
        "text": text,
        "column": column,
        "rope": rope,
        "margin": margin,
        "pattern": pattern,
        "method": method,
        "window": window,
        "stages": stages,
        "positions": positions,
        "documents": documents,
        "steps": steps,
        "batch": batch,
        "accumulate": accumulate,
        "rate": rate,
        "rank": rank,
        "repeats": repeats,
        "passkeys": passkeys,
        "activations": activations,
        "loss": loss,
        "sequence_ranks": sequence_ranks,
        "seed": seed,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    place = output or _OUTPUT
    if resume and (given or config):
        named = ", ".join([*given, *(["config"] if config else [])])
        raise InputError(
            message(
                "A run goes on by the recipe it began with.",
                {"asked": f"--resume with {named}", "recipe": str(place / "recipe.yaml")},
                fix=f"longspan extend --resume --output {place}",
            )
        )
    if config is not None:
        from longspan.extend.settings import read

        held = read(config)
        place = output or Path(held.pop("output", place))
        device = device or held.pop("device", None)
        held = {name: value for name, value in held.items() if name not in ("output", "device")}
        given = held | given
    for name in ("length", "window"):
        if isinstance(given.get(name), str):
            given[name] = parse_length(given[name])
    run(given, place, resume=resume, device=device, timeout=timeout)


def run(
    given: dict[str, Any], output: Path, *, resume: bool, device: str | None, timeout: float = 600.0
) -> None:
    """Carry out a recipe with the options given, showing how far it is; leave with code 130 on Ctrl-C."""
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from longspan.cli.progress import Progress
    from longspan.extend import extension
    from longspan.extend.settings import load
    from longspan.hf.device import device as device_named

    place, patience = device_named(device), timedelta(seconds=timeout)
    first = extension.rank() == 0
    with Progress() as progress:

        def note(text: str) -> None:
            # Of several processes, one speaks.
            if first:
                progress.note(text)

        def task(name: str, done: int) -> Any:
            return progress.task(name, done=done)

        try:
            if resume:
                recipe = load(output)
                extension.resume(output, device=place, timeout=patience, progress=task if first else None)
            else:
                recipe = Recipe(**given)
                note(described(recipe, extension.ranks()))
                extension.extend(
                    recipe,
                    output,
                    device=place,
                    timeout=patience,
                    progress=task if first else None,
                    note=note,
                )
        except extension.Interrupted as stop:
            note(f"stopped after step {stop.step} of {stop.steps}; nothing is lost")
            note(f"go on with: longspan extend --resume --output {output}")
            raise typer.Exit(130) from None
    if first:
        source = recipe.model or "default"
        typer.echo(f"the extended model is in {output}; compare: longspan eval {source} {output}")


def described(recipe: Recipe, processes: int = 1) -> str:
    """Return one line that says what a recipe does, and on how many processes."""
    model, text = recipe.model or "the default model", recipe.text or "the standard library"
    parts = [recipe.rope.partition("(")[0], "; ".join(recipe.patterns(recipe.window))]
    if recipe.method != Recipe.method:
        parts.append(recipe.method)
    if recipe.stages > 1:
        parts.append(f"{recipe.stages} stages")
    if recipe.skips:
        parts.append("positions that skip")
    if recipe.documents == "packed":
        parts.append("packed documents")
    if recipe.sequence_ranks != 1:
        parts.append(f"each window on {recipe.sequence_ranks or 'all'} processes")
    if processes > 1:
        parts.append(f"{processes} processes")
    groups = max(1, processes // recipe.sharing(processes))
    windows = f"{groups * recipe.batch * recipe.accumulate} x {recipe.window:,} tokens"
    return f"extending {model} to {recipe.length:,} tokens: {', '.join(parts)}, {recipe.steps} steps of {windows} of {text}"
