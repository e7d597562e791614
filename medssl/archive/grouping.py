"""From scan parts to the tables of the index, in memory that does not grow with the archive.

DuckDB sorts the scan rows by group (spilling to `private/spill`), Python builds one group after the other, and only groups that have
changed are built again (`archive.changed`): the rows of all others are copied from the tables that are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from medssl.archive._parquet import (
    ROW_GROUP,
    TableWriter,
    connect,
    files_of,
    quote,
    short,
    stream,
    write_json,
    write_query,
    write_table,
)
from medssl.archive.changed import find_changed, name_anew
from medssl.archive.ids import IdKey, file_id
from medssl.archive.known import PATH_ID, TOLD, open_known, parts_of, scan_parts, scanned, wide
from medssl.archive.operations.decisions import apply_splits, apply_withdrawals
from medssl.archive.paths import to_path
from medssl.archive.pixels.found import apply_pixels
from medssl.archive.rows.base import Choice, Scanned, as_record
from medssl.archive.rows.series import build_group
from medssl.archive.rows.twins import join_twins
from medssl.archive.scanning.scan import short_hash, whole_digest
from medssl.archive.table import FILE_COLUMNS, PRIVATE_FILE_COLUMNS, PRIVATE_SERIES_COLUMNS, SERIES_COLUMNS

PART_ROWS = 500_000
CHUNK = 2048
BUCKET_ROWS, MAX_BUCKETS = 20_000, 96
"""Rows sorted at a time, as long as that makes no more files than DuckDB keeps open (100)."""
MARK_COLUMNS = {"mark": "VARCHAR", "group_key": "VARCHAR"}
CONFIRMED_COLUMNS = {"path": "VARCHAR", "mtime_ns": "BIGINT", "whole": "VARCHAR"}
OUTPUTS = ("private/files.parquet", "private/series.parquet", "private/rows.parquet", "private/marks.parquet", "series.parquet")
OLD = {"files": "files.parquet", "private": "series.parquet", "series": "rows.parquet"}
"""What is built anew -> the table in `private/` that it joins."""
UNFINISHED = "unfinished"
"""Lies in `private/` while tables are being replaced: after a kill they are all built again."""


def regroup(
    out: Path,
    key: IdKey,
    choose: Callable[[str], Choice],
    *,
    anew: bool,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `series.parquet`, `files.parquet/` and their private halves.

    Args:
        out: Folder of the index.
        key: The owner's key.
        choose: What the user said about a path (as text).
        anew: Build everything again, not only what has changed.
        on_progress: Called with (files placed, files to place).

    Raises:
        StoreError: The disk is full or failing; the tables that were there stay.
    """
    private = out / "private"
    shutil.rmtree(private / "spill", ignore_errors=True)  # what a killed run left
    connection = connect(private / "spill", threads=1)
    try:
        _open(connection, private)
        _find_duplicates(connection, private)
        _mark(connection)
        previous = not anew and not (private / UNFINISHED).exists() and all((out / name).exists() for name in OUTPUTS)
        if previous:
            find_changed(connection, private)
            name_anew(connection, private, key)
        written = _build(connection, out, key, choose, only_changed=previous, on_progress=on_progress)
        (private / UNFINISHED).touch(mode=0o600)
        _merge(connection, out, written, keep=previous)
        (private / UNFINISHED).unlink()
    finally:
        connection.close()
        shutil.rmtree(private / "spill", ignore_errors=True)


