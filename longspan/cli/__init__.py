"""The command line: one file per command, put together here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from longspan.cli.demo import command as demo_command
from longspan.cli.digest import command as digest_command
from longspan.cli.eval import command as eval_command
from longspan.cli.extend import command as extend_command
from longspan.cli.plan import command as plan_command
from longspan.cli.read import command as read_command
from longspan.cli.show import command as show_command
from longspan.errors import LongspanError
from longspan.version import version as installed

app = typer.Typer(
    name="longspan",
    help="Extend the context of pretrained language models, and measure that it worked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("extend")(extend_command)
app.command("eval")(eval_command)
app.command("plan")(plan_command)
app.command("read")(read_command)
app.command("digest")(digest_command)
app.command("show")(show_command)
app.command("demo")(demo_command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"longspan {installed('longspan') or 'not installed'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line: errors in the input leave with their message and code 2, Ctrl-C with code 130."""
    try:
        app()
    except LongspanError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
