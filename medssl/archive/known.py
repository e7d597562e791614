"""What scanning has found so far: the newest row of every file, in one table without what is wide.

    private/known.parquet     `KNOWN_COLUMNS`, of files that are gone too: they may come back
    private/people.parquet    `PEOPLE_COLUMNS`, one row per header that names a patient

They follow from the scan parts alone and spare reading all of them. While few rows are newer than they are, those are laid over them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medssl.archive._parquet import files_of, quote, short, write_query
from medssl.archive.scanning.scan import SCAN_COLUMNS

KNOWN_COLUMNS: dict[str, str] = {
    **{name: kind for name, kind in SCAN_COLUMNS.items() if name not in ("header", "slice")},
    "detached": "BOOLEAN",
    "path_id": "UBIGINT",
    "told": "UBIGINT",
}
"""`detached`: the header names data files. `path_id`: hash of the path; members of a container share `source_id` and not this. `told`: hash
of all that a scan says of a file but its digest, time and group."""
_FACTS = ", ".join(f"coalesce({name}::VARCHAR, '')" for name in ("size", "kind", "reason", "sop_id", "header_id", "slice"))
TOLD = short(f"concat_ws(' ', {_FACTS})")
PATH_ID = short("path")

RECENT_SHARE = 0.05
"""Rows newer than the tables, as a share of theirs, up to which the tables are not written again."""
PEOPLE_COLUMNS = {"header_id": "BIGINT", **dict.fromkeys(("issuer", "patient_id", "sex", "birth_date"), "VARCHAR")}


def scan_parts(private: Path) -> dict[int, Path]:
    """Return the number and path of every scan part, in order."""
    return {int(path.stem.partition("-")[2]): path for path in sorted((private / "scan").glob("part-*.parquet"))}


def scanned(paths: Iterable[Path]) -> str:
    """Return some scan parts as an SQL relation."""
    paths = list(paths)
    if paths:
        return f"read_parquet({files_of(paths)})"
    return f"(SELECT {', '.join(f'NULL::{kind} AS {name}' for name, kind in SCAN_COLUMNS.items())} LIMIT 0)"


def open_known(connection: Any, private: Path) -> tuple[str, str]:
    """Return the newest row of every file (`KNOWN_COLUMNS`) and the people of all headers (`PEOPLE_COLUMNS`) as SQL relations.

    They stay as they are when scan parts are added; call again then. The connection gets tables `recent` and `recent_people`.
    """
    known_path, people_path = private / "known.parquet", private / "people.parquet"
    known, people = (f"read_parquet({quote(path)})" for path in (known_path, people_path))
    parts = scan_parts(private)
    covered = _covered(connection, known, people)
    if not covered <= parts.keys():  # parts were taken away: their rows do not count any more
        covered = set()
    if covered and max(covered) == max(parts):
        return known, people
    later = scanned(part for number, part in parts.items() if number > max(covered, default=-1))
    persons = f"""SELECT header_id, coalesce(header ->> 'issuer', '') AS issuer, header ->> 'patient_id' AS patient_id,
        header ->> 'sex' AS sex, header ->> 'birth_date' AS birth_date
        FROM (SELECT header_id, any_value(header) AS header FROM {later} GROUP BY header_id) WHERE header LIKE '%"patient_id"%'"""
    newest = f"""SELECT {", ".join(name for name in KNOWN_COLUMNS if name in SCAN_COLUMNS)},
        kind IN ('volume', 'image') AND header LIKE '%"data_stats"%' AS detached,
        {PATH_ID} AS path_id, {TOLD} AS told
        FROM {later} JOIN (SELECT source_id, max(part) AS part FROM {later} GROUP BY source_id) USING (source_id, part)"""
    if covered:
        n_later, n_known = (connection.execute(f"SELECT count(*) FROM {rows}").fetchone()[0] for rows in (later, known))
        few = n_later <= RECENT_SHARE * n_known
        if few:
            connection.execute(f"CREATE OR REPLACE TABLE recent AS {newest}")
            connection.execute(f"CREATE OR REPLACE TABLE recent_people AS {persons}")
            newest, persons, later = "SELECT * FROM recent", "SELECT * FROM recent_people", "recent"
        persons += f" UNION SELECT * FROM {people}"
        newest += f" UNION ALL SELECT k.* FROM {known} k ANTI JOIN {later} l USING (source_id)"
        if few:
            return f"({newest})", f"({persons})"
    # In this order: what `known.parquet` covers, the other one does too, also after a kill.
    write_query(people_path, persons, connection)
    write_query(known_path, newest, connection)
    return known, people


def _covered(connection: Any, known: str, people: str) -> set[int]:
    """Return the scan parts whose rows the tables hold; none where there are no tables of this form."""
    import duckdb

    try:
        for table, columns in ((known, KNOWN_COLUMNS), (people, PEOPLE_COLUMNS)):
            found = connection.execute(f"DESCRIBE FROM {table}").fetchall()
            if {row[0]: row[1] for row in found} != columns:
                return set()
        return {row[0] for row in connection.execute(f"SELECT DISTINCT part FROM {known}").fetchall()}
    except duckdb.Error:
        return set()


def parts_of(connection: Any, private: Path, chosen: str) -> str:
    """Return the scan parts that a query of `part` names, as an SQL relation."""
    numbers = {row[0] for row in connection.execute(f"SELECT DISTINCT part FROM ({chosen})").fetchall()}
    return scanned(path for number, path in scan_parts(private).items() if number in numbers)


def wide(connection: Any, private: Path, chosen: str) -> str:
    """Return the scan rows that a query names by `source_id` and `part`, each pair once, as an SQL query; only their parts are read."""
    return f"SELECT s.* FROM {parts_of(connection, private, chosen)} s JOIN ({chosen}) c ON s.source_id = c.source_id AND s.part = c.part"
