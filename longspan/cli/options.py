"""Options that several commands take, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.extend.recipe import CHOICES, FAR, NEAR, SHORTEST, STAGES, WHOLE, Recipe


def by_length(name: str) -> str:
    """Return what a recipe takes for an option where nothing is said, as help shows it."""
    near, far = (value if isinstance(value, str) else f"{value:g}" for value in (NEAR[name], FAR[name]))
    return f"{near}, {far} for more than {WHOLE:,} tokens"


_MODEL: dict[str, Any] = {
    "metavar": "MODEL",
    "help": "Folder or Hugging Face id; without it, the default model.",
    "show_default": False,
}
Model = Annotated[str | None, typer.Argument(**_MODEL)]
ModelOption = Annotated[str | None, typer.Option(**_MODEL)]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of a dataset, or of a file of rows, that holds the text.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="cpu or cuda; without it, cuda where there is one.", show_default=False
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16|float16",
        help="Numbers that the model computes in; without it, its checkpoint's own on cuda, float32 on the CPU.",
        show_default=False,
    ),
]
Json = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the figures here.", show_default=False)
]
Timeout = Annotated[
    float,
    typer.Option(
        min=1, metavar="SECONDS", help="How long processes of torchrun wait for one that does not answer."
    ),
]
Length = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Tokens the model shall read; 4k is 4096.", show_default=str(Recipe.length)
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="EXPRESSION",
        help='What each query reads while training, such as "S2(1024)"; {1/4} is a quarter of the window, '
        '";" stands between patterns of layers. The result reads densely.',
        show_default=by_length("pattern"),
    ),
]
Window = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens of a training window.",
        show_default=f"the length up to {WHOLE:,}, a quarter of longer ones",
    ),
]
Stages = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Parts of the training, windows doubling in each.",
        show_default=f"{STAGES}, from windows of {SHORTEST:,} tokens on",
    ),
]
Positions = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(CHOICES["positions"]),
        help="Whether positions skip in windows shorter than the length, so that they reach over all of it (PoSE).",
        show_default=Recipe.positions,
    ),
]
Documents = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(CHOICES["documents"]),
        help="Whether a window reads over the ends of documents.",
        show_default=Recipe.documents,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(metavar="N", help="Updates of the weights.", show_default=by_length("steps")),
]
Batch = Annotated[
    int | None,
    typer.Option(metavar="N", help="Windows at a time, on each device.", show_default=str(Recipe.batch)),
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="How many times as many windows make a step.",
        show_default=str(Recipe.accumulate),
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(metavar="N", help="Rank of the LoRA matrices.", show_default=str(Recipe.rank)),
]
Loss = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(CHOICES["loss"]),
        help="Logits of a few tokens at a time, or of all.",
        show_default=Recipe.loss,
    ),
]
SequenceRanks = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processes of torchrun that read each window together, split along the sequence; 0 is all.",
        show_default=str(Recipe.sequence_ranks),
    ),
]


def text(purpose: str) -> Any:
    """Return the option that names a text, by what it is for."""
    return typer.Option(
        metavar="FILE|FOLDER|DATASET",
        help=f"{purpose}; without it, this Python's standard library.",
        show_default=False,
    )
