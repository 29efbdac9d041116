"""`longspan eval`: how well models read long texts, measured side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import date, timedelta
from difflib import get_close_matches
from pathlib import Path
from platform import python_version
from typing import Annotated

import typer

from longspan.cli import options
from longspan.cli.lengths import parse_lengths
from longspan.cli.output import check_output
from longspan.errors import InputError, message

_PICTURES = (".png", ".svg", ".pdf")
_REPORTS = (".html", ".md")
_AGAIN = "the same command again: nothing has been written"


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
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="What to measure: perplexity, passkey, needle, multikey, multivalue, multiquery, variables, "
            "common-words, frequent-words, speed; ruler is the seven in the middle, all is all.",
        ),
    ] = "perplexity,passkey",
    text: Annotated[str | None, options.text("Text whose held-out part is read")] = None,
    column: options.Column = None,
    stride: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens predicted at the end of each window.")
    ] = 256,
    segments: Annotated[int, typer.Option(min=1, metavar="N", help="Windows at each length.")] = 24,
    depths: Annotated[
        str,
        typer.Option(
            metavar="D,D,...", help="Where passkeys and needles are hidden, 0 (beginning) to 1 (end)."
        ),
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts of each task at each length and depth.")
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the prompts.")] = 0,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION",
            help='Attention pattern, such as "SlidingWindow(512)".',
            show_default="dense",
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    timeout: options.Timeout = 600.0,
    json: options.Json = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curves here (PNG, SVG, PDF).", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write tables, curves and maps as one page (HTML, MD).", show_default=False
        ),
    ] = None,
) -> None:
    """Measure how well models read long texts, side by side.

    Perplexity: the same held-out tokens, predicted from contexts of every length.
    Passkeys: five digits hidden in a long text and asked for at its end.
    More with --tasks: needles, chains of variables, frequent words (in the manner of RULER), speed and memory.
    Under torchrun every text is split among the processes, so that it need not fit on one device.

    Example: longspan eval default out --lengths 512,2k,8k --tasks all --report report.html
    """
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from rich.console import Console

    from longspan.cli.progress import Progress
    from longspan.cli.ranks import own_device, ranks
    from longspan.evaluate.chart import chart
    from longspan.evaluate.evaluation import GROUPS, MEASURES, Protocol, evaluate
    from longspan.evaluate.page import save
    from longspan.evaluate.reading import readings
    from longspan.evaluate.report import Report
    from longspan.evaluate.table import table
    from longspan.hf.attention import set_pattern
    from longspan.hf.device import device as device_named
    from longspan.hf.model import load_config, load_model
    from longspan.hf.precision import reading_dtype
    from longspan.hf.sequence import sequence_parallel
    from longspan.pattern.expression import parse
    from longspan.ring.watch import Watch
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
        measures=parse_measures(tasks, MEASURES, GROUPS),
    )
    sparse = None if pattern is None else parse(pattern)
    place = own_device(device_named(device))
    check_output(json, (".json",))
    check_output(picture, _PICTURES)
    check_output(report, _REPORTS)
    if picture is not None and not {"perplexity", "passkey"} <= set(protocol.measures):
        raise InputError(
            message(
                "A picture shows perplexity and passkeys.",
                {"asked": f"--picture with --tasks {tasks}"},
                fix="--report, whose page shows whatever was measured",
            )
        )
    sources = models or ["default"]
    named = labels(sources)
    configs = [load_config(source) for source in sources]
    dtypes = [reading_dtype(dtype, config, place) for config in configs]
    drawn = (
        readings(
            (
                (label, config, *trained(source))
                for label, source, config in zip(named, sources, configs, strict=True)
            ),
            pattern=sparse,
            length=max(protocol.lengths),
        )
        if report
        else ()
    )
    held = split(documents(text, column=column))[1]

    evaluations = []
    patience = timedelta(seconds=timeout)
    with (
        ranks(place, patience) as (rank, number),
        Progress() as progress,
        Watch("the evaluation", fix=_AGAIN) as watch,
    ):

        def task(name: str) -> Callable[[int, int], None]:
            """Let every process know where it is; one of them shows it."""
            watch.step = name
            shown = progress.task(name) if rank == 0 else None

            def step(done: int, total: int) -> None:
                watch.step = f"{name}, after {done:,} of {total:,} tokens"
                if shown is not None:
                    shown(done, total)

            return step

        if number > 1 and "speed" in protocol.measures:
            raise InputError(
                message(
                    "Speed is measured on one device.",
                    {"asked": f"--tasks {tasks} on {number} processes"},
                    fix="longspan eval --tasks speed without torchrun",
                )
            )
        for source, label, config, kind in zip(sources, named, configs, dtypes, strict=True):
            model, tokenizer = load_model(source, config=config, dtype=kind, device=place)
            if sparse is not None:
                set_pattern(model, sparse)
            with sequence_parallel(model) if number > 1 else nullcontext():
                evaluations.append(
                    evaluate(
                        model,
                        tokenizer,
                        encode(held, tokenizer),
                        label=label,
                        source=source,
                        protocol=protocol,
                        progress=task,
                    )
                )
    if rank > 0:
        # All have found the same; one says so.
        return
    found = Report(
        text or f"the standard library of Python {python_version()}",
        len(held),
        tuple(evaluations),
        pattern=None if sparse is None else str(sparse),
        protocol=protocol,
        command=shlex.join(["longspan", *sys.argv[1:]]),
        day=date.today().isoformat(),
        readings=drawn,
    )
    console = Console()
    console.print(table(found))
    written: list[tuple[str, Path | None, Callable[[Path], None]]] = [
        ("figures", json, found.save),
        ("curves", picture, lambda path: chart(found, path)),
        ("report", report, lambda path: save(found, path)),
    ]
    for what, path, write in written:
        if path is not None:
            write(path)
            console.print(f"{what} in {path}", highlight=False, markup=False, soft_wrap=True)


def labels(sources: Sequence[str]) -> list[str]:
    """Return a short name for each model: the last part of its path, where that tells them apart.

    Example:
        >>> labels(["runs/base", "runs/long"]), labels(["a/model", "b/model"])
        (['base', 'long'], ['a/model', 'b/model'])
    """
    short = [Path(source).name or source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def trained(source: str) -> tuple[tuple[str, ...], int]:
    """Return the expressions of the patterns that a model was trained with, and the tokens of a training window.

    There are none where no recipe lies beside the model.

    Raises:
        InputError: there is a recipe that cannot be read.
    """
    from longspan.extend import settings

    folder = Path(source).expanduser()
    if not (folder / settings.FILE).is_file():
        return (), 0
    recipe = settings.load(folder)
    return recipe.patterns(recipe.window), recipe.window


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


def parse_measures(text: str, known: Sequence[str], groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return measures that stand between commas, in the order of `known`, each once.

    Args:
        text: names of measures and of groups.
        known: every measure.
        groups: names that stand for several measures.

    Raises:
        InputError: there is no such measure.

    Example:
        >>> parse_measures("c,ab", ["a", "b", "c"], {"ab": ["a", "b"]})
        ('a', 'b', 'c')
    """
    asked: set[str] = set()
    for part in text.split(","):
        name = part.strip().lower()
        if name not in known and name not in groups:
            near = get_close_matches(name, [*known, *groups], n=1, cutoff=0.5)
            raise InputError(
                message(
                    f"There is no task called {name!r}.",
                    {"asked": f"--tasks {text}", "there are": f"{', '.join([*known, *groups])}"},
                    fix=near[0] if near else "some of these, between commas",
                )
            )
        asked |= {name} if name in known else set(groups[name])
    return tuple(name for name in known if name in asked)
