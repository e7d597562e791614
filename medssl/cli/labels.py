"""labels attach: join clinicians' labels to the series of an archive."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medssl.cli import show

app = typer.Typer(help="Bring clinicians' labels to the series of an archive.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


@app.callback()
def _labels() -> None:
    """Keep `attach` a sub-command although it is the only one."""


@app.command("attach")
def attach(
    file: Annotated[Path, typer.Argument(help="CSV with a key column and label columns.")],
    archive: Annotated[Path, typer.Option(help="Archive folder.")],
    by: Annotated[str, typer.Option(help="accession, mrn_date, study_uid, sop_uid or path: how FILE names an image.")],
    out: Annotated[Path, typer.Option("--out", help="CSV to write: series_id and the labels.")],
    columns: Annotated[str, typer.Option(help="Label columns to take, separated by commas; all but the key without it.")] = "",
    where: Annotated[str | None, typer.Option(help="SQL condition on the series to label.")] = None,
    json: Json = False,
) -> None:
    """Replace the hospital's key by the series id; what does not match is counted and never shown."""
    from medssl.archive.operations.labels import REASONS
    from medssl.archive.operations.labels import attach as run
    from medssl.archive.table import Archive

    names = [name.strip() for name in columns.split(",") if name.strip()]
    done = run(Archive.open(archive), file, out, by=by, columns=names, where=where)
    lines = [f"{done.n_series} series of {done.n_patients} patients got labels ({', '.join(done.columns)}); written to {out}"]
    lines += [f"  {count:>5}  {reason}: {REASONS[reason]}" for reason, count in done.lines.items()]
    show.result(asdict(done), json, "\n".join(lines))
