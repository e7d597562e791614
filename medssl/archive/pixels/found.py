"""What `medssl index --pixels` found, kept beside the index and joined to its tables whenever they are written.

    private/pixels.parquet            one row per series looked at: hashes, statistics, flags, or why it could not be read
    private/pixels/part-*.parquet     the same, of a pass that is under way or was killed
    private/near_duplicates.parquet   group_number, series_id: series that look alike

A result counts as long as the `source_tag` of its series is the same. `domains.pixel_pass` fills the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medssl.archive._parquet import TEMPORARY, connect, files_of, quote, shared, write_query, write_table
from medssl.archive.pixels.checks import QUALITY_FLAGS, near_duplicate_groups
from medssl.archive.scanning.scan import RETRIED
from medssl.archive.table import SERIES_COLUMNS

VERSION = 1
"""Raised whenever a pass would find something else in the same files: all series are looked at again."""
PIXEL_COLUMNS: dict[str, str] = {
    "series_id": "VARCHAR",
    "source_tag": "VARCHAR",
    "version": "INTEGER",
    "part": "INTEGER",
    "reason": "VARCHAR",
    "content_hash": "VARCHAR",
    "perceptual_hash": "VARCHAR",
    **dict.fromkeys(("min", "max", "mean", "std", "p01", "p50", "p99", "finite_fraction", "text_score"), "DOUBLE"),
    "quality_flags": "VARCHAR[]",
    "privacy_flags": "VARCHAR[]",
}
"""`part`: number of the part that a row was written in; the highest of a series counts. Hashes are hexadecimal."""
GROUP_COLUMNS = {"group_number": "INTEGER", "series_id": "VARCHAR"}
PRIVACY_FLAGS = ("burned_in_suspected", "marker")
AGAIN = (*sorted(RETRIED), "no_decoder")
"""Reasons that another run may not meet."""


class PixelTable:
    """The results in `private/`, one part at a time.

    Args:
        private: Folder `private` of the index.
    """

    def __init__(self, private: Path) -> None:
        self.private, self.path, self.folder = private, private / "pixels.parquet", private / "pixels"
        self.folder.mkdir(mode=0o700, exist_ok=True)
        for stray in self.folder.glob(f"{TEMPORARY}*"):
            stray.unlink(missing_ok=True)

    def results(self) -> str:
        """Return an SQL query of the newest result of every series."""
        files = [path for path in (self.path, *sorted(self.folder.glob("part-*.parquet"))) if path.exists()]
        if not files:
            return "SELECT " + ", ".join(f"NULL::{kind} AS {name}" for name, kind in PIXEL_COLUMNS.items()) + " LIMIT 0"
        return f"SELECT DISTINCT ON (series_id) * FROM read_parquet({files_of(files)}) ORDER BY series_id, part DESC"

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows of `PIXEL_COLUMNS` as one part."""
        number = _one(f"SELECT coalesce(max(part) + 1, 0) FROM ({self.results()})")
        marked = ({**row, "version": VERSION, "part": number} for row in rows)
        write_table(self.folder / f"part-{number:08d}.parquet", PIXEL_COLUMNS, marked)

    def missing(self) -> list[dict[str, Any]]:
        """Return `series_id`, `source_tag`, `domain`, `kind` and `bits` of the usable series without a result that counts."""
        again = ", ".join(f"'{reason}'" for reason in AGAIN)
        query = f"""SELECT s.series_id, p.source_tag, s.domain, s.kind, s.bits
            FROM read_parquet({quote(self.private.parent / "series.parquet")}) s
            JOIN read_parquet({quote(self.private / "series.parquet")}) p USING (series_id)
            WHERE s.status <> 'rejected' AND (s.series_id, p.source_tag) NOT IN (
                SELECT (series_id, source_tag) FROM ({self.results()}) WHERE version = {VERSION} AND coalesce(reason, '') NOT IN ({again})
            ) ORDER BY s.series_id"""
        names = ("series_id", "source_tag", "domain", "kind", "bits")
        return [dict(zip(names, row)) for row in shared().execute(query).fetchall()]

    def merge(self) -> None:
        """Join the parts into `pixels.parquet` without what is no longer in the index, and group what looks alike."""
        current = f"""SELECT r.* FROM ({self.results()}) r JOIN read_parquet({quote(self.private / "series.parquet")}) p USING (series_id)
            JOIN read_parquet({quote(self.private.parent / "series.parquet")}) s USING (series_id)
            WHERE r.source_tag = p.source_tag AND s.status <> 'rejected' ORDER BY series_id"""
        write_query(self.path, current)
        query = (
            f"SELECT series_id, perceptual_hash FROM read_parquet({quote(self.path)}) WHERE perceptual_hash IS NOT NULL ORDER BY 1"
        )
        hashed = shared().execute(query).fetchall()
        for part in self.folder.glob("part-*.parquet"):
            part.unlink(missing_ok=True)
        groups = near_duplicate_groups([int(value, 16) for _, value in hashed])
        rows = ({"group_number": n, "series_id": hashed[k][0]} for n, group in enumerate(groups) for k in group)
        write_table(self.private / "near_duplicates.parquet", GROUP_COLUMNS, rows)

    def apply(self) -> None:
        """Rewrite `series.parquet` and its private half with the results."""
        public, owner = self.private.parent / "series.parquet", self.private / "series.parquet"
        connection = connect()
        try:
            connection.execute(f"CREATE TABLE s AS SELECT * FROM read_parquet({quote(public)})")
            connection.execute(f"CREATE TABLE p AS SELECT * FROM read_parquet({quote(owner)})")
            apply_pixels(connection, self.private)
            write_query(owner, "SELECT * FROM p ORDER BY series_id", connection)
            write_query(public, f"SELECT {', '.join(SERIES_COLUMNS)} FROM s ORDER BY series_id", connection)
        finally:
            connection.close()


