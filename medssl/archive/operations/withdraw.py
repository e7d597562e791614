"""Withdraw patients, studies or series: rows, stored chunks, embeddings; and name the runs that saw them.

The request is a CSV with the columns `kind,value` and optionally `issuer`, one line per thing to withdraw:

    patient      PatientID as the hospital writes it (also called mrn)
    patient_id   pseudonymous patient id of the index
    accession    accession number
    study_uid    StudyInstanceUID
    study_id     pseudonymous study id
    series_id    pseudonymous series id

What is asked for is written down first, in `private/withdrawn.parquet`, then things are deleted: stopped at any point, the
same command finishes the work, and images that come back later are withdrawn again when they are indexed. Splits stay as
they are, so that nobody else moves. Weights that were trained on withdrawn images still exist: the result names the runs
and the exports, and what to do about them is the owner's decision.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive._parquet import connect, quote, write_json, write_query, write_table
from medssl.archive.headers.containers import forget_unpacked
from medssl.archive.ids import normalise
from medssl.archive.operations.decisions import WITHDRAWN_COLUMNS, apply_withdrawals, load_series, read_withdrawn, write_series
from medssl.archive.operations.owner import LISTED, columns_of, locked, owner_files, owner_key, owner_series, study_uid_of
from medssl.archive.pixels.found import forget_pixels
from medssl.archive.table import FILE_COLUMNS, Archive
from medssl.errors import RequestError, StoreError, near

KINDS = ("patient", "patient_id", "accession", "study_uid", "study_id", "series_id")
_ALIASES = {"mrn": "patient", "patientid": "patient", "accessionnumber": "accession", "studyinstanceuid": "study_uid"}
_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_MANIFEST_BYTES = 1 << 20


@dataclass
class Withdrawal:
    """What `withdraw` did; nothing in it names a person.

    Args:
        n_lines: Lines of the request, by kind.
        n_unmatched: Of these, lines that match nothing in the index now, by kind. They are remembered where that is possible.
        n_several: Lines of kind `patient` that stand for more than one patient (other issuers); all of them were withdrawn.
        n_series: Withdrawn series in the index, earlier ones included.
        n_new: Of these, not withdrawn before.
        n_patients: Patients they belong to.
        n_stored: Files deleted in the stores.
        n_embeddings: Files deleted among the embeddings.
        runs: Run folders whose items table holds withdrawn series: folder, series, by split.
        exports: Manifests of weights made by these runs.
        notes: What could not be done.
    """

    n_lines: dict[str, int] = field(default_factory=dict)
    n_unmatched: dict[str, int] = field(default_factory=dict)
    n_several: int = 0
    n_series: int = 0
    n_new: int = 0
    n_patients: int = 0
    n_stored: int = 0
    n_embeddings: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def withdraw(
    archive: Archive,
    request: Path,
    *,
    stores: Sequence[Path] = (),
    embeddings: Sequence[Path] = (),
    runs: Sequence[Path] = (),
    key_file: Path | None = None,
) -> Withdrawal:
    """Withdraw what a file lists. Doing it again changes nothing.

    Args:
        archive: The index; its folder must be writable.
        request: The CSV described above.
        stores: Store folders, or folders that hold several; `ARCHIVE/store` is always looked at.
        embeddings: Folders of embeddings.
        runs: Folders to look through for runs and exports.
        key_file: The owner's id key where it is not inside the index; patients without a stored PatientID need it.

    Raises:
        RequestError: The request cannot be read or a folder is missing. Nothing was written.
        StoreError: Deleting or writing failed; run the same command again.
    """
    lines = read_request(request)
    for folder in (*stores, *embeddings, *runs):
        if not folder.is_dir():
            raise RequestError(
                f"{folder} is not a folder; name the folders of stores, embeddings and runs, or leave the option out"
            )
    found = Withdrawal(n_lines=dict(Counter(kind for kind, _, _ in lines)))
    private = archive.path / "private"
    with locked(archive):
        listed = read_withdrawn(private) | _resolve(archive, lines, key_file, found)
        records = ({"kind": kind, "value": value} for kind, value in sorted(listed))
        write_table(private / "withdrawn.parquet", WITHDRAWN_COLUMNS, records)
        gone = _mark(archive, found)
        forget_pixels(private)
    try:
        forget_unpacked(private / "unpacked")  # copies from zip and tar files, theirs among them
    except OSError as err:
        raise StoreError(
            f"{private / 'unpacked'} cannot be deleted ({err.strerror}); check its permissions and run the same command again"
        ) from err
    usual = archive.path / "store"
    for folder in dict.fromkeys([*stores, *([usual] if usual.is_dir() else [])]):
        found.n_stored += delete_items(folder, gone)
    for folder in embeddings:
        found.n_embeddings += delete_items(folder, gone)
    found.runs, hashes = _runs(runs, gone, found)
    found.exports = _exports(runs, hashes)
    return found


def read_request(path: Path) -> list[tuple[str, str, str]]:
    """Return (kind, value, issuer) per line of a request; values are never part of a message.

    Raises:
        RequestError: It cannot be read, a line has no value or a kind that is not known.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = [(n, [cell.strip() for cell in row]) for n, row in enumerate(csv.reader(handle), start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise RequestError(f"{path} cannot be read ({type(err).__name__}); a CSV with lines kind,value is needed") from err
    lines = []
    for n, row in rows:
        if not any(row) or row[0].startswith("#") or [cell.lower() for cell in row[:2]] == ["kind", "value"]:
            continue
        kind = row[0].lower().replace(" ", "")
        kind = _ALIASES.get(kind, kind)
        if kind not in KINDS:
            # A first cell that is no kind may be an identifier: say where it is and not what it is.
            guess = near(kind, KINDS) if len(kind) < 16 and kind.replace("_", "").isalpha() else ""
            raise RequestError(f"{path}, line {n}: the first column is no kind{guess}; {', '.join(KINDS)} are accepted")
        if len(row) < 2 or not row[1]:
            raise RequestError(f"{path}, line {n}: no value; lines are kind,value or kind,value,issuer")
        lines.append((kind, row[1], row[2] if len(row) > 2 else ""))
    if not lines:
        raise RequestError(f"{path} lists nothing; lines are kind,value with a kind of {', '.join(KINDS)}")
    return lines


def _resolve(
    archive: Archive, lines: Sequence[tuple[str, str, str]], key_file: Path | None, found: Withdrawal
) -> set[tuple[str, str]]:
    """Return the (kind, value) to write down, and count lines that match nothing."""
    key = owner_key(archive, key_file)
    rows = archive.select(rejected=True)
    by_id = {row.series_id: row for row in rows}
    patients, studies, sites = ({getattr(row, name) for row in rows} for name in ("patient_id", "study_id", "site"))
    owner = owner_series(archive, ["mrn", "issuer", "accession", "study_uid", "uids"])
    by_mrn: dict[str, set[tuple[str, str]]] = defaultdict(set)
    by_uid: dict[str, set[str]] = defaultdict(set)
    accessions: set[str] = set()
    for record in owner.rows:
        row = by_id.get(record["series_id"])
        if row is None:
            continue
        if record["mrn"]:
            by_mrn[normalise(record["mrn"])].add((normalise(record["issuer"] or ""), row.patient_id))
        uid = study_uid_of(record)
        if uid:
            by_uid[normalise(uid)].add(row.study_id)
        if record["accession"]:
            accessions.add(record["accession"].strip())
    kinds = {kind for kind, _, _ in lines}
    if "accession" in kinds and "accession" in owner.missing:
        found.notes.append("the index holds no accession numbers, so none can match now; they are remembered for images that come")
    if "patient" in kinds and key is None:
        found.notes.append(
            "without the id key (--key-file) only PatientIDs that the index holds are matched, and absent ones are forgotten"
        )
    unmatched: Counter[str] = Counter()
    listed: set[tuple[str, str]] = set()
    for kind, value, issuer in lines:
        text = normalise(value)
        new: set[tuple[str, str]]
        if kind == "patient":
            known = {who for where, who in by_mrn.get(text, ()) if not issuer or where == normalise(issuer)}
            # A PatientID that is a placeholder has ids per study and no id of its own; made here, its id matches nobody.
            made = {key.make("patient", name, text) for name in ([issuer] if issuer else sorted({"", *sites}))} if key else set()
            known |= made & patients
            found.n_several += len(known) > 1
            unmatched[kind] += not known
            new = {("patient_id", who) for who in known | made}
        elif kind == "study_uid":
            known = set(by_uid.get(text, ()))
            made = {key.make("study", "", text)} if key else set()
            known |= made & studies
            unmatched[kind] += not known
            new = {("study_id", study) for study in known | made}
        elif kind == "accession":
            unmatched[kind] += value.strip() not in accessions
            new = {("accession", value.strip())}
        else:
            name = text.lower()
            unmatched[kind] += name not in {"patient_id": patients, "study_id": studies, "series_id": by_id}[kind]
            new = {(kind, name)}
        listed |= new
    found.n_unmatched = {kind: n for kind, n in unmatched.items() if n}
    series = {value for kind, value in listed if kind == "series_id"}
    if series:  # by their files too: a better reader may give the same images another series id
        files = owner_files(archive, ["digest"], f"series_id {LISTED}", sorted(series))
        listed |= {("digest", file["digest"]) for file in files.rows if file["digest"]}
    return listed


def _mark(archive: Archive, found: Withdrawal) -> set[str]:
    """Reject what is listed, in the tables of series and of files; return the withdrawn series."""
    private = archive.path / "private"
    connection = connect()
    try:
        load_series(archive, connection)
        connection.execute(f"CREATE VIEW p AS SELECT * FROM read_parquet({quote(private / 'series.parquet')})")
        connection.execute(f"CREATE VIEW f AS SELECT * FROM read_parquet({quote(private / 'files.parquet')})")
        before = connection.execute("SELECT count(*) FROM s WHERE reason = 'withdrawn'").fetchone()[0]
        has_accession = "accession" in columns_of(private / "series.parquet")
        apply_withdrawals(connection, private, accession=has_accession)
        _write_files(archive, connection)
        write_series(archive, connection)
        count = "SELECT count(*), count(DISTINCT patient_id) FROM s WHERE reason = 'withdrawn'"
        found.n_series, found.n_patients = connection.execute(count).fetchone()
        found.n_new = found.n_series - before
        return {row[0] for row in connection.execute("SELECT series_id FROM withdrawn_series").fetchall()}
    finally:
        connection.close()


def _write_files(archive: Archive, connection: Any) -> None:
    """Write the file table with the reason of withdrawn series as new parts; the manifest, swapped last, names those that count."""
    folder = archive.path / "files.parquet"
    manifest = json.loads((folder / "manifest.json").read_text())
    old = sorted(folder.glob("part-*.parquet"))
    number = int(old[-1].stem.partition("-")[2]) + 1
    reason = "CASE WHEN series_id IN (SELECT series_id FROM withdrawn_series) THEN 'withdrawn' ELSE reason END"
    others = ", ".join(name for name in FILE_COLUMNS if name != "reason")
    parts: list[str] = []
    for part in manifest["parts"]:
        name = f"part-{number + len(parts):08d}.parquet"
        write_query(folder / name, f"SELECT {others}, {reason} AS reason FROM read_parquet({quote(folder / part)})", connection)
        parts.append(name)
    write_json(folder / "manifest.json", {**manifest, "parts": parts})
    for path in old:
        path.unlink(missing_ok=True)
    if "reason" in columns_of(archive.path / "private" / "files.parquet"):
        query = f"SELECT * REPLACE ({reason} AS reason) FROM f"
        write_query(archive.path / "private" / "files.parquet", query, connection)


def delete_items(folder: Path, series_ids: Iterable[str]) -> int:
    """Delete every file below a folder that is named after one of these series; return how many.

    Records (.json) go first, so that no reader meets an item whose voxels are gone. Links are not followed.

    Raises:
        StoreError: A file could not be deleted.
    """
    gone = set(series_ids)
    n = 0
    for place, names, files in os.walk(folder):
        names.sort()
        doomed = [name for name in files if any(found in gone for found in _ID.findall(name))]
        for name in sorted(doomed, key=lambda name: (not name.endswith(".json"), name)):
            try:
                os.unlink(os.path.join(place, name))
            except OSError as err:
                raise StoreError(
                    f"{folder}: a file of series {_ID.findall(name)[0]} could not be deleted ({err.strerror}); "
                    "the rows are withdrawn: mend the rights and run the same command again"
                ) from err
            n += 1
    return n


def _runs(folders: Sequence[Path], gone: set[str], found: Withdrawal) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the runs whose items hold withdrawn series, and their items hashes."""
    runs, hashes = [], set()
    for path in _below(folders, ("items.parquet",)):
        connection = connect()
        try:
            rows = connection.execute(f"SELECT series_id, split FROM read_parquet({quote(path)})").fetchall()
        except Exception as err:  # whatever DuckDB makes of a damaged table
            found.notes.append(f"{path} cannot be read ({type(err).__name__}): whether this run saw withdrawn series is not known")
            continue
        finally:
            connection.close()
        seen = Counter(str(split) for series, split in rows if series in gone)
        if seen:
            runs.append({"run": str(path.parent), "series": seen.total(), "splits": dict(sorted(seen.items()))})
            facts = _json(path.parent / "run.json")
            if facts.get("items_hash"):
                hashes.add(str(facts["items_hash"]))
            else:
                found.notes.append(f"{path.parent} names no items_hash in run.json: its exports cannot be told")
    return runs, hashes


def _exports(folders: Sequence[Path], hashes: set[str]) -> list[str]:
    """Return the manifests of weights that name one of these items tables."""
    if not hashes:
        return []
    paths = (path for path in _below(folders, (".json",)) if path.name != "run.json")
    return [str(path) for path in paths if str(_json(path).get("items_hash", "")) in hashes]


def _below(folders: Sequence[Path], ends: tuple[str, ...]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        for place, names, files in os.walk(folder):
            names.sort()
            for name in sorted(files):
                path = Path(place, name)
                if name.endswith(ends) and not name.startswith(".") and path.resolve() not in seen:
                    seen.add(path.resolve())
                    yield path


def _json(path: Path) -> dict[str, Any]:
    """Return a small JSON object, or nothing when it is none."""
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            return {}
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