def _open(connection: Any, private: Path) -> None:
    """Make `found`: the newest scan row of every file that is there now, and rows of what could not be opened; and `live`: the same, corrected."""
    listing = f"read_parquet({quote(private / 'listing.parquet')})"
    known, people = open_known(connection, private)
    # Few, mostly: a join with what is there would hold a row of every file.
    connection.execute(
        f"""CREATE TABLE gone AS SELECT DISTINCT source_id FROM {known}
        ANTI JOIN (SELECT source_id FROM {listing} WHERE reason IS NULL) USING (source_id)"""
    )
    connection.execute(
        f"""CREATE VIEW unopened AS SELECT path, {PATH_ID} AS path_id, source_id, size, mtime_ns, 'other' AS kind, reason, '' AS digest,
        printf('f%016x', source_id) AS group_key FROM {listing} WHERE reason IS NOT NULL AND reason <> 'folder'"""
    )
    connection.execute(
        f"""CREATE VIEW found AS SELECT * FROM {known} ANTI JOIN gone USING (source_id)
        UNION ALL BY NAME SELECT * FROM unopened"""
    )
    # Detached data files belong to the group of the header that names them.
    connection.execute("CREATE TABLE named (path VARCHAR, group_key VARCHAR)")
    detached = wide(connection, private, "SELECT DISTINCT source_id, part FROM found WHERE detached AND reason IS NULL")
    for header, group in connection.execute(
        f"""SELECT header, group_key FROM ({detached})
        WHERE kind IN ('volume', 'image') AND reason IS NULL AND header LIKE '%"data_files": ["%'"""
    ).fetchall():
        names = json.loads(header)["data_files"]
        connection.execute("INSERT INTO named SELECT unnest(?::VARCHAR[]), ?", [names, group])
    connection.execute("CREATE TABLE attached AS SELECT path, min(group_key) AS group_key FROM named GROUP BY path")
    connection.execute("CREATE TABLE duplicate (path VARCHAR)")
    connection.execute(f"CREATE TABLE persons AS SELECT * FROM {people} WHERE header_id IN (SELECT header_id FROM found)")
    connection.execute(f"CREATE VIEW live AS {_corrected('found')}")


def _corrected(rows: str) -> str:
    """Return scanned rows with what other files say of them: the group of attached data, the reason of a duplicate."""
    return f"""SELECT r.* REPLACE (coalesce(a.group_key, r.group_key) AS group_key,
        CASE WHEN r.reason IS NULL AND r.path IN (SELECT path FROM duplicate) THEN 'duplicate' ELSE r.reason END AS reason)
        FROM {rows} r LEFT JOIN attached a ON a.path = r.path"""


def _find_duplicates(connection: Any, private: Path) -> None:
    """Make `duplicate`: files whose content another file already has; the first in order of path stays.

    The digest of a DICOM file covers its ends only, so equal ones are read whole before they are called the same.
    """
    image = "reason IS NULL AND kind IN ('dicom', 'volume', 'image')"
    connection.execute(
        f"""CREATE TABLE alike AS SELECT path, mtime_ns, digest FROM live WHERE {image} AND hash(digest) IN
        (SELECT hash(digest) FROM live WHERE {image} GROUP BY hash(digest) HAVING count(*) > 1)"""
    )
    store = private / "confirmed.parquet"
    if store.exists():
        connection.execute(f"CREATE TABLE confirmed AS SELECT * FROM read_parquet({quote(store)})")
    else:
        connection.execute("CREATE TABLE confirmed (path VARCHAR, mtime_ns BIGINT, whole VARCHAR)")
    query = "SELECT a.path, a.mtime_ns, a.digest, c.whole FROM alike a LEFT JOIN confirmed c USING (path, mtime_ns) ORDER BY a.digest, a.path"
    found: list[dict[str, Any]] = []
    copies: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        for _, rows in groupby(stream(connection.cursor(), query), key=lambda row: row["digest"]):
            members = list(rows)
            missing = [row for row in members if row["whole"] is None]
            for row, whole in zip(missing, pool.map(whole_digest, [to_path(row["path"]) for row in missing])):
                row["whole"] = whole
            seen: set[str] = set()
            for row in members:
                if row["whole"] in seen:
                    copies.append(row["path"])
                elif row["whole"]:
                    seen.add(row["whole"])
            found.extend(row for row in members if row["whole"])
    if copies:
        connection.execute("INSERT INTO duplicate SELECT unnest(?::VARCHAR[])", [copies])
    if found:
        write_table(store, CONFIRMED_COLUMNS, found)


