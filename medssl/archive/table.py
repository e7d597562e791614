"""Read an index: rows of `series.parquet`, selected by SQL, and the files behind them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from medssl.archive._parquet import connect, quote, read_table
from medssl.errors import RequestError, near

FORMAT = 1
SERIES_COLUMNS: dict[str, str] = {
    "series_id": "VARCHAR",
    "study_id": "VARCHAR",
    "patient_id": "VARCHAR",
    "modality": "VARCHAR",
    "domain": "VARCHAR",
    "kind": "VARCHAR",
    "role": "VARCHAR",
    "shape": "INTEGER[]",
    "n_slices": "INTEGER",
    "n_volumes": "INTEGER",
    "volume_index": "INTEGER",
    "volume_axis": "VARCHAR",
    "spacing_mm": "DOUBLE[]",
    "slice_thickness_mm": "DOUBLE",
    "slice_step_mm": "DOUBLE",
    "step_cv": "DOUBLE",
    "max_gap_mm": "DOUBLE",
    "extent_mm": "DOUBLE[]",
    "tilt_deg": "DOUBLE",
    "slice_axis": "INTEGER",
    "plane": "VARCHAR",
    "orientation": "VARCHAR",
    "dtype": "VARCHAR",
    "bits": "INTEGER",
    "photometric": "VARCHAR",
    "transfer_syntax": "VARCHAR",
    "lossy": "BOOLEAN",
    "units": "VARCHAR",
    "n_files": "INTEGER",
    "bytes": "BIGINT",
    "vendor": "VARCHAR",
    "field_strength_t": "DOUBLE",
    "kvp": "DOUBLE",
    "tr": "DOUBLE",
    "te": "DOUBLE",
    "ti": "DOUBLE",
    "body_region": "VARCHAR",
    "sex": "VARCHAR",
    "site": "VARCHAR",
    "split": "VARCHAR",
    "quality_flags": "VARCHAR[]",
    "status": "VARCHAR",
    "reason": "VARCHAR",
}
FILE_COLUMNS: dict[str, str] = {"file_id": "VARCHAR", "series_id": "VARCHAR", "reason": "VARCHAR"}
PRIVATE_FILE_COLUMNS: dict[str, str] = {
    "file_id": "VARCHAR",
    "series_id": "VARCHAR",
    "place": "INTEGER",
    "path": "VARCHAR",
    "digest": "VARCHAR",
}
PRIVATE_SERIES_COLUMNS: dict[str, str] = {"series_id": "VARCHAR", "source_tag": "VARCHAR", "uids": "VARCHAR"}


@dataclass(frozen=True)
class SeriesRow:
    """One image series: one row of `series.parquet`. `unknown` and None mean that the source does not say.

    Args:
        series_id: 32 hex digits.
        study_id: 32 hex digits.
        patient_id: 32 hex digits.
        modality: DICOM modality of the closed list in `archive.series`, `other` or `unknown`.
        domain: ct, mri, xray, ultrasound, wsi, microscopy, other, or unknown for formats that cannot say.
        kind: volume, volume_4d, image or cine.
        role: source, localiser, reformat, mip, derived_map, screenshot or unknown.
        shape: (X, Y, Z) in canonical axes; as stored for what is no volume.
        n_slices: Slices of the source.
        n_volumes: Volumes that the source kept in one series.
        volume_index: Which of them this is, from 0.
        volume_axis: The tag that tells them apart, `visit` or `none`.
        spacing_mm: Along X, Y, Z in canonical axes; None when missing.
        slice_thickness_mm: As stated.
        slice_step_mm: Distance between slices, from their positions.
        step_cv: Its coefficient of variation.
        max_gap_mm: Its maximum.
        extent_mm: Shape times spacing.
        tilt_deg: Shear of the stack against its normal.
        slice_axis: Canonical array axis along which slices lie.
        plane: axial, coronal, sagittal or unknown, from the slice axis.
        orientation: Axis codes as stored, for instance LPS.
        dtype: Stored type.
        bits: Bits stored.
        photometric: DICOM photometric interpretation.
        transfer_syntax: Name of the closed list in `archive.dicom_header`; `none` for other formats.
        lossy: Lossy compression, now or before.
        units: HU, arbitrary or unknown.
        n_files: Files of the series.
        bytes: Their size.
        vendor: Closed list.
        field_strength_t: Tesla.
        kvp: Peak kilovoltage.
        tr: Repetition time, ms.
        te: Echo time, ms.
        ti: Inversion time, ms.
        body_region: Closed list.
        sex: F, M, O or unknown.
        site: What the user named the source.
        split: train, val, test or unknown.
        quality_flags: See `archive.reasons.FLAGS`.
        status: ok, flagged or rejected.
        reason: See `archive.reasons.SERIES_REASONS`; None unless rejected.
    """

    series_id: str
    study_id: str
    patient_id: str
    modality: str = "unknown"
    domain: str = "unknown"
    kind: str = "volume"
    role: str = "unknown"
    shape: tuple[int, ...] = ()
    n_slices: int | None = None
    n_volumes: int = 1
    volume_index: int = 0
    volume_axis: str = "none"
    spacing_mm: tuple[float, ...] | None = None
    slice_thickness_mm: float | None = None
    slice_step_mm: float | None = None
    step_cv: float | None = None
    max_gap_mm: float | None = None
    extent_mm: tuple[float, ...] | None = None
    tilt_deg: float | None = None
    slice_axis: int | None = None
    plane: str = "unknown"
    orientation: str = "unknown"
    dtype: str = "unknown"
    bits: int | None = None
    photometric: str = "unknown"
    transfer_syntax: str = "none"
    lossy: bool | None = None
    units: str = "unknown"
    n_files: int = 1
    bytes: int = 0
    vendor: str = "unknown"
    field_strength_t: float | None = None
    kvp: float | None = None
    tr: float | None = None
    te: float | None = None
    ti: float | None = None
    body_region: str = "unknown"
    sex: str = "unknown"
    site: str = "unknown"
    split: str = "unknown"
    quality_flags: tuple[str, ...] = ()
    status: str = "ok"
    reason: str | None = None


class Archive:
    """An index on disk.

    Args:
        path: Its folder.
        summary: Content of `summary.json`.
    """

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        self.path = path
        self.summary = summary
        self._files: dict[str, list[tuple[Path, str]]] | None = None
        self._tags: dict[str, str] | None = None

    @property
    def key_fingerprint(self) -> str:
        """Fingerprint of the id key: patients of two indexes can be compared only when it is the same."""
        return str(self.summary["key"])

    @classmethod
    def open(cls, path: Path | str) -> Archive:
        """Open an index.

        Raises:
            RequestError: The folder holds none, an unfinished one, or one of a newer format.
        """
        path = Path(path)
        try:
            summary = json.loads((path / "summary.json").read_text())
        except FileNotFoundError as err:
            raise RequestError(
                f"{path} holds no index (no summary.json); make one with `medssl index SRC... --out {path}`"
            ) from err
        except (OSError, ValueError) as err:
            raise RequestError(f"{path}/summary.json cannot be read ({type(err).__name__}); run `medssl index` again") from err
        if summary.get("format") != FORMAT:
            raise RequestError(
                f"{path} has index format {summary.get('format')}; this version reads {FORMAT}; run `medssl index` again"
            )
        missing = [name for name in ("series.parquet", "files.parquet", "private") if not (path / name).exists()]
        if missing:
            raise RequestError(f"{path} lacks {', '.join(missing)}: the index is incomplete; run `medssl index` again")
        return cls(path, dict(summary))

    def select(self, where: str | None = None, *, rejected: bool = False) -> list[SeriesRow]:
        """Return rows in the order of their series ids.

        Args:
            where: An SQL condition on the columns of `SeriesRow`, for instance `modality = 'MR' and n_slices > 20`.
            rejected: Include rows that cannot be read as an image (status `rejected`).

        Raises:
            RequestError: The condition is not valid SQL on these columns.
        """
        import duckdb

        names = [field.name for field in fields(SeriesRow)]
        condition = f"({where})" if where and where.strip() else "true"
        query = f"SELECT {', '.join(names)} FROM series WHERE {condition}"
        if not rejected:
            query += " AND status <> 'rejected'"
        query += " ORDER BY series_id"
        connection = connect()
        try:
            connection.execute(f"CREATE TABLE series AS SELECT * FROM read_parquet({quote(self.path / 'series.parquet')})")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            if len(connection.extract_statements(query)) != 1:
                raise RequestError(f"where: {where!r} is more than one statement; give one condition")
            found = connection.execute(query).fetchall()
        except duckdb.Error as err:
            first = str(err).splitlines()[0]
            unknown = first.split('"')[1] if 'column "' in first else ""
            raise RequestError(
                f"where: {where!r} is not a condition that can be used ({first}){near(unknown, names)}; columns: {', '.join(names)}"
            ) from err
        finally:
            connection.close()
        return [_row(dict(zip(names, values))) for values in found]

    def files(self, series_id: str) -> list[Path]:
        """Return the source files of a series, DICOM slices in slice order.

        Raises:
            RequestError: The index has no such series.
        """
        return [path for path, _ in self._entries(series_id)]

    def digests(self, series_id: str) -> list[str]:
        """Return the digests of the files of a series, in the order of `files`."""
        return [digest for _, digest in self._entries(series_id)]

    def source_tag(self, series_id: str) -> str:
        """Return a keyed hash over the digests of a series: another value means that its files have changed."""
        if self._tags is None:
            rows = read_table([self.path / "private" / "series.parquet"], ("series_id", "source_tag"))
            self._tags = {row["series_id"]: row["source_tag"] for row in rows}
        if series_id not in self._tags:
            raise RequestError(f"the index {self.path} has no series {series_id}")
        return self._tags[series_id]

    def _entries(self, series_id: str) -> list[tuple[Path, str]]:
        if self._files is None:
            table: dict[str, list[tuple[int, Path, str]]] = defaultdict(list)
            for row in read_table([self.path / "private" / "files.parquet"], PRIVATE_FILE_COLUMNS):
                if row["series_id"] is not None and row["place"] is not None:
                    table[row["series_id"]].append((row["place"], Path(row["path"]), row["digest"]))
            self._files = {key: [(path, digest) for _, path, digest in sorted(rows)] for key, rows in table.items()}
        if series_id not in self._files:
            raise RequestError(f"the index {self.path} has no series {series_id}")
        return self._files[series_id]


def _row(values: dict[str, Any]) -> SeriesRow:
    for name in ("shape", "spacing_mm", "extent_mm", "quality_flags"):
        if values[name] is not None:
            values[name] = tuple(values[name])
    return SeriesRow(**values)
