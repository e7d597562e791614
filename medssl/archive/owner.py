"""The owner-only part of an index: read its tables, write to the index under its lock.

A column that an index lacks (it was made without `--pixels`, or by an older version) reads as null and is named in the
result, so that an operation can say what it could not look at.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.archive._parquet import TEMPORARY, connect, quote
from medssl.archive.ids import IdKey, load_key
from medssl.archive.table import Archive
from medssl.errors import RequestError, StoreError


@dataclass(frozen=True)
class OwnerTable:
    """Rows of a private table.

    Args:
        rows: One mapping per row; values of absent columns are None.
        missing: Columns asked for that say nothing at all: absent, or null in every row.
    """

    rows: list[dict[str, Any]]
    missing: tuple[str, ...]


def owner_series(archive: Archive, names: Sequence[str]) -> OwnerTable:
    """Read columns of `private/series.parquet`, always with `series_id`."""
    return _read(archive.path / "private" / "series.parquet", ["series_id", *names])


def owner_files(archive: Archive, names: Sequence[str]) -> OwnerTable:
    """Read columns of `private/files.parquet` for the files that belong to a series, always with `series_id`."""
    table = _read(archive.path / "private" / "files.parquet", ["series_id", *names])
    return OwnerTable([row for row in table.rows if row["series_id"] is not None], table.missing)


def columns_of(path: Path) -> list[str]:
    """Return the column names of a Parquet file."""
    connection = connect()
    try:
        return [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM read_parquet({quote(path)})").fetchall()]
    finally:
        connection.close()


def _read(path: Path, names: Sequence[str]) -> OwnerTable:
    there = set(columns_of(path))
    wanted = ", ".join(name if name in there else f"NULL AS {name}" for name in names)
    connection = connect()
    try:
        found = connection.execute(f"SELECT {wanted} FROM read_parquet({quote(path)}) ORDER BY series_id").fetchall()
    finally:
        connection.close()
    rows = [dict(zip(names, row)) for row in found]
    silent = tuple(name for name in names if all(row[name] is None for row in rows))
    return OwnerTable(rows, silent)


def study_uid_of(row: dict[str, Any]) -> str | None:
    """Return the study UID of a private series row, which older indexes keep inside `uids`."""
    if row.get("study_uid"):
        return str(row["study_uid"])
    return str(json.loads(row["uids"])["study"]) if row.get("uids") else None


def owner_key(archive: Archive, key_file: Path | None) -> IdKey | None:
    """Return the id key of an index where it is at hand: the file given, else the one inside the index, else None.

    Raises:
        RequestError: It is not the key that the index was made with.
    """
    own = archive.path / "private" / "id.key"
    if key_file is None and not own.exists():
        return None
    key = load_key(own if key_file is None else key_file)
    if key.fingerprint != archive.key_fingerprint:
        raise RequestError(
            f"the key has fingerprint {key.fingerprint}, the index {archive.path} was made with {archive.key_fingerprint}; "
            "give that one with --key-file"
        )
    return key


@contextlib.contextmanager
def locked(archive: Archive) -> Iterator[None]:
    """Hold the lock that `medssl index` holds.

    Raises:
        RequestError: Another process writes to this index.
    """
    path = archive.path / "private" / "lock"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as err:
        raise RequestError(
            f"{archive.path} cannot be written ({err.strerror}); this needs the right to write to the index"
        ) from err
    with open(descriptor, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise RequestError(f"{archive.path} is being written by another process; wait until it has finished") from err
        yield


def write_query(connection: Any, query: str, path: Path) -> None:
    """Write the result of a query as one Parquet file, aside and renamed, mode 0600.

    Raises:
        StoreError: The disk is full or failing; the old file, if any, is still there.
    """
    import duckdb

    aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        connection.execute(f"COPY ({query}) TO {quote(aside)} (FORMAT parquet, COMPRESSION zstd)")
        os.chmod(aside, 0o600)
        with open(aside, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except (OSError, duckdb.Error) as err:
        aside.unlink(missing_ok=True)
        raise StoreError(
            f"{path.name} could not be written in {path.parent} ({type(err).__name__}); what was written before stays valid; "
            "free some space or check the disk, and run the same command again"
        ) from err