def _mark(connection: Any) -> None:
    """Make `conflict` and `shared`, and `marks`: what one group owes to the content of others."""
    connection.execute(
        """CREATE TABLE conflict AS SELECT sop_id FROM live WHERE sop_id IS NOT NULL AND reason IS NULL
        GROUP BY sop_id HAVING count(*) > 1"""
    )
    connection.execute(
        """CREATE TABLE shared AS SELECT issuer, patient_id FROM persons WHERE patient_id IS NOT NULL GROUP BY ALL
        HAVING count(DISTINCT CASE WHEN sex IN ('M', 'F') THEN sex END) > 1 OR count(DISTINCT birth_date) > 1"""
    )
    connection.execute(
        f"""CREATE TABLE marks AS
        SELECT 'duplicate ' || {short("path")} AS mark, group_key FROM live WHERE reason = 'duplicate'
        UNION SELECT 'conflict ' || sop_id, group_key FROM live WHERE sop_id IN (SELECT sop_id FROM conflict)
        UNION SELECT 'shared ' || {short("p.issuer || ' ' || p.patient_id")}, l.group_key
        FROM live l JOIN persons p USING (header_id) JOIN shared s ON p.issuer = s.issuer AND p.patient_id = s.patient_id"""
    )


def _build(
    connection: Any,
    out: Path,
    key: IdKey,
    choose: Callable[[str], Choice],
    *,
    only_changed: bool,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Path]:
    """Build groups one after the other into tables beside the final ones."""
    private = out / "private"
    shared = {(row[0], row[1]) for row in connection.execute("SELECT issuer, patient_id FROM shared").fetchall()}
    total = _fill_buckets(connection, private, private / "spill" / "groups", only_changed=only_changed)
    # A large full build sorts much before: what the connection still holds of that, and what writing takes, would add up.
    writing = connection if only_changed or total <= BUCKET_ROWS else None
    tables = {
        "files": TableWriter(private / "new-files.parquet", PRIVATE_FILE_COLUMNS, writing),
        "private": TableWriter(private / "new-private.parquet", PRIVATE_SERIES_COLUMNS, writing),
        "series": TableWriter(private / "new-series.parquet", {**SERIES_COLUMNS, "group_key": "VARCHAR"}, writing),
    }
    done = 0
    try:
        for name, files in _groups(connection, choose, private / "spill" / "groups"):
            group, known = build_group(files, key, shared), {file.path: (file.mtime_ns, *file.known) for file in files}
            for placed in group.files:
                own = {"file_id": file_id(key, placed.path, placed.digest), "group_key": name}
                mtime_ns, path_id, told = known[placed.path]
                tables["files"].append({**vars(placed), **own, "mtime_ns": mtime_ns, "path_id": path_id, "told": told})
            for row, private_row in zip(group.series, group.private):
                tables["series"].append({**as_record(row), "group_key": name})
                tables["private"].append({**private_row, "group_key": name})
            done += len(files)
            if on_progress is not None:
                on_progress(done, total)
        for table in tables.values():
            table.close()
    except BaseException:
        for table in tables.values():
            table.discard()
        raise
    return {name: table.path for name, table in tables.items()}


