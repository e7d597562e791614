"""Read and write Parquet through DuckDB, atomically and with the owner's rights only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from medssl.errors import StoreError

TEMPORARY = ".tmp-"
MEMORY = "1500MB"
"""What DuckDB may hold in memory; the rest spills."""
ROW_GROUP = 8192
"""Rows that a writer of Parquet holds in memory, times threads."""
LINE_ROWS = 4
"""Rows that `TableWriter` encodes in one call: a call a row takes nearly twice as long."""


def connect(spill: Path | None = None, *, threads: int | None = None) -> Any:
    """Return an in-memory DuckDB connection that loads no extension from elsewhere.

    Args:
        spill: Private folder for what does not fit into `MEMORY`; None spills nothing.
        threads: None takes one per core. A writer should have one: each holds row groups of its own.
    """
    import duckdb

    connection = duckdb.connect(":memory:")
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET preserve_insertion_order = true")
    # DuckDB's own default is a folder .tmp where the user stands, open to others.
    connection.execute("SET temp_directory = ''")
    if spill is not None:
        spill.mkdir(mode=0o700, exist_ok=True)
        connection.execute(f"SET memory_limit = '{MEMORY}'")
        connection.execute(f"SET temp_directory = {quote(spill)}")
    if threads is not None:
        connection.execute(f"SET threads = {threads}")
    return connection


_SHARED: dict[int, Any] = {}


def shared() -> Any:
    """Return a cursor for queries that make no tables, on the one connection that a process keeps: opening one costs 20 ms.

    A child that was forked makes its own and leaves its parent's alone.
    """
    import duckdb

    process = os.getpid()
    if process not in _SHARED:
        connection = connect(threads=1)
        with suppress(duckdb.Error):  # no such cache before 1.3
            connection.execute("SET enable_external_file_cache = false")
        _SHARED[process] = connection
    return _SHARED[process].cursor()


def quote(path: Path) -> str:
    """Return a path as an SQL string literal."""
    return "'" + str(path).replace("'", "''") + "'"


def short(text: str) -> str:
    """Return SQL for 64 bits that stand for a text. DuckDB's own `hash` is equal for many paths that differ in a few digits only."""
    return f"hash(md5({text}))"


def files_of(paths: Sequence[Path]) -> str:
    """Return a list of paths as an SQL list literal."""
    return "[" + ", ".join(quote(path) for path in paths) + "]"


def temporary(path: Path) -> Path:
    """Return the name under which a file is written before it is renamed."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


class TableWriter:
    """Collects rows for one Parquet file, in a file of lines and not in memory.

    Args:
        path: Target; replaced by `close`.
        columns: Column name -> DuckDB type, in order.
        connection: Encodes the file; None takes the shared one.
    """

    def __init__(self, path: Path, columns: Mapping[str, str], connection: Any = None) -> None:
        self.path, self.columns, self.connection = path, columns, connection
        self.rows = 0
        self._pending: list[dict[str, Any]] = []
        self._longest = 0
        self._lines = temporary(path).with_suffix(".json")
        with _failing_as_store_error(path):
            self._handle = open(os.open(self._lines, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w")  # noqa: SIM115

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row of JSON-able values; absent means null."""
        self._pending.append({name: row.get(name) for name in self.columns})
        self.rows += 1
        if len(self._pending) == LINE_ROWS:
            self._write_line()

    def _write_line(self) -> None:
        line = json.dumps(self._pending)
        self._pending.clear()
        self._longest = max(self._longest, len(line))
        try:
            self._handle.write(line + "\n")
        except OSError as err:
            self.discard()
            raise _not_written(self.path, err) from err

    def close(self) -> None:
        """Write the Parquet file aside and rename it."""
        if self._pending:
            self._write_line()
        row = ", ".join(f'"{name}" {kind}' for name, kind in self.columns.items())
        # DuckDB takes a multiple of the size it is told, whatever the file holds.
        size = max(1 << 18, self._longest + 1)
        lines = f"""read_json({quote(self._lines)}, format='newline_delimited', records=false, columns={{'line': 'STRUCT({row})[]'}},
        maximum_object_size={size})"""
        try:
            with _failing_as_store_error(self.path):
                self._handle.close()
            write_query(self.path, f"SELECT r.* FROM (SELECT unnest(line) AS r FROM {lines})", self.connection)
        finally:
            self._lines.unlink(missing_ok=True)

    def discard(self) -> None:
        """Give up; nothing is left behind."""
        self._lines.unlink(missing_ok=True)


class _failing_as_store_error:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, err: BaseException | None, trace: Any) -> None:
        if isinstance(err, OSError):
            raise _not_written(self.path, err) from err


def _not_written(path: Path, err: BaseException) -> StoreError:
    return StoreError(
        f"the index could not be written in {path.parent} ({type(err).__name__}); what was written before stays "
        "valid; free some space or check the disk, and run the same command again to go on"
    )


def write_query(path: Path, query: str, connection: Any = None) -> None:
    """Write the result of a query as one Parquet file, aside and renamed, mode 0600.

    Raises:
        StoreError: The disk is full or failing; the old file, if any, is still there.
    """
    import duckdb

    aside = temporary(path)
    own = shared() if connection is None else connection
    try:
        # The file is there with the owner's rights before DuckDB fills it: a kill leaves nothing that others may read.
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        form = f"FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE {ROW_GROUP}, USE_TMP_FILE false"
        own.execute(f"COPY ({query}) TO {quote(aside)} ({form})")
        with open(aside, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except (OSError, duckdb.Error) as err:
        aside.unlink(missing_ok=True)
        raise _not_written(path, err) from err
    finally:
        if connection is None:
            own.close()


def write_table(path: Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], connection: Any = None) -> None:
    """Write rows as one Parquet file, aside and renamed, mode 0600.

    Args:
        path: Target; replaced when present.
        columns: Column name -> DuckDB type, in order.
        rows: JSON-able values by column name; absent means null.
        connection: See `TableWriter`.

    Raises:
        StoreError: The disk is full or failing; the old file, if any, is still there.
    """
    writer = TableWriter(path, columns, connection)
    try:
        for row in rows:
            writer.append(row)
    except BaseException:
        writer.discard()
        raise
    writer.close()


def read_table(paths: Sequence[Path], columns: Iterable[str]) -> list[dict[str, Any]]:
    """Return all rows of some Parquet files of one schema, in order."""
    if not paths:
        return []
    names = list(columns)
    found = shared().execute(f"SELECT {', '.join(names)} FROM read_parquet({files_of(paths)})").fetchall()
    return [dict(zip(names, row)) for row in found]


def stream(connection: Any, query: str, size: int = 20_000) -> Iterator[dict[str, Any]]:
    """Yield the rows of a query without holding them all. The connection serves nothing else meanwhile: give a cursor."""
    result = connection.execute(query)
    names = [column[0] for column in result.description]
    while rows := result.fetchmany(size):
        for row in rows:
            yield dict(zip(names, row))


def write_json(path: Path, values: Any) -> None:
    """Write JSON aside and rename it, mode 0600."""
    aside = temporary(path)
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
