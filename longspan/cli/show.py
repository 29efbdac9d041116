"""`longspan show`: a pattern drawn, what it costs, and how far it sees."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli.lengths import parse_length
from longspan.errors import InputError, message

# Cells of the picture in the terminal, down and across, at most.
_CELLS = 32


def command(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN", help='Such as "Causal() & (Window(512) | Sink(4))".', show_default=False
        ),
    ],
    length: Annotated[str, typer.Option(metavar="N", help="Tokens of the text; 4k is 4096.")] = "4k",
    heads: Annotated[int, typer.Option(min=1, metavar="H", help="Query heads.")] = 8,
    layers: Annotated[
        int, typer.Option(min=1, metavar="L", help="Layers that the last token looks through.")
    ] = 32,
    width: Annotated[int, typer.Option(min=1, metavar="W", help="Numbers in a head's query.")] = 64,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="A:B",
            help="Draw and plan the queries from A to B - 1 only; they read all keys.",
            show_default="all",
        ),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the picture here, too.", show_default=False)
    ] = None,
) -> None:
    """Show which keys each query reads, what that costs, and how far it lets a model see.

    Everything is counted from the pattern and exact, for a million tokens as for ten.

    Example: longspan show "LongMixed(1024)" --length 1m --svg longmixed.svg
    """
    # Loading torch takes seconds, which `longspan --help` need not wait for.
    from longspan.cli.output import check_output
    from longspan.derive.picture import picture
    from longspan.derive.reach import reach
    from longspan.kernel.plan import plan
    from longspan.pattern.expression import parse

    tokens = parse_length(length)
    read = parse(pattern)
    asked = None if queries is None else parse_range(queries, tokens)
    check_output(svg, (".svg",))
    # A cell is two characters wide, which makes it square.
    cells = max(1, min(_CELLS, shutil.get_terminal_size().columns // 2))
    rows = asked or range(tokens)
    typer.echo(picture(read, queries=rows, keys=range(tokens), heads=heads, cells=cells))
    typer.echo()
    typer.echo(plan(read, length=tokens, queries=asked, heads=heads, width=width))
    typer.echo()
    typer.echo(reach(read, length=tokens, layers=layers, heads=heads))
    if svg is not None:
        title = f"{tokens:,} tokens, {heads} head{'s' * (heads > 1)}"
        picture(read, queries=rows, keys=range(tokens), heads=heads, title=title).save(svg)
        typer.echo(f"\npicture in {svg}")


def parse_range(text: str, length: int) -> range:
    """Return the positions from A to B - 1 that `A:B` names; without A from 0, without B up to the end.

    Raises:
        InputError: the text is no such range, or the range is empty or outside the text.

    Example:
        >>> parse_range("4000:", 4096), parse_range("1k:2k", 4096)
        (range(4000, 4096), range(1024, 2048))
    """
    parts = re.fullmatch(r"\s*(\w*)\s*:\s*(\w*)\s*", text)
    if parts:
        try:
            start = parse_length(parts[1]) if parts[1].strip("0") else 0
            stop = parse_length(parts[2]) if parts[2] else length
        except InputError:
            start, stop = 1, 0
        if start < stop <= length:
            return range(start, stop)
    raise InputError(
        message(
            "These are no queries of the text.",
            {"asked": f"queries {text!r}", "wanted": f"A:B with 0 <= A < B <= {length:,}"},
            fix=f"--queries {max(0, length - 64)}:{length}",
        )
    )
