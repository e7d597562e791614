"""What the owner decided about an index, kept beside it so that indexing again does not forget it.

    private/splits.parquet       patient_id, split, origin    split of every patient (`archive split`)
    private/withdrawn.parquet    kind, value                  who and what was withdrawn (`archive withdraw`)

`origin` is `table` for what a splits CSV said, `drawn` for what was drawn. `kind` is one of `WITHDRAWN_KINDS`.
Both tables outlive the rows they speak of: a withdrawn patient whose images come back is withdrawn again, and a patient
who leaves the index and returns has the split of before.

`apply_splits` and `apply_withdrawals` work on tables of an open connection. The operations use them, and `medssl index`
is meant to, after grouping and before it writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssl.archive._parquet import connect, quote, read_table, write_json, write_query
from medssl.archive.operations.owner import columns_of
from medssl.archive.table import Archive

SPLIT_COLUMNS = {"patient_id": "VARCHAR", "split": "VARCHAR", "origin": "VARCHAR"}
WITHDRAWN_COLUMNS = {"kind": "VARCHAR", "value": "VARCHAR"}
WITHDRAWN_KINDS = ("patient_id", "study_id", "series_id", "accession", "digest")
"""`accession` is an accession number, trimmed (these tables are the owner's); `digest` that of a file; the others are pseudonymous."""


def read_splits_decided(private: Path) -> dict[str, tuple[str, str]]:
    """Return patient_id -> (split, origin) of `private/splits.parquet`."""
    path = private / "splits.parquet"
    rows = read_table([path], SPLIT_COLUMNS) if path.exists() else []
    return {row["patient_id"]: (row["split"], row["origin"]) for row in rows}


def read_withdrawn(private: Path) -> set[tuple[str, str]]:
    """Return the (kind, value) of `private/withdrawn.parquet`."""
    path = private / "withdrawn.parquet"
    return {(row["kind"], row["value"]) for row in read_table([path], WITHDRAWN_COLUMNS)} if path.exists() else set()


def apply_splits(connection: Any, private: Path, series: str = "s") -> None:
    """Give rows without a split the one decided for their patient; what a splits table said for a row stays.

    Args:
        connection: DuckDB connection.
        private: Folder `private` of the index.
        series: Table with the columns of `series.parquet`, changed in place.
    """
    path = private / "splits.parquet"
    if path.exists():
        connection.execute(
            f"UPDATE {series} SET split = d.split FROM read_parquet({quote(path)}) d "
            f"WHERE {series}.patient_id = d.patient_id AND {series}.split = 'unknown'"
        )


def apply_withdrawals(
    connection: Any, private: Path, series: str = "s", owner: str = "p", files: str = "f", *, accession: bool = True
) -> None:
    """Reject withdrawn rows, reason `withdrawn`; leaves a table `withdrawn_series` (series_id) on the connection.

    Args:
        connection: DuckDB connection.
        private: Folder `private` of the index.
        series: Table with the columns of `series.parquet`, changed in place.
        owner: Table with `series_id` and `accession` of `private/series.parquet`.
        files: Table or query in brackets with `series_id` and `digest` of `private/files.parquet`.
        accession: Whether `owner` has that column.
    """
    path = private / "withdrawn.parquet"
    connection.execute("CREATE OR REPLACE TABLE withdrawn_series (series_id VARCHAR)")
    if not path.exists():
        return
    listed = f"SELECT value FROM read_parquet({quote(path)}) WHERE kind ="
    by_accession = f"UNION SELECT series_id FROM {owner} WHERE trim(accession) IN ({listed} 'accession')" if accession else ""
    connection.execute(
        f"""INSERT INTO withdrawn_series
        SELECT series_id FROM {series} WHERE patient_id IN ({listed} 'patient_id') OR study_id IN ({listed} 'study_id')
            OR series_id IN ({listed} 'series_id')
        UNION SELECT series_id FROM {files} WHERE series_id IS NOT NULL AND digest IN ({listed} 'digest')
        {by_accession}"""
    )
    connection.execute(
        f"UPDATE {series} SET status = 'rejected', reason = 'withdrawn' WHERE series_id IN (SELECT series_id FROM withdrawn_series)"
    )


def write_series(archive: Archive, connection: Any, table: str = "s") -> None:
    """Replace `series.parquet` by a table of the connection and bring `summary.json` up to date."""
    write_query(archive.path / "series.parquet", f"SELECT * FROM {table} ORDER BY series_id", connection)
    refresh_summary(archive)


def load_series(archive: Archive, connection: Any, table: str = "s") -> None:
    """Copy `series.parquet` into a table of the connection."""
    connection.execute(f"CREATE TABLE {table} AS SELECT * FROM read_parquet({quote(archive.path / 'series.parquet')})")


def refresh_summary(archive: Archive) -> None:
    """Count again in `summary.json` what a decision changes: usable series, domains, splits, files used and reasons."""
    series = f"read_parquet({quote(archive.path / 'series.parquet')})"
    parts = json.loads((archive.path / "files.parquet" / "manifest.json").read_text())["parts"]
    files = f"read_parquet([{', '.join(quote(archive.path / 'files.parquet' / part) for part in parts)}])"
    connection = connect()

    def counts(column: str, source: str, where: str) -> dict[str, int]:
        query = f"SELECT {column}, count(*) FROM {source} WHERE {where} GROUP BY {column} ORDER BY {column}"
        return {str(name): int(n) for name, n in connection.execute(query).fetchall()}

    try:
        usable = "status <> 'rejected'"
        n_usable = sum(counts("status", series, usable).values())
        reasons = counts("reason", files, "reason IS NOT NULL")
        n_files = connection.execute(f"SELECT count(*) FROM {files}").fetchone()[0]
        changed: Mapping[str, Any] = {
            "n_series_usable": n_usable,
            "domains": counts("domain", series, usable),
            "splits": counts("split", series, usable),
            "reasons": reasons,
            "n_files_used": int(n_files) - sum(reasons.values()),
        }
    finally:
        connection.close()
    archive.summary.update(changed)
    write_json(archive.path / "summary.json", archive.summary)


def has_column(path: Path, name: str) -> bool:
    """Return whether a Parquet file has a column."""
    return name in columns_of(path)
