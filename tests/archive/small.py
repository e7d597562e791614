"""Small archives for the tests of the operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from medssl.archive.index import index
from medssl.archive.table import Archive
from tests.synthetic import plain_affine, write_dicom_series


def write_scans(
    folder: Path, numbers: Iterable[int], *, shift: int = 0, modality: str = "MR", prefix: str = "P", **extra: Any
) -> None:
    """Write one series of two slices per number: patient `P0000` and so on, study and instance UIDs of their own."""
    rng = np.random.default_rng(7)
    base = rng.integers(0, 900, (8, 9, 2)).astype(np.int16)
    for n in numbers:
        tags = {"StudyDate": f"2019{n % 12 + 1:02d}15", "AccessionNumber": f"ACC{n:05d}", **extra}
        write_dicom_series(
            folder / f"{n:04d}",
            base + np.int16(n + shift),
            plain_affine((1.0, 1.0, 2.0)),
            modality=modality,
            patient_id=f"{prefix}{n:04d}",
            uid_seed=f"{prefix} {n}",
            extra=tags,
        )


def small_archive(folder: Path, n: int, **options: Any) -> Archive:
    """Write n patients of one series each under `folder/src` and index them into `folder/out`."""
    write_scans(folder / "src", range(n), **options)
    index([folder / "src"], folder / "out")
    return Archive.open(folder / "out")


def set_private(archive: Archive, values: Mapping[str, Mapping[str, Any]], table: str = "series") -> None:
    """Set columns of `private/series.parquet` (or add text columns that are absent): series_id -> {column: value}."""
    _set(archive.path / "private" / f"{table}.parquet", values)


def set_public(archive: Archive, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Set columns of `series.parquet`: series_id -> {column: value}."""
    _set(archive.path / "series.parquet", values)


def _set(path: Path, values: Mapping[str, Mapping[str, Any]]) -> None:
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE t AS SELECT * FROM read_parquet(?)", [str(path)])
        there = {row[0] for row in connection.execute("DESCRIBE t").fetchall()}
        for name in {name for row in values.values() for name in row} - there:
            connection.execute(f"ALTER TABLE t ADD COLUMN {name} VARCHAR")
        for series_id, row in values.items():
            for name, value in row.items():
                connection.execute(f"UPDATE t SET {name} = ? WHERE series_id = ?", [value, series_id])
        connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")
