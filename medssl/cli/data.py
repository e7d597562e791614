"""index, cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medssl.cli import show

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from medssl.domains.pixel_pass import PixelSummary

Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]


def index(
    sources: Annotated[list[Path], typer.Argument(help="Folders or files to scan.")],
    out: Annotated[Path, typer.Option("--out", help="Archive folder to write; run again to add what is new or changed.")],
    site: Annotated[str, typer.Option(help="Your name for where the images come from.")] = "unknown",
    modality: Annotated[
        str, typer.Option(help="MR, CT, CR, DX, RG, US, SM or GM, for files that do not say (NIfTI, NRRD, MHA, pictures, videos).")
    ] = "unknown",
    splits: Annotated[Path | None, typer.Option(help="CSV with file,split[,patient]: which image is train, val or test.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Your secret key for pseudonymous ids; made in OUT/private when absent.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes (threads for few files).")] = 2,
    dask: Annotated[str | None, typer.Option(help="Address of a Dask scheduler whose workers see the same paths.")] = None,
    only: Annotated[Path | None, typer.Option("--list", help="Text file of changed paths; nothing else is looked at.")] = None,
    prune: Annotated[str | None, typer.Option(help="dir-mtime: do not list folders whose time of change is the same.")] = None,
    settle: Annotated[float, typer.Option(help="Leave files changed within the last seconds for the next run.")] = 0.0,
    limit: Annotated[float, typer.Option(help="Seconds after which a file, or with --pixels a series, is left behind.")] = 600.0,
    max_rate: Annotated[float | None, typer.Option(help="Files per second at most.")] = None,
    pixels: Annotated[
        bool,
        typer.Option("--pixels", help="Read every series too: hashes, near-duplicates, blank or saturated images, text in them."),
    ] = False,
    json: Json = False,
) -> None:
    """Scan folders into one table: every file is accounted for, nothing is copied."""
    from medssl.archive.index import ScanOptions
    from medssl.archive.index import index as run
    from medssl.archive.scanning.cluster import executor_of
    from medssl.errors import RequestError

    if prune not in (None, "dir-mtime"):
        raise RequestError(f"prune: {prune!r}; dir-mtime is accepted; leave the option out to list every folder")
    with executor_of(dask) as executor:
        options = ScanOptions(
            workers, executor, only=only, prune=prune is not None, settle_s=settle, limit_s=limit, max_rate=max_rate
        )
        with show.progress("index", quiet=json) as update:
            summary = run(
                sources, out, site=site, modality=modality, splits=splits, key_file=key_file, options=options, on_progress=update
            )
        looked = _look(out, workers, executor, limit, json) if pixels else None
    lines = [f"{summary.n_files_seen} files seen, {summary.n_files_used} used in {summary.n_series} series; index in {out}"]
    lines += [f"  {count:>5}  {reason}" for reason, count in sorted(summary.reasons.items())]
    found = asdict(summary)
    if looked is not None:
        found["pixels"] = asdict(looked)
        lines += _pixel_lines(looked)
    show.result(found, json, "\n".join(lines))


def _look(out: Path, workers: int, executor: Executor | None, limit: float, json: bool) -> PixelSummary:
    from medssl.domains.pixel_pass import look_at_pixels

    with show.progress("pixels", quiet=json) as update:
        return look_at_pixels(out, workers=workers, executor=executor, limit_s=limit, on_progress=update)


def _pixel_lines(looked: PixelSummary) -> list[str]:
    near = looked.near_duplicates
    lines = [
        f"{looked.looked_at} series looked at now; the pixels of {looked.read} of {looked.series} are known",
        *(f"  {count:>5}  not read: {reason}" for reason, count in looked.failed.items()),
        *(f"  {count:>5}  flagged: {flag}" for flag, count in looked.flags.items()),
        *(f"series {name} took too long and was left behind; the next run tries it again" for name in looked.left_behind),
        f"{near['groups']} groups of near-duplicates with {near['series']} series; "
        f"{near['groups_of_several_patients']} of them hold several patients",
    ]
    return lines


def cache(
    recipe: Annotated[Path, typer.Argument(help="Recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value changes.")] = None,
    json: Json = False,
) -> None:
    """Write the chunked store that a recipe needs (pretrain does it when it is missing)."""
    from medssl import api

    with show.progress("cache", quiet=json) as update:
        done = api.cache(recipe, overrides or [], on_progress=update)
    lines = []
    for name, facts in done.items():
        lines.append(
            f"{name}: {facts['written']} written, {facts['present']} present, {len(facts['failed'])} failed; {facts['store']}"
        )
        lines += show.failures(facts["failed"])
    show.result(done, json, "\n".join(lines))
