"""Options that several commands take, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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


def text(purpose: str) -> Any:
    """Return the option that names a text, by what it is for."""
    return typer.Option(
        metavar="FILE|FOLDER|DATASET",
        help=f"{purpose}; without it, this Python's standard library.",
        show_default=False,
    )
