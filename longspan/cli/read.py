"""`longspan read`: a text of any length through a model, in memory that does not grow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import options
from longspan.cli.output import check_output, save
from longspan.errors import InputError, PatternError, message

if TYPE_CHECKING:
    from rich.table import Table

    from longspan.evaluate.stream import Checkpoint
    from longspan.pattern import Pattern

_SINKS = 4
_PLACES = ("cache", "text")
# Lengths at which the keys that must be held are counted: a pattern that needs more at the second never stops.
_ONCE, _TWICE = 1 << 17, 1 << 18


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The text, UTF-8.")],
    model: options.ModelOption = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="EXPRESSION",
            help='Attention pattern, such as "Streaming(1020, sinks=4)".',
            show_default="four sinks and a window as long as the model's context",
        ),
    ] = None,
    places: Annotated[
        str | None,
        typer.Option(
            metavar="cache|text",
            help="Where positions are counted: in the cache, so that no distance leaves the model's context, "
            "or in the text.",
            show_default="cache for windows and sinks, text for all else",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What to answer at the end.", show_default="a summary"),
    ] = None,
    answer: Annotated[int, typer.Option(min=0, metavar="N", help="The most tokens of the answer.")] = 128,
    chunk: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens read at a time.")] = 512,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = None,
) -> None:
    """Read a text of any length with a cache of constant size, and answer a question at its end.

    Only keys that the pattern may still read are held. With a window and sinks, positions are counted within the
    cache (StreamingLLM): the model never meets a distance that it was not trained for, however long the text. It
    answers from what the pattern still reads: the beginning of a long text is forgotten.

    Example: longspan read novel.txt --question "Who is the last to speak?"
    """
    # Loading torch and transformers takes seconds, which `longspan --help` need not wait for.
    from rich.console import Console

    from longspan.cli.progress import Progress
    from longspan.evaluate.forward import check_positions
    from longspan.evaluate.stream import Stream
    from longspan.hf.attention import set_pattern
    from longspan.hf.cache import PatternCache
    from longspan.hf.device import device as device_named
    from longspan.hf.model import check_tokens, load_config, load_model
    from longspan.hf.precision import reading_dtype
    from longspan.hf.stream import StreamCache
    from longspan.pattern.expression import parse

    if places not in (None, *_PLACES):
        raise InputError(
            message(
                "There is no such place to count from.", {"asked": f"--places {places}"}, fix="cache or text"
            )
        )
    sparse = None if pattern is None else parse(pattern)
    place = device_named(device)
    check_output(json, (".json",))
    text = text_of(file)
    config = load_config(model)
    sparse = sparse or fitting(config)
    kind = reading_dtype(dtype, config, place)
    loaded, tokenizer = load_model(model, config=config, dtype=kind, device=place)
    ids, asked = encoded(tokenizer, text, question)
    check_tokens(loaded, ids)
    set_pattern(loaded, sparse)
    cache: PatternCache | None = None
    if places != "text":
        try:
            cache = StreamCache(loaded)
        except PatternError:
            if places == "cache":
                raise
    counted = "text" if cache is None else "cache"
    console = Console()
    if cache is None:
        cache = PatternCache(loaded, block=chunk)
        check_positions(loaded, len(ids) + len(asked) + answer)
    for note in notes(sparse, config, counted, len(ids)):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    with Progress() as progress:
        stream, task = Stream(loaded, cache), progress.task("reading")
        if isinstance(cache, StreamCache):
            with cache:
                found = stream.read(ids, chunk=chunk, progress=task)
                written = stream.write(asked, budget=answer, ends=ends_of(loaded))
        else:
            found = stream.read(ids, chunk=chunk, progress=task)
            written = stream.write(asked, budget=answer, ends=ends_of(loaded))
    said = tokenizer.decode(written, skip_special_tokens=True).strip()
    console.print(table(found, f"{Path(file).name}, {sparse}, places counted in the {counted}"))
    console.print(question or "Summary", style="bold", highlight=False, markup=False)
    console.print(said or "(nothing)", highlight=False, markup=False)
    if json is not None:
        figures = {
            "file": file,
            "model": model or "default",
            "pattern": str(sparse),
            "places": counted,
            "chunk": chunk,
            "checkpoints": [
                asdict(at) | {"perplexity": at.perplexity, "tokens_per_second": at.tokens_per_second}
                for at in found
            ],
            "question": question,
            "answer": said,
        }
        save(figures, json)
        console.print(f"figures in {json}", highlight=False, markup=False, soft_wrap=True)


def text_of(file: str) -> str:
    """Return the text in a file.

    Raises:
        InputError: there is nothing there, or a folder, or no text in it.
    """
    from longspan.text.documents import documents

    path = Path(file).expanduser()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise InputError(
            message(
                "There is no such file.",
                {"asked": f"to read {file!r}", "found": f"{found} at {path.absolute()}"},
                fix="the path of one text file",
            )
        )
    return documents(file)[0].text


def fitting(config: Any) -> Pattern:
    """Return four sinks and a window that fill a model's context together.

    Raises:
        InputError: its configuration does not say how long that is, or has no room for sinks.

    Example:
        >>> from types import SimpleNamespace
        >>> fitting(SimpleNamespace(max_position_embeddings=512))
        Streaming(508)
    """
    from longspan.pattern import Streaming

    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context <= _SINKS:
        raise InputError(
            message(
                "This model does not say how many tokens it reads.",
                {"found": f"max_position_embeddings {context}"},
                fix='--pattern "Streaming(1020, sinks=4)"',
            )
        )
    return Streaming(context - _SINKS, sinks=_SINKS)


def encoded(tokenizer: Any, text: str, question: str | None) -> tuple[Any, list[int]]:
    """Return the token ids of a text, with what opens one, and those of what is asked after it."""
    import numpy as np

    from longspan.text.documents import Document
    from longspan.text.encoding import encode, opening
    from longspan.text.prompt import asking
    from longspan.text.prompt import encoded as encoded_piece

    ids = encode([Document("text", text)], tokenizer).ids
    # The end token would tell the model that nothing follows.
    body = ids if tokenizer.eos_token_id is None else ids[:-1]
    whole = np.concatenate([np.array(opening(tokenizer), dtype=np.int64), body])
    return whole, encoded_piece(tokenizer, asking(question))


def ends_of(model: Any) -> list[int]:
    """Return the tokens with which a model ends a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def notes(pattern: Pattern, config: Any, places: str, length: int) -> list[str]:
    """Say what a reader should know of a pattern before a long text is read by it."""
    from longspan.derive.lifetime import live, most_live
    from longspan.pattern import Causal

    heads = config.num_attention_heads
    singles = {(pattern & Causal()).at_head(head, heads) for head in range(heads)}
    said = []
    if any(most_live(single, length=_TWICE) > most_live(single, length=_ONCE) for single in singles):
        said.append(f"{pattern} may read keys from far back for ever: the cache grows with the text.")
    context = getattr(config, "max_position_embeddings", length)
    farthest = max(
        (length - keys[0][0] for single in singles if (keys := live(single, at=length))), default=0
    )
    if places == "text" and farthest > context:
        said.append(
            f"Keys up to {farthest:,} tokens back are read at their places in the text, beyond the "
            f"{context:,} tokens that the model reads."
        )
    return said


def table(found: tuple[Checkpoint, ...], title: str) -> Table:
    """Return checkpoints as a table."""
    from rich.table import Table

    from longspan.size import size

    made = Table(title=title, title_justify="left")
    for name in ("tokens", "perplexity", "since the last", "tokens/s", "cache", "memory"):
        made.add_column(name, justify="right")
    for at in found:
        cells = [f"{at.tokens:,}", f"{at.perplexity:.3f}", f"{_exp(at.recent):.3f}"]
        made.add_row(*cells, f"{at.tokens_per_second:,.0f}", size(at.cache_bytes), size(at.memory_bytes))
    return made


def _exp(loss: float) -> float:
    import math

    return math.exp(loss)
