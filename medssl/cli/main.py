"""The command line: exit status 0 done, 2 the request is wrong and nothing was written, 1 it failed while running."""

from __future__ import annotations

import os
import sys

import typer

from medssl._compat.quiet import silence_libraries
from medssl.cli import archive, card, data, demo, importing, info, labels, matching, results, training
from medssl.errors import MedsslError

app = typer.Typer(
    name="medssl",
    help="Self-supervised pretraining for medical images: from an archive of files to weights that load into MONAI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("index")(data.index)
app.command("cache")(data.cache)
app.add_typer(archive.app, name="archive")
app.add_typer(labels.app, name="labels")
app.add_typer(card.card_app, name="card")
app.command("pretrain")(training.pretrain)
app.command("finetune")(training.finetune)
app.command("label-curve")(training.label_curve)
app.command("embed")(matching.embed)
app.command("match")(matching.match)
app.command("evaluate")(results.evaluate)
app.command("export")(results.export)
app.command("membership")(results.membership)
app.command("import")(importing.import_)
app.command("report")(results.report)
app.add_typer(info.recipe_app, name="recipe")
app.add_typer(info.runs_app, name="runs")
app.command("doctor")(info.doctor)

STOPPED = "stopped by the keyboard; what was written is complete, the same command continues (pretrain: add --resume)"
INTERRUPTED = 130
"""What typer returns for Ctrl-C inside a command, in place of the exception."""


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from medssl import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit status."""
    # read by OpenMP when torch loads: threads that spin at a barrier make a step five times slower on a shared machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    silence_libraries()
    try:
        status = app(argv, standalone_mode=False)
    except MedsslError as err:
        fail(str(err), err.exit_code)
    except KeyboardInterrupt:
        fail(STOPPED, 1)
    except typer.Abort:
        fail("aborted", 1)
    except Exception as err:
        if _is_usage(err):
            fail(err.format_message(), 2)  # type: ignore[attr-defined]
        if os.environ.get("MEDSSL_DEBUG"):
            raise
        place = _place(err)
        fail(
            f"an error in medssl itself: {type(err).__name__} at {place}. Please report it with these words. The message of the error is "
            "not shown because it may quote file content; MEDSSL_DEBUG=1 shows everything",
            1,
        )
    if status == INTERRUPTED:
        fail(STOPPED, 1)
    sys.exit(status if isinstance(status, int) else 0)


def fail(message: str, status: int) -> None:
    """Print a message to stderr and exit."""
    typer.echo(f"medssl: {message}", err=True)
    sys.exit(status)


def _is_usage(err: Exception) -> bool:
    return hasattr(err, "format_message") and hasattr(err, "exit_code")


def _place(err: BaseException) -> str:
    """Return module:line of the innermost frame inside medssl."""
    found = "?"
    trace = err.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("medssl"):
            found = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
