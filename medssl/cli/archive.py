"""archive ls, split, leakage, withdraw, release: operations on an index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from medssl.cli import show

app = typer.Typer(help="Look into an archive index, split it, compare it, withdraw from it, release counts.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Index = Annotated[Path, typer.Argument(help="Archive folder.")]
Key = Annotated[Path | None, typer.Option(help="Your id key, where it is not inside the archive.")]
SHOWN = 5


@app.command("ls")
def ls(
    archive: Index,
    where: Annotated[str | None, typer.Option(help="SQL condition, for instance \"modality = 'MR' and n_slices > 32\".")] = None,
    limit: Annotated[int, typer.Option(help="Rows to show.")] = 20,
    rejected: Annotated[bool, typer.Option("--rejected", help="Rows that cannot be read as an image, too.")] = False,
    json: Json = False,
) -> None:
    """List series, and say how many a condition lost to values that are unknown."""
    from medssl.archive.table import Archive

    found = Archive.open(archive).choose(where, rejected=rejected)
    columns = ["series_id", "modality", "domain", "shape", "spacing_mm", "split", "status", *(["reason"] if rejected else [])]
    cells = [[_short(getattr(row, name)) for name in columns] for row in found.rows[:limit]]
    lines = [show.table(cells, columns)]
    if len(found.rows) > limit:
        lines.append(f"... {len(found.rows) - limit} more (--limit)")
    lines.append(f"{len(found.rows)} series")
    if found.n_undecided:
        lines.append(f"{found.n_undecided} series lost because a value is unknown ({_counts(found.unknown)})")
    if found.n_rejected and not rejected:
        lines.append(f"{found.n_rejected} more meet the condition but cannot be used (--rejected shows them)")
    result = {
        "series": [asdict(row) for row in found.rows],
        "n_series": len(found.rows),
        "n_lost_to_unknown": found.n_undecided,
        "unknown": found.unknown,
        "n_rejected": found.n_rejected,
    }
    show.result(result, json, "\n".join(lines))


@app.command("split")
def split(
    archive: Index,
    fractions: Annotated[str, typer.Option(help="Of patients.")] = "train=0.8,val=0.1,test=0.1",
    by: Annotated[str, typer.Option(help="Columns in whose values the fractions hold too, for instance modality,site.")] = "",
    seed: Annotated[int, typer.Option(help="Another one draws another split, for patients not decided yet.")] = 0,
    merge: Annotated[
        Path | None, typer.Option(help="CSV patient,same_as[,issuer,same_as_issuer]: two PatientIDs of one person.")
    ] = None,
    key_file: Key = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Forget earlier draws: runs made with them are not disjoint from the new test.")
    ] = False,
    json: Json = False,
) -> None:
    """Split the patients; whoever has a split keeps it, also when the archive grows."""
    from medssl.archive.operations.split import read_fractions, split_archive
    from medssl.archive.table import Archive

    names = [name.strip() for name in by.split(",") if name.strip()]
    done = split_archive(
        Archive.open(archive), read_fractions(fractions), by=names, seed=seed, merge=merge, key_file=key_file, redraw=redraw
    )
    splits = ("train", "val", "test", "unknown")
    cells = [["patients", *(done.patients[name] for name in splits)], ["series", *(done.series[name] for name in splits)]]
    if names:
        cells += [[f"  {stratum}", *(counts[name] for name in splits)] for stratum, counts in done.strata.items()]
    lines = [show.table(cells, ["", *splits]), f"{done.n_kept} patients had a split and keep it, {done.n_drawn} were drawn"]
    if done.n_moved:
        lines.append(f"{done.n_moved} patients moved: they are tied to a more exposed split, or a splits table says so")
    if done.n_torn:
        lines.append(f"{done.n_torn} patients are in two splits because the splits table says so: correct it")
    if done.n_no_patient:
        lines.append(
            f"{done.n_no_patient} series stay unknown: nobody knows whose they are, so they could be a test patient's "
            "(a splits table with the column patient tells, see medssl index --splits)"
        )
    show.result(asdict(done), json, "\n".join([*lines, *_notes(done.notes)]))


@app.command("leakage")
def leakage(
    archive: Index,
    against: Annotated[Path, typer.Option(help="The other archive, or the same one with two conditions.")],
    where: Annotated[str | None, typer.Option(help="SQL condition on the first, for instance \"split = 'train'\".")] = None,
    against_where: Annotated[str | None, typer.Option(help="SQL condition on the other.")] = None,
    distance: Annotated[int, typer.Option(help="Bits of 64 by which perceptual hashes may differ.")] = 4,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with status 1 when anything is found, for scripts.")] = False,
    json: Json = False,
) -> None:
    """Find patients and images that two archives share."""
    from medssl.archive.operations.leakage import find_leakage
    from medssl.archive.table import Archive

    found = find_leakage(Archive.open(archive), Archive.open(against), where=where, against_where=against_where, distance=distance)
    lines = [f"{found.n_series[0]} series against {found.n_series[1]}"]
    if found.n_patients is None:
        lines.append("patients: not compared")
    else:
        a, b = (len(ids) for ids in found.patient_series)
        lines.append(f"patients: {found.n_patients} in both, with {a} and {b} series" + _some(found.patient_series[0]))
    lines.append(f"equal files: {len(found.files)} pairs" + _some(left for left, _ in found.files))
    if found.content is None or found.perceptual is None:
        lines += ["equal pixels: not compared", "perceptual hashes: not compared"]
    else:
        lines.append(f"equal pixels: {len(found.content)} pairs" + _some(left for left, _ in found.content))
        near = f"perceptual hashes within {distance} bits: {len(found.perceptual)} pairs to look at"
        lines.append(near + _some(left for left, _, _ in found.perceptual))
    show.result({"found": found.found, **asdict(found)}, json, "\n".join([*lines, *_notes(found.notes)]))
    if fail and found.found:
        raise typer.Exit(1)


@app.command("withdraw")
def withdraw(
    archive: Index,
    request: Annotated[Path, typer.Argument(help="CSV kind,value[,issuer]: patient, accession, study_uid, series_id ...")],
    store: Annotated[list[Path] | None, typer.Option(help="Store folder outside the archive; may be given again.")] = None,
    embeddings: Annotated[list[Path] | None, typer.Option(help="Folder of embeddings; may be given again.")] = None,
    runs: Annotated[
        list[Path] | None, typer.Option(help="Folder to look through for runs and exports; may be given again.")
    ] = None,
    key_file: Key = None,
    json: Json = False,
) -> None:
    """Withdraw patients, studies or series; what is withdrawn stays so when it is indexed again."""
    from medssl.archive.operations.withdraw import withdraw as run
    from medssl.archive.table import Archive

    done = run(Archive.open(archive), request, stores=store or [], embeddings=embeddings or [], runs=runs or [], key_file=key_file)
    lines = [
        f"{done.n_series} series of {done.n_patients} patients are withdrawn, {done.n_new} of them new",
        f"deleted: {done.n_stored} files in stores, {done.n_embeddings} embeddings",
    ]
    if done.n_unmatched:
        lines.append(f"lines that match nothing now: {_counts(done.n_unmatched)}")
    if done.n_several:
        lines.append(
            f"{done.n_several} PatientIDs stand for several patients; all were withdrawn (the column issuer tells them apart)"
        )
    for one in done.runs:
        lines.append(f"seen by run {one['run']}: {one['series']} series ({_counts(one['splits'])})")
    lines += [f"  weights: {path}" for path in done.exports]
    if not runs:
        lines.append("runs and exports that saw them were not looked for (--runs FOLDER)")
    elif not done.runs:
        lines.append("no run under the folders given saw them")
    show.result(asdict(done), json, "\n".join([*lines, *_notes(done.notes)]))


@app.command("release")
def release(
    archive: Index,
    out: Annotated[Path, typer.Option("--out", help="Folder for release.json and release.csv; new or empty.")],
    k: Annotated[int, typer.Option("--k", help="Smallest number of patients that is shown.")] = 10,
    where: Annotated[str | None, typer.Option(help="SQL condition on the rows to count.")] = None,
    json: Json = False,
) -> None:
    """Write counts that are made to leave the house: patients per cell, small cells and their complements hidden."""
    from medssl.archive.operations.release import release as run
    from medssl.archive.table import Archive

    done = run(Archive.open(archive), out, k=k, where=where)
    hidden = sum(counts["patients"] is None for cells in done.tables.values() for counts in cells.values())
    cells = sum(len(counts) for counts in done.tables.values())
    lines = [f"{done.n_patients} patients in {len(done.tables)} tables of {cells} cells, {hidden} hidden; written to {out}"]
    if done.left_out:
        lines.append(f"tables left out because every cell would be hidden: {', '.join(done.left_out)}")
    if done.n_left_out_series:
        lines.append(
            f"{done.n_left_out_series} series without a patient identity are not counted (this line is for you, not released)"
        )
    lines.append("two releases of a growing archive can be subtracted from each other by whoever holds both")
    show.result({"out": str(out), **done.content()}, json, "\n".join(lines))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {n}" for name, n in counts.items())


def _some(ids: Any) -> str:
    unique = list(dict.fromkeys(ids))
    if not unique:
        return ""
    more = f" and {len(unique) - SHOWN} more, see --json" if len(unique) > SHOWN else ""
    return f" (series {', '.join(name[:8] for name in unique[:SHOWN])}{more})"


def _notes(notes: list[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) == 32:
        return value[:8]
    if isinstance(value, tuple | list):
        return "x".join(f"{v:g}" for v in value)
    return "" if value is None else str(value)
