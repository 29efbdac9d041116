"""`longspan plan`: what an extension would take, before anything is read or trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import options
from longspan.cli.lengths import parse_length
from longspan.errors import InputError, message
from longspan.extend.recipe import Recipe

if TYPE_CHECKING:
    from longspan.extend.forecast import Forecast


def command(
    model: options.Model = None,
    length: options.Length = None,
    devices: Annotated[int, typer.Option("--gpus", metavar="N", help="How many devices there are.")] = 1,
    memory: Annotated[float, typer.Option(metavar="GB", help="Memory of each.")] = 80.0,
    speed: Annotated[
        float, typer.Option(metavar="TFLOPS", help="What each sustains, in 10^12 operations per second.")
    ] = 300.0,
    pattern: options.Pattern = None,
    window: options.Window = None,
    stages: options.Stages = None,
    positions: options.Positions = None,
    documents: options.Documents = None,
    steps: options.Steps = None,
    batch: options.Batch = None,
    accumulate: options.Accumulate = None,
    rank: options.Rank = None,
    loss: options.Loss = None,
    sequence_ranks: options.SequenceRanks = None,
) -> None:
    """Say what an extension would take, and which way to go.

    Reads the model's configuration and no weights: memory by method, time and traffic of training, cache and
    reading of the result, and a recommendation with its reasons.

    Options that `longspan extend` takes too mean the same here.

    Example: longspan plan --length 131072 --gpus 8 --memory 80
    """
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from psutil import Process

    from longspan.extend.advice import advice, by_method
    from longspan.extend.forecast import Machine
    from longspan.hf.model import load_config
    from longspan.size import size

    for name, value in (("gpus", devices), ("memory", memory), ("speed", speed)):
        if not 0 < value < 1e9:
            raise InputError(
                message(
                    "An option of the plan is out of range.",
                    {"asked": f"--{name} {value:g}", "wanted": "more than 0"},
                    fix="the default, by leaving the option out",
                )
            )
    asked: dict[str, Any] = {
        "model": model,
        "length": None if length is None else parse_length(length),
        "pattern": pattern,
        "window": None if window is None else parse_length(window),
        "stages": stages,
        "positions": positions,
        "documents": documents,
        "steps": steps,
        "batch": batch,
        "accumulate": accumulate,
        "rank": rank,
        "loss": loss,
        "sequence_ranks": sequence_ranks,
    }
    recipe = Recipe(**{name: value for name, value in asked.items() if value is not None})
    config = load_config(model)
    machine = Machine(devices, memory * 1e9, speed * 1e12)
    forecasts = by_method(config, recipe, machine)
    first = forecasts[0]
    _check_sharing(first)
    reads = config.max_position_embeddings
    typer.echo(
        f"{model or 'the default model'}: {first.memory.parameters:,} parameters, reads {reads:,} tokens, "
        f"shall read {recipe.length:,}: {recipe.length / reads:g} times as many"
    )
    typer.echo(
        f"{f'windows of {recipe.window:,}':<22}{'trained':>16}{'memory':>14}{'devices/window':>16}{'time':>12}"
    )
    for each in forecasts:
        name = f"{each.recipe.method}, {each.recipe.activations}"
        ranks = "too large" if each.ranks is None else str(each.ranks)
        typer.echo(
            f"{name:<22}{each.memory.trained:>16,}{size(each.memory.total):>14}{ranks:>16}"
            f"{each.seconds / 3600:>10,.2f} h"
        )
    typer.echo(
        f"not counted: the process itself, which takes {size(Process().memory_info().rss)} here and more with a text; "
        "what libraries and kernels hold on a GPU; freed memory that an allocator holds"
    )
    if devices > 1:
        gradients, keys = next(each for each in forecasts if each.recipe.method == "lora+").traffic
        typer.echo(
            f"traffic: {size(gradients)} of gradients per device and step (lora+), and {size(keys)} "
            f"of keys and values where {first.sharing} share a window"
        )
    typer.echo(
        f"reading: {first.prefill / 1e12:,.1f} TFLOP before the first answer, {first.prefill / machine.speed:,.1f} s on "
        f"one device"
        + (f"; {first.sharing} that share a text send {size(first.passing)} each" if devices > 1 else "")
    )
    typer.echo(
        f"writing: weights of {size(2 * first.memory.parameters)}, and {size(first.cache)} of keys and values for each "
        f"text: {size(first.fetched)} of memory are read for a token"
    )
    for name, reason in advice(config, recipe, machine):
        typer.echo(f"{name}: {reason}")


def _check_sharing(forecast: Forecast) -> None:
    """Refuse devices that cannot be divided among the windows, as the training would."""
    recipe, devices = forecast.recipe, forecast.machine.devices
    number = recipe.sharing(devices)
    if not recipe.divides(devices):
        raise InputError(
            message(
                "The devices cannot be divided among the windows.",
                {
                    "asked": f"{number} devices for each window of {recipe.windows[0]:,} tokens",
                    "there are": f"{devices} devices",
                },
                fix="--gpus with a multiple of --sequence-ranks, and two tokens of a window for each",
            )
        )
