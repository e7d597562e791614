"""From scan parts to the tables of the index, in memory that does not grow with the archive.

DuckDB sorts the scan rows by group (spilling to `private/spill`), Python builds one group after the other, and only groups that a new
scan has touched are built again: the rows of all others are copied from the tables that are there.
"""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from medssl.archive._parquet import TableWriter, connect, files_of, quote, stream, write_json, write_query, write_table
from medssl.archive.decisions import apply_splits, apply_withdrawals
from medssl.archive.ids import IdKey
from medssl.archive.paths import to_path
from medssl.archive.pixels import apply_pixels
from medssl.archive.rows import Choice, Scanned, as_record
from medssl.archive.scan import short_hash, whole_digest
from medssl.archive.series import build_group
from medssl.archive.table import FILE_COLUMNS, PRIVATE_FILE_COLUMNS, PRIVATE_SERIES_COLUMNS, SERIES_COLUMNS
from medssl.archive.twins import join_twins

PART_ROWS = 500_000
CHUNK = 20_000
MARK_COLUMNS = {"mark": "VARCHAR", "group_key": "VARCHAR"}
CONFIRMED_COLUMNS = {"path": "VARCHAR", "mtime_ns": "BIGINT", "whole": "VARCHAR"}
OUTPUTS = ("private/files.parquet", "private/series.parquet", "private/rows.parquet", "private/marks.parquet", "series.parquet")
UNFINISHED = "unfinished"
"""Lies in `private/` while tables are being replaced: after a kill they are all built again."""


