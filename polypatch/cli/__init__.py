"""The command line: one file a command. Heavy imports stand inside the commands."""

from __future__ import annotations

import sys

import typer

from ..errors import PolypatchError
from . import (
    apply,
    claim,
    compare,
    convert,
    evaluate,
    forecast,
    inspect,
    papers,
    patches,
    predict,
    train,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="polypatch",
    help="Adaptive-patch transformers: compare ways of cutting data into tokens on your own data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("compare")(compare.command)
app.command("train")(train.command)
app.command("evaluate")(evaluate.command)
app.command("predict")(predict.command)
app.command("forecast")(forecast.command)
app.command("apply")(apply.command)
app.command("inspect")(inspect.command)
app.command("convert")(convert.command)
app.command("papers")(papers.command)
app.command("patches")(patches.command)
app.command("claim")(claim.command)


def main() -> None:
    """Run the command line. What the user can mend is one sentence and exit code 2."""
    try:
        app()
    except PolypatchError as error:
        print(f"polypatch: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("polypatch: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
