"""An index on disk from rows that a test makes up, so that counts and cells can be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medssl.archive._parquet import write_json, write_table
from medssl.archive.rows.base import as_record
from medssl.archive.table import FORMAT, PRIVATE_FILE_COLUMNS, PRIVATE_SERIES_COLUMNS, SERIES_COLUMNS, SeriesRow


def write_index(folder: Path, rows: Sequence[SeriesRow], *, key: str = "0" * 16) -> Path:
    """Write what `Archive` reads for counting: one file per series, whose digest comes from its place in `rows`."""
    (folder / "private").mkdir(parents=True)
    (folder / "files.parquet").mkdir()
    write_table(folder / "series.parquet", SERIES_COLUMNS, (as_record(row) for row in rows))
    files = [
        {"file_id": f"{i:032x}", "series_id": row.series_id, "place": 0, "path": f"/secret/{i}.dcm", "digest": f"{i:040x}"}
        for i, row in enumerate(rows)
    ]
    write_table(folder / "private" / "files.parquet", PRIVATE_FILE_COLUMNS, files)
    tags = [{"series_id": row.series_id, "source_tag": f"{i:032x}"} for i, row in enumerate(rows)]
    write_table(folder / "private" / "series.parquet", PRIVATE_SERIES_COLUMNS, tags)
    write_json(folder / "summary.json", {"format": FORMAT, "key": key})
    return folder


def row(number: int, patient: int, **values: object) -> SeriesRow:
    """Return a usable series of a patient; ids are hex digits made from the numbers."""
    ids = {"series_id": f"5{number:031x}", "study_id": f"7{patient:031x}", "patient_id": f"9{patient:031x}"}
    return SeriesRow(**ids, **values)  # type: ignore[arg-type]
