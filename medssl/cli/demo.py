"""demo: the whole road in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medssl.cli import show


def demo(
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with images/ labels/ split.csv; default: generated phantoms.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; a finished demo there is overwritten.")] = Path("demo-out"),
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Index, cache, pretrain, evaluate, fine-tune (pretrained and scratch), export, report: minutes on a laptop CPU."""
    from medssl.cli.training import summary_table
    from medssl.demo import run_demo

    result = run_demo(data, out, say=lambda text: show.say(text, json), progress=lambda what: show.progress(what, quiet=json))
    note = "Both had the same few steps: a difference here is a faster start. What is left at the end: docs/results.md"
    show.result(result, json, f"\n{summary_table(result['summary'])}\n{note}\n\nreport: {result['report']}")