@contextlib.contextmanager
def _for_owner_alone() -> Iterator[None]:
    """Let what is made now be the owner's alone: DuckDB makes folders and files of a partitioned table with the usual rights."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _fill_buckets(connection: Any, private: Path, folder: Path, *, only_changed: bool) -> int:
    """Write the rows to group to `rows`, and the headers of each group to `headers`; return how many rows.

    Each file holds a range of group keys, so that it fits into memory.
    """
    where = "WHERE group_key IN (SELECT group_key FROM changed)" if only_changed else ""
    total = int(connection.execute(f"SELECT count(*) FROM live {where}").fetchone()[0])
    buckets = min(MAX_BUCKETS, -(-total // BUCKET_ROWS))
    # What is wide (`header`, `slice`) is read from the parts only now, and only from those that hold rows to group.
    chosen, parts = f"SELECT source_id, part FROM live {where}", scanned(scan_parts(private).values())
    (n_parts,) = connection.execute(f"SELECT count(*) FROM {parts}").fetchone()
    (n_chosen,) = connection.execute(f"SELECT count(part) FROM ({chosen})").fetchone()
    scan = f"SELECT * FROM {parts}"
    if n_chosen < n_parts:  # no join where every row is the newest of its file: it would hold a row of every file
        connection.execute(f"CREATE TABLE chosen AS SELECT DISTINCT * FROM ({chosen})")
        scan, parts = wide(connection, private, "SELECT * FROM chosen"), parts_of(connection, private, "SELECT part FROM chosen")
    newest = (
        f"SELECT *, {PATH_ID} AS path_id, {TOLD} AS told FROM ({scan}) UNION ALL BY NAME SELECT *, '{{}}' AS slice FROM unopened"
    )
    rows = f"""SELECT group_key, path, size, kind, reason, digest, header_id, slice,
        sop_id IS NOT NULL AND sop_id IN (SELECT sop_id FROM conflict) AS conflict, mtime_ns, path_id, told FROM ({_corrected(f"({newest})")})"""
    headers = f"""SELECT g.group_key, g.header_id, h.header
        FROM (SELECT DISTINCT group_key, header_id FROM live WHERE kind <> 'other') g
        JOIN (SELECT header_id, any_value(header) AS header FROM {parts}
            WHERE header_id IN (SELECT header_id FROM live {where}) GROUP BY header_id) h USING (header_id)"""
    folder.mkdir(mode=0o700)
    connection.execute(f"SET partitioned_write_flush_threshold = {max(CHUNK // 2, total // MAX_BUCKETS)}")
    # A key is a letter and 63 random bits in hexadecimal digits.
    bucket = f"printf('%s%04d', group_key[1], ('0x' || group_key[2:5])::INTEGER * {buckets} // 32768) AS bucket"
    with _for_owner_alone():
        for name, query in {"rows": rows, "headers": headers}.items():
            connection.execute(
                f"""COPY (SELECT *, {bucket} FROM ({query}) {where}) TO {quote(folder / name)}
                (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP}, PARTITION_BY (bucket))"""
            )
    connection.execute("DROP TABLE IF EXISTS chosen")
    return total


def _groups(connection: Any, choose: Callable[[str], Choice], folder: Path) -> Iterator[tuple[str, list[Scanned]]]:
    """Yield the groups in order, with their files in order of path."""
    for bucket in sorted((folder / "rows").glob("bucket=*")):
        headers = _headers(connection, folder / "headers" / bucket.name)
        name, own = next(headers, ("", {}))
        current, members = "", list[Scanned]()
        rows = connection.cursor().execute(f"SELECT * FROM {_read(bucket)} ORDER BY group_key, path")
        while chunk := rows.fetchmany(CHUNK):
            slices = json.loads(f"[{','.join(row[7] for row in chunk)}]")  # in one call: half the time of one call each
            for (group, path, size, kind, reason, digest, header_id, _, conflict, mtime_ns, *known), piece in zip(chunk, slices):
                if group != current:
                    if members:
                        yield current, members
                    current, members = group, []
                    while name < group:
                        name, own = next(headers, (group, {}))
                header = {**own[header_id], **piece} if kind != "other" else {}
                members.append(
                    Scanned(path, size, kind, reason, digest, header, conflict, choose(path), mtime_ns, (known[0], known[1]))
                )
        yield current, members


def _read(bucket: Path) -> str:
    return f"read_parquet({files_of(sorted(bucket.iterdir()))}, hive_partitioning = false)"


def _headers(connection: Any, bucket: Path) -> Iterator[tuple[str, dict[int, dict[str, Any]]]]:
    """Yield every group that has headers, in order, with them."""
    if bucket.exists():
        rows = stream(connection.cursor(), f"SELECT * FROM {_read(bucket)} ORDER BY group_key", CHUNK)
        for name, found in groupby(rows, key=lambda row: str(row["group_key"])):
            yield name, {row["header_id"]: json.loads(row["header"]) for row in found}


def _merge(connection: Any, out: Path, new: dict[str, Path], *, keep: bool) -> None:
    """Join new rows with those of untouched groups, choose within study and patient, and put the tables in place."""
    private = out / "private"

    def joined(name: str, kept: str = "SELECT * FROM {old}") -> str:
        rows = f"SELECT * FROM read_parquet({quote(new[name])})"
        if not keep:
            return rows
        old = f"(FROM read_parquet({quote(private / OLD[name])}) WHERE group_key NOT IN (SELECT group_key FROM changed)) o"
        return f"{rows} UNION ALL {kept.format(old=old)}"

    files = joined(
        "files",
        """SELECT o.* REPLACE (coalesce(n.digest, o.digest) AS digest, coalesce(n.mtime_ns, o.mtime_ns) AS mtime_ns,
            coalesce(n.file_id, o.file_id) AS file_id)
        FROM {old} LEFT JOIN new_files n USING (path_id)""",
    )
    owner = joined(
        "private",
        "SELECT o.* REPLACE (coalesce(n.source_tag, o.source_tag) AS source_tag) FROM {old} LEFT JOIN new_tags n USING (series_id)",
    )
    try:
        connection.execute(f"CREATE TABLE s AS {joined('series')}")
        connection.execute(f"CREATE TABLE p AS {owner}")
        write_query(private / "rows.parquet", "SELECT * FROM s", connection)
        join_twins(connection)
        apply_splits(connection, private)
        apply_withdrawals(connection, private, files=f"({files})")
        apply_pixels(connection, private)
        withdrawn = "CASE WHEN series_id IN (SELECT series_id FROM withdrawn_series) THEN 'withdrawn' ELSE reason END AS reason"
        write_query(private / "files.parquet", f"SELECT * REPLACE ({withdrawn}) FROM ({files})", connection)
        write_query(private / "series.parquet", "SELECT * FROM p ORDER BY series_id", connection)
        write_query(private / "marks.parquet", "SELECT * FROM marks", connection)
        _write_public_files(connection, out)
        write_query(out / "series.parquet", CHOOSE, connection)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


_NAMES = ", ".join(f"s.{name}" for name in SERIES_COLUMNS if name not in ("study_rank", "best_in_study", "best_in_patient"))
_BEST = "role IN ('source', 'unknown') DESC, n_slices DESC NULLS LAST, bytes DESC, series_id"
CHOOSE = f"""
WITH dated AS (SELECT series_id, patient_id, study_id, modality, body_region, status, role, n_slices, bytes, p.study_date,
    dense_rank() OVER (PARTITION BY patient_id ORDER BY p.study_date, study_id) - 1 AS rank FROM s JOIN p USING (series_id)),