def regroup(
    out: Path,
    key: IdKey,
    choose: Callable[[str], Choice],
    *,
    first_new_part: int | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `series.parquet`, `files.parquet/` and their private halves.

    Args:
        out: Folder of the index.
        key: The owner's key.
        choose: What the user said about a path (as text).
        first_new_part: Scan parts from this number on are new since the tables were written; None builds everything again.
        on_progress: Called with (files placed, files to place).

    Raises:
        StoreError: The disk is full or failing; the tables that were there stay.
    """
    private = out / "private"
    connection = connect(private / "spill")
    try:
        _open(connection, private)
        _find_duplicates(connection, private)
        _mark(connection, private)
        previous = (
            first_new_part is not None and not (private / UNFINISHED).exists() and all((out / name).exists() for name in OUTPUTS)
        )
        if previous:
            assert first_new_part is not None
            _find_changed(connection, private, first_new_part)
        written = _build(connection, out, key, choose, only_changed=previous, on_progress=on_progress)
        (private / UNFINISHED).touch(mode=0o600)
        _merge(connection, out, written, keep=previous)
        (private / UNFINISHED).unlink()
    finally:
        connection.close()
        shutil.rmtree(private / "spill", ignore_errors=True)


def _open(connection: Any, private: Path) -> None:
    """Make `live`: the newest scan row of every file that is there now, and rows of what could not be opened."""
    parts = sorted((private / "scan").glob("part-*.parquet"))
    listing = quote(private / "listing.parquet")
    if parts:
        connection.execute(f"CREATE VIEW scan AS SELECT * FROM read_parquet({files_of(parts)})")
    else:
        from medssl.archive.scan import SCAN_COLUMNS

        connection.execute(f"CREATE TABLE scan ({', '.join(f'{name} {kind}' for name, kind in SCAN_COLUMNS.items())})")
    connection.execute("CREATE TABLE latest AS SELECT source_id, max(part) AS part FROM scan GROUP BY source_id")
    connection.execute(
        f"""CREATE TABLE live AS
        SELECT s.path, s.size, s.mtime_ns, s.kind, s.reason, s.digest, s.group_key, s.sop_id, s.header_id, s.slice, s.part
        FROM scan s JOIN latest USING (source_id, part)
        WHERE s.source_id IN (SELECT source_id FROM read_parquet({listing}) WHERE reason IS NULL)
        UNION ALL
        SELECT path, size, mtime_ns, 'other', reason, '', printf('f%016x', source_id), NULL, NULL, '{{}}', NULL
        FROM (SELECT DISTINCT * FROM read_parquet({listing}) WHERE reason IS NOT NULL AND reason <> 'folder')"""
    )
    connection.execute(
        """CREATE TABLE headers AS SELECT header_id, any_value(header) AS header FROM scan
        WHERE header_id IN (SELECT header_id FROM live) GROUP BY header_id"""
    )
    # Detached data files belong to the group of the header that names them.
    connection.execute("CREATE TABLE attached (path VARCHAR, group_key VARCHAR)")
    for row in connection.execute(
        """SELECT h.header, l.group_key FROM live l JOIN headers h USING (header_id)
        WHERE l.kind IN ('volume', 'image') AND l.reason IS NULL AND h.header LIKE '%"data_files": ["%'"""
    ).fetchall():
        names = json.loads(row[0])["data_files"]
        connection.execute("INSERT INTO attached SELECT unnest(?::VARCHAR[]), ?", [names, row[1]])
    connection.execute("UPDATE live SET group_key = a.group_key FROM attached a WHERE live.path = a.path")


def _find_duplicates(connection: Any, private: Path) -> None:
    """Make `duplicate`: files whose content another file already has; the first in order of path stays.

    The digest of a DICOM file covers its ends only, so equal ones are read whole before they are called the same.
    """
    connection.execute("CREATE TABLE duplicate (path VARCHAR)")
    connection.execute(
        """CREATE TABLE alike AS SELECT path, mtime_ns, digest FROM live WHERE reason IS NULL AND kind IN ('dicom', 'volume', 'image') AND digest IN
        (SELECT digest FROM live WHERE reason IS NULL AND kind IN ('dicom', 'volume', 'image') GROUP BY digest HAVING count(*) > 1)"""
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
    connection.execute("UPDATE live SET reason = 'duplicate' FROM duplicate d WHERE live.path = d.path AND live.reason IS NULL")


def _mark(connection: Any, private: Path) -> None:
    """Make `conflict` and `shared`, and `marks`: what one group owes to the content of others."""
    connection.execute(
        """CREATE TABLE conflict AS SELECT sop_id FROM live WHERE sop_id IS NOT NULL AND reason IS NULL
        GROUP BY sop_id HAVING count(*) > 1"""
    )
    connection.execute(
        """CREATE TABLE persons AS SELECT header_id, coalesce(header ->> 'issuer', '') AS issuer, header ->> 'patient_id' AS patient_id,
        header ->> 'sex' AS sex, header ->> 'birth_date' AS birth_date FROM headers WHERE header LIKE '%"patient_id"%'"""
    )
    connection.execute(
        """CREATE TABLE shared AS SELECT issuer, patient_id FROM persons WHERE patient_id IS NOT NULL GROUP BY ALL
        HAVING count(DISTINCT CASE WHEN sex IN ('M', 'F') THEN sex END) > 1 OR count(DISTINCT birth_date) > 1"""
    )
    connection.execute(
        """CREATE TABLE marks AS
        SELECT 'duplicate ' || hash(path) AS mark, group_key FROM live WHERE reason = 'duplicate'
        UNION SELECT 'conflict ' || sop_id, group_key FROM live WHERE sop_id IN (SELECT sop_id FROM conflict)
        UNION SELECT 'shared ' || hash(p.issuer || ' ' || p.patient_id), l.group_key
        FROM live l JOIN persons p USING (header_id) JOIN shared s ON p.issuer = s.issuer AND p.patient_id = s.patient_id"""
    )


def _find_changed(connection: Any, private: Path, first_new_part: int) -> None:
    """Make `changed`: groups that the tables on disk do not describe any more."""
    old, marks = quote(private / "files.parquet"), quote(private / "marks.parquet")
    connection.execute(
        f"""CREATE TABLE changed AS
        SELECT group_key FROM live WHERE part >= {first_new_part} OR part IS NULL
        UNION SELECT o.group_key FROM read_parquet({old}) o WHERE o.path NOT IN (SELECT path FROM live)
        UNION SELECT o.group_key FROM read_parquet({old}) o JOIN live l USING (path) WHERE o.group_key <> l.group_key
        UNION SELECT group_key FROM (FROM marks EXCEPT FROM read_parquet({marks}))
        UNION SELECT group_key FROM (FROM read_parquet({marks}) EXCEPT FROM marks)"""
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
    tables = {
        "files": TableWriter(private / "new-files.parquet", PRIVATE_FILE_COLUMNS),
        "private": TableWriter(private / "new-private.parquet", PRIVATE_SERIES_COLUMNS),
        "series": TableWriter(private / "new-series.parquet", {**SERIES_COLUMNS, "group_key": "VARCHAR"}),
    }
    where = "WHERE l.group_key IN (SELECT group_key FROM changed)" if only_changed else ""
    total = connection.execute(f"SELECT count(*) FROM live l {where}").fetchone()[0]
    done = 0
    try:
        for name, files in _groups(connection, choose, where):
            group = build_group(files, key, shared)
            for placed in group.files:
                file_id = key.make("file", "", f"{placed.digest} {placed.path}")
                tables["files"].append({**vars(placed), "file_id": file_id, "group_key": name})
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


def _groups(connection: Any, choose: Callable[[str], Choice], where: str) -> Iterator[tuple[str, list[Scanned]]]:
    query = f"""SELECT l.group_key, l.path, l.size, l.kind, l.reason, l.digest, l.header_id, l.slice,
        l.sop_id IN (SELECT sop_id FROM conflict) AS conflict FROM live l {where} ORDER BY l.group_key, l.path"""
    result = connection.cursor().execute(query)
    headers = _Headers(connection.cursor())
    name, members = "", list[Scanned]()
    while rows := result.fetchmany(CHUNK):
        headers.load({row[6] for row in rows if row[6] is not None})
        slices = json.loads(f"[{','.join(row[7] for row in rows)}]")  # in one call: half the time of one call each
        for (group, path, size, kind, reason, digest, header_id, _, conflict), piece in zip(rows, slices):
            if group != name:
                if members:
                    yield name, members
                name, members = group, []
            header = {**headers.get(header_id), **piece} if kind != "other" else {}
            members.append(Scanned(path, size, kind, reason, digest, header, bool(conflict), choose(path)))
    if members:
        yield name, members


class _Headers:
    """Headers by id, the last ones parsed kept."""

    def __init__(self, connection: Any, size: int = 4 * CHUNK) -> None:
        self._connection, self._size = connection, size
        self._found: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def load(self, ids: set[int]) -> None:
        missing = [name for name in ids if name not in self._found]
        if missing:
            query = "SELECT header_id, header FROM headers WHERE header_id IN (SELECT unnest(?::BIGINT[]))"
            for name, text in self._connection.execute(query, [missing]).fetchall():
                self._found[name] = json.loads(text)
        while len(self._found) > self._size + len(ids):
            self._found.popitem(last=False)

    def get(self, name: int | None) -> dict[str, Any]:
        if name is None:
            return {}
        if name not in self._found:
            self.load({name})
        return self._found[name]


def _merge(connection: Any, out: Path, new: dict[str, Path], *, keep: bool) -> None:
    """Join new rows with those of untouched groups, choose within study and patient, and put the tables in place."""
    private = out / "private"

    def joined(old: Path, fresh: Path, group: str = "group_key") -> str:
        rows = f"SELECT * FROM read_parquet({quote(fresh)})"
        if not keep:
            return rows
        return f"{rows} UNION ALL SELECT * FROM read_parquet({quote(old)}) WHERE {group} NOT IN (SELECT group_key FROM changed)"

    try:
        connection.execute(f"CREATE TABLE s AS {joined(private / 'rows.parquet', new['series'])}")
        connection.execute(f"CREATE TABLE p AS {joined(private / 'series.parquet', new['private'])}")
        connection.execute(f"CREATE TABLE f AS {joined(private / 'files.parquet', new['files'])}")
        write_query(private / "rows.parquet", "SELECT * FROM s", connection)
        join_twins(connection)
        apply_splits(connection, private)
        apply_withdrawals(connection, private)
        apply_pixels(connection, private)
        connection.execute("UPDATE f SET reason = 'withdrawn' WHERE series_id IN (SELECT series_id FROM withdrawn_series)")
        write_query(private / "files.parquet", "SELECT * FROM f", connection)
        write_query(private / "series.parquet", "SELECT * FROM p ORDER BY series_id", connection)
        write_query(private / "marks.parquet", "SELECT * FROM marks", connection)
        _write_public_files(connection, out)
        write_query(out / "series.parquet", CHOOSE, connection)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


_NAMES = ", ".join(name for name in SERIES_COLUMNS if name not in ("study_rank", "best_in_study", "best_in_patient"))
_BEST = "role IN ('source', 'unknown') DESC, n_slices DESC NULLS LAST, bytes DESC, series_id"
CHOOSE = f"""
WITH dated AS (SELECT s.*, p.study_date, dense_rank() OVER (PARTITION BY patient_id ORDER BY p.study_date, study_id) - 1 AS rank
               FROM s JOIN p USING (series_id)),
ranked AS (SELECT *, CASE WHEN count(study_date) OVER (PARTITION BY patient_id) = count(*) OVER (PARTITION BY patient_id) THEN rank END
           AS new_rank,
    row_number() OVER (PARTITION BY study_id, modality, body_region, status = 'rejected' ORDER BY {_BEST}) = 1 AS first_study,
    row_number() OVER (PARTITION BY patient_id, modality, body_region, status = 'rejected' ORDER BY {_BEST}) = 1 AS first_patient FROM dated)
SELECT {_NAMES}, new_rank AS study_rank, CASE WHEN status <> 'rejected' THEN first_study END AS best_in_study,
CASE WHEN status <> 'rejected' THEN first_patient END AS best_in_patient FROM ranked ORDER BY series_id"""
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
