"""Read and write Parquet through DuckDB, atomically and with the owner's rights only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.errors import StoreError

TEMPORARY = ".tmp-"


def connect() -> Any:
    """Return an in-memory DuckDB connection that loads no extension from elsewhere."""
    import duckdb

    connection = duckdb.connect(":memory:")
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET enable_progress_bar = false")
    return connection


def quote(path: Path) -> str:
    """Return a path as an SQL string literal."""
    return "'" + str(path).replace("'", "''") + "'"


def write_table(path: Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as one Parquet file, aside and renamed, mode 0600.

    Args:
        path: Target; replaced when present.
        columns: Column name -> DuckDB type, in order.
        rows: JSON-able values by column name; absent means null.

    Raises:
        StoreError: The disk is full or failing; the old file, if any, is still there.
    """
    import duckdb

    lines = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}.json")
    aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    types = ", ".join(f"'{name}': '{kind}'" for name, kind in columns.items())
    try:
        with open(os.open(lines, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
            for row in rows:
                handle.write(json.dumps({name: row.get(name) for name in columns}) + "\n")
        source = f"read_json({quote(lines)}, format='newline_delimited', columns={{{types}}}, maximum_object_size=67108864)"
        connection = connect()
        try:
            connection.execute(f"COPY (SELECT * FROM {source}) TO {quote(aside)} (FORMAT parquet, COMPRESSION zstd)")
        finally:
            connection.close()
        os.chmod(aside, 0o600)
        with open(aside, "rb") as handle_in:
            os.fsync(handle_in.fileno())
        os.replace(aside, path)
    except (OSError, duckdb.Error) as err:
        aside.unlink(missing_ok=True)
        raise StoreError(
            f"the index could not be written in {path.parent} ({type(err).__name__}); what was written before stays "
            "valid; free some space or check the disk, and run the same command again to go on"
        ) from err
    finally:
        lines.unlink(missing_ok=True)


def read_table(paths: Sequence[Path], columns: Iterable[str]) -> list[dict[str, Any]]:
    """Return all rows of some Parquet files of one schema, in order."""
    if not paths:
        return []
    names = list(columns)
    files = ", ".join(quote(path) for path in paths)
    connection = connect()
    try:
        found = connection.execute(f"SELECT {', '.join(names)} FROM read_parquet([{files}])").fetchall()
    finally:
        connection.close()
    return [dict(zip(names, row)) for row in found]


def write_json(path: Path, values: Any) -> None:
    """Write JSON aside and rename it, mode 0600."""
    aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
            handle.write(json.dumps(values, indent=1, sort_keys=True) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except OSError as err:
        aside.unlink(missing_ok=True)
        raise StoreError(
            f"{path} could not be written ({err.strerror}); what was written before stays valid; free some space or check "
            "the disk, and run the same command again to go on"
        ) from err
