"""What of an index has to be built again after a scan, and what only has to be named anew.

Rows follow from the headers of all files of a group, so that a group is built again where any header of it says something else. A DICOM
file whose content alone is another one (its pixels, or nothing but its time of change) leaves the rows as they are: the ids that
follow from digest and time are made again, which takes no header.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from medssl.archive._parquet import quote
from medssl.archive.ids import IdKey, file_id, source_tag

BATCH = 20_000
"""Rows taken from and given to DuckDB at a time."""

SOURCE_FOLD = "bit_xor(('0x' || md5(concat_ws(' ', place, digest, mtime_ns))[:16])::UBIGINT)"
"""`ids.source_fold` of the files of a series, as an SQL aggregate."""


def find_changed(connection: Any, private: Path) -> None:
    """Find what the tables on disk do not describe any more.

    Makes `changed` (`group_key`), the groups to build again, and `reworded` (`group_key`, `path_id`, `path`, `digest`, `mtime_ns`), files
    of other groups that have a new digest or time and are else what they were.

    Args:
        connection: With `live`, `conflict` and `marks`.
        private: Folder `private` of the index.
    """
    files, series, marks = (quote(private / f"{name}.parquet") for name in ("files", "series", "marks"))
    # A hash of the digest, so that few bytes a file are held; a collision builds a group too many.
    facts = "path_id, group_key, hash(digest) AS digest, mtime_ns, told"
    connection.execute(
        f"""CREATE TABLE altered AS SELECT path_id, before.group_key AS was, now.group_key AS is_now,
            coalesce(now.alone AND before.group_key = now.group_key AND before.told = now.told AND NOT before.withdrawn, false) AS content_alone
        FROM (SELECT {facts}, reason IS NOT DISTINCT FROM 'withdrawn' AS withdrawn FROM read_parquet({files})) before
        FULL JOIN (SELECT {facts}, part IS NULL AS unopened,
            kind = 'dicom' AND reason IS NULL AND sop_id IS NOT NULL AND sop_id NOT IN (SELECT sop_id FROM conflict) AS alone FROM live) now
        USING (path_id) WHERE now.unopened
            OR (before.group_key, before.digest, before.mtime_ns, before.told)
            IS DISTINCT FROM (now.group_key, now.digest, now.mtime_ns, now.told)"""
    )
    # Files that hold several series are named by the digests of series that they do not belong to.
    several = f"SELECT group_key FROM read_parquet({series}) WHERE files_of <> series_id"
    connection.execute(
        f"""CREATE TABLE changed AS SELECT DISTINCT group_key FROM (
        SELECT unnest([was, is_now]) AS group_key FROM altered WHERE NOT content_alone
        UNION ALL SELECT was FROM altered WHERE was IN ({several})
        UNION ALL SELECT group_key FROM (FROM marks EXCEPT FROM read_parquet({marks}))
        UNION ALL SELECT group_key FROM (FROM read_parquet({marks}) EXCEPT FROM marks)) WHERE group_key IS NOT NULL"""
    )
    connection.execute(
        """CREATE TABLE reworded AS SELECT group_key, path_id, path, digest, mtime_ns FROM live
        WHERE path_id IN (SELECT path_id FROM altered WHERE content_alone) AND group_key NOT IN (SELECT group_key FROM changed)"""
    )
    connection.execute("DROP TABLE altered")


def name_anew(connection: Any, private: Path, key: IdKey) -> None:
    """Make the ids that follow from the digests and times of `reworded`.

    The connection gets tables `new_files` (`path_id`, `digest`, `mtime_ns`, `file_id`) and `new_tags` (`series_id`, `source_tag`).

    Args:
        connection: With `reworded`.
        private: Folder `private` of the index.
        key: The owner's key.
    """
    connection.execute("CREATE TABLE new_files (path_id UBIGINT, digest VARCHAR, mtime_ns BIGINT, file_id VARCHAR)")
    connection.execute("CREATE TABLE new_tags (series_id VARCHAR, source_tag VARCHAR)")
    files = _rows(connection, "SELECT path_id, path, digest, mtime_ns FROM reworded")
    ids = ((path_id, digest, mtime_ns, file_id(key, path, digest)) for path_id, path, digest, mtime_ns in files)
    _insert(connection, "new_files", ids)
    current = f"""SELECT f.series_id, f.place, coalesce(r.digest, f.digest) AS digest, coalesce(r.mtime_ns, f.mtime_ns) AS mtime_ns
        FROM read_parquet({quote(private / "files.parquet")}) f LEFT JOIN reworded r USING (path_id)
        WHERE f.series_id IS NOT NULL AND f.place IS NOT NULL AND f.group_key IN (SELECT group_key FROM reworded)"""
    series = _rows(connection, f"SELECT series_id, {SOURCE_FOLD} FROM ({current}) GROUP BY series_id")
    _insert(connection, "new_tags", ((name, source_tag(key, fold)) for name, fold in series))


def _rows(connection: Any, query: str) -> Iterator[tuple[Any, ...]]:
    cursor = connection.cursor().execute(query)
    while rows := cursor.fetchmany(BATCH):
        yield from rows


def _insert(connection: Any, table: str, rows: Iterator[tuple[Any, ...]]) -> None:
    kinds = [row[1] for row in connection.execute(f"DESCRIBE {table}").fetchall()]
    while batch := list(islice(rows, BATCH)):
        columns = [list(column) for column in zip(*batch)]
        connection.execute(f"INSERT INTO {table} SELECT {', '.join(f'unnest(?::{kind}[])' for kind in kinds)}", columns)
