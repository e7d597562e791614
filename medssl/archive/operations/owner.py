"""The owner-only part of an index: read its tables, write to the index under its lock.

A column that an index lacks (it was made without `--pixels`, or by an older version) reads as null and is named in the
result, so that an operation can say what it could not look at.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.archive._parquet import quote, shared
from medssl.archive.ids import IdKey, load_key
from medssl.archive.table import Archive
from medssl.errors import RequestError
from medssl.locks import hold_lock

LISTED = "IN (SELECT unnest(?::VARCHAR[]))"
"""Condition on a column, with one list of texts as its parameter."""


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


def owner_files(archive: Archive, names: Sequence[str], condition: str, values: Sequence[str]) -> OwnerTable:
    """Read columns of `private/files.parquet` for some files of series, always with `series_id`.

    Args:
        archive: The index; it may have many millions of files, so that the condition is for DuckDB.
        names: Columns.
        condition: SQL with `?` for the values, for instance `series_id {LISTED}`.
        values: Texts that every `?` stands for, as a list.
    """
    path = archive.path / "private" / "files.parquet"
    return _read(path, ["series_id", *names], f"series_id IS NOT NULL AND ({condition})", list(values))


def columns_of(path: Path) -> list[str]:
    """Return the column names of a Parquet file."""
    return [row[0] for row in shared().execute(f"DESCRIBE SELECT * FROM read_parquet({quote(path)})").fetchall()]


def _read(path: Path, names: Sequence[str], condition: str = "true", values: Sequence[str] = ()) -> OwnerTable:
    there = set(columns_of(path))
    columns = ", ".join(name if name in there else f"NULL::VARCHAR AS {name}" for name in names)
    table = f"(SELECT {columns} FROM read_parquet({quote(path)})) AS t"
    parameters = [list(values)] * condition.count("?")
    cursor = shared()
    counts = cursor.execute(f"SELECT {', '.join(f'count({name})' for name in names)} FROM {table}").fetchone()
    rows = cursor.execute(f"SELECT * FROM {table} WHERE {condition} ORDER BY series_id", parameters).fetchall()
    silent = tuple(name for name, n in zip(names, counts) if n == 0)
    return OwnerTable([dict(zip(names, row)) for row in rows], silent)


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
    busy = f"{archive.path} is being written by another process; wait until it has finished"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold_lock(archive.path / "private" / "lock", busy))
        except OSError as err:
            raise RequestError(
                f"{archive.path} cannot be written ({err.strerror}); this needs the right to write to the index"
            ) from err
        yield
