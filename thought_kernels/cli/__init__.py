"""The command line: `thought-kernels tokens | chats | transmute | generate | verify | inspect | export | ...`.

    options     the options that commands share, and loading
    tokens, transmute, ...      one command each

Commands exit with 0 when all is well, 1 with one sentence on stderr when a call is refused or a check fails, and 2 on
wrong usage. `thought-kernels --debug COMMAND ...` shows the traceback instead.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from thought_kernels.cli import (
    bench,
    chats,
    demo,
    evaluate,
    experiment,
    export,
    generate,
    import_vector,
    inspect,
    options,
    push,
    tokens,
    toy,
    transmute,
    verify,
)
from thought_kernels.version import __version__

__all__ = ["app", "main"]

# What refused input and unreadable files raise; anything else is a bug, whose traceback is wanted.
_REFUSALS = (ValueError, TypeError, OSError, ImportError)


class _Commands(TyperGroup):
    """Turns a refusal into its sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _REFUSALS as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):  # typer ends that one quietly
                raise
            options.complain(str(error) or type(error).__name__)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn an instruction into a weight update, and see what it does.",
)


def _version(wanted: bool) -> None:
    if wanted:
        options.out.print(f"thought-kernels {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Turn an instruction into a weight update, and see what it does."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
    if not debug:
        warnings.showwarning = options.show_warning


app.command("tokens")(tokens.tokens)
app.command("chats")(chats.chats)
app.command("transmute")(transmute.transmute)
app.command("generate")(generate.generate)
app.command("verify")(verify.verify)
app.command("demo")(demo.demo)
app.command("evaluate")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("export")(export.export)
app.command("import")(import_vector.import_vector)
app.command("push")(push.push)
app.command("bench")(bench.bench)
app.add_typer(experiment.app, name="experiment")
app.add_typer(toy.app, name="toy")


def main() -> None:
    """Runs the command line on sys.argv; the `thought-kernels` script.

    What an output's encoding cannot write, such as ‖Δ‖ in cp1252, becomes "?": work that is done must not end in an
    error because of a letter.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be absent, or somebody's own
            stream.reconfigure(errors="replace")
    app()