def forget_pixels(private: Path) -> None:
    """Delete what was found in the pixels of series that are no longer used, their hashes above all."""
    if (private / "pixels").is_dir():
        table = PixelTable(private)
        table.merge()
        table.apply()


def apply_pixels(connection: Any, private: Path) -> None:
    """Give the rows of the tables `s` (as `series.parquet`) and `p` (as its private half) what is known of their pixels.

    Flags and hashes of files that have changed are taken away. Without `private/pixels.parquet` nothing happens.
    """
    path = private / "pixels.parquet"
    if not path.exists():
        return
    for column, flags in (("quality_flags", QUALITY_FLAGS), ("privacy_flags", PRIVACY_FLAGS)):
        names = "[" + ", ".join(f"'{flag}'" for flag in flags) + "]"
        connection.execute(f"UPDATE s SET {column} = [x for x in {column} if NOT list_contains({names}, x)]")
    connection.execute("UPDATE p SET content_hash = NULL, perceptual_hash = NULL")
    connection.execute(
        f"""CREATE TABLE seen AS SELECT r.* FROM read_parquet({quote(path)}) r JOIN p USING (series_id, source_tag)
        JOIN s USING (series_id) WHERE s.status <> 'rejected' AND r.version = {VERSION}"""
    )
    connection.execute(
        "UPDATE p SET content_hash = r.content_hash, perceptual_hash = r.perceptual_hash FROM seen r WHERE p.series_id = r.series_id"
    )
    connection.execute(
        """UPDATE s SET quality_flags = list_concat(s.quality_flags, r.quality_flags),
        privacy_flags = list_concat(s.privacy_flags, r.privacy_flags) FROM seen r WHERE s.series_id = r.series_id"""
    )
    connection.execute(
        "UPDATE s SET status = CASE WHEN len(quality_flags) > 0 THEN 'flagged' ELSE 'ok' END WHERE status <> 'rejected'"
    )
    connection.execute("DROP TABLE seen")


def pixel_counts(out: Path) -> dict[str, Any] | None:
    """Return what is known of the pixels of an index, for `summary.json`; None when nobody looked.

    Returns:
        `series` (usable ones), `read`, `waiting` (without a result), `failed` (reason -> number; these sum up to `series`), `flags`
        (flag -> number), `near_duplicates`: `groups`, the `series` in them, and the `groups_of_several_patients`.
    """
    private = out / "private"
    if not (private / "pixels.parquet").exists() or not (private / "near_duplicates.parquet").exists():
        return None
    connection = connect()
    try:
        connection.execute(
            f"CREATE TABLE s AS SELECT * FROM read_parquet({quote(out / 'series.parquet')}) WHERE status <> 'rejected'"
        )
        connection.execute(
            f"""CREATE TABLE seen AS SELECT r.* FROM read_parquet({quote(private / "pixels.parquet")}) r
            JOIN read_parquet({quote(private / "series.parquet")}) p USING (series_id, source_tag)
            WHERE series_id IN (SELECT series_id FROM s) AND version = {VERSION}"""
        )
        n, looked = (connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("s", "seen"))
        failed = dict(
            connection.execute("SELECT reason, count(*) FROM seen WHERE reason IS NOT NULL GROUP BY 1 ORDER BY 1").fetchall()
        )
        flags = connection.execute(
            "SELECT f, count(*) FROM (SELECT unnest(list_concat(quality_flags, privacy_flags)) AS f FROM seen) GROUP BY 1 ORDER BY 1"
        ).fetchall()
        groups = connection.execute(
            f"""SELECT count(*), coalesce(sum(members), 0), count(*) FILTER (people > 1) FROM (
                SELECT count(*) AS members, count(DISTINCT patient_id) AS people
                FROM read_parquet({quote(private / "near_duplicates.parquet")}) JOIN s USING (series_id) JOIN seen USING (series_id)
                GROUP BY group_number HAVING count(*) > 1)"""
        ).fetchone()
    finally:
        connection.close()
    return {
        "series": n,
        "read": looked - sum(failed.values()),
        "waiting": n - looked,
        "failed": failed,
        "flags": dict(flags),
        "near_duplicates": dict(zip(("groups", "series", "groups_of_several_patients"), map(int, groups))),
    }


def _one(query: str) -> int:
    return int(shared().execute(query).fetchone()[0])