ranked AS (SELECT series_id,
    CASE WHEN count(study_date) OVER (PARTITION BY patient_id) = count(*) OVER (PARTITION BY patient_id) THEN rank END AS study_rank,
    row_number() OVER (PARTITION BY study_id, modality, body_region, status = 'rejected' ORDER BY {_BEST}) = 1 AS first_study,
    row_number() OVER (PARTITION BY patient_id, modality, body_region, status = 'rejected' ORDER BY {_BEST}) = 1 AS first_patient FROM dated)
SELECT {_NAMES}, r.study_rank, CASE WHEN status <> 'rejected' THEN first_study END AS best_in_study,
CASE WHEN status <> 'rejected' THEN first_patient END AS best_in_patient FROM s JOIN ranked r USING (series_id) ORDER BY s.series_id"""
"""Order of studies within a patient (only where all are dated), and the one series to take per study or patient, modality and region:
source images first, then most slices."""


def _write_public_files(connection: Any, out: Path) -> None:
    """Write the public file table as parts; the manifest, swapped last, names those that count."""
    folder = out / "files.parquet"
    source = f"read_parquet({quote(out / 'private' / 'files.parquet')})"
    rows = connection.execute(f"SELECT count(*) FROM {source}").fetchone()[0]
    old = sorted(folder.glob("part-*.parquet"))
    number = int(old[-1].stem.partition("-")[2]) + 1 if old else 0
    n_parts = max(1, -(-rows // PART_ROWS))
    names = []
    for k in range(n_parts):
        part = folder / f"part-{number + k:08d}.parquet"
        write_query(part, f"SELECT {', '.join(FILE_COLUMNS)} FROM {source} WHERE hash(file_id) % {n_parts} = {k}", connection)
        names.append(part.name)
    write_json(folder / "manifest.json", {"parts": names, "rows": rows})
    for part in old:
        part.unlink(missing_ok=True)


def source_state(sources: dict[str, Any]) -> str:
    """Return a hash of what the user said about the sources: another one means that all rows are built again."""
    return f"{short_hash(json.dumps(sources, sort_keys=True)):016x}"
