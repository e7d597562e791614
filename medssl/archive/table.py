"""Read an index: rows of `series.parquet`, selected by SQL, and the files behind them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from medssl.archive._parquet import connect, quote, read_table
from medssl.archive.condition import NEVER_UNKNOWN, check_condition, inside, refuse, unknown_as_null
from medssl.archive.headers.containers import SEPARATOR, unpack
from medssl.archive.paths import to_path
from medssl.errors import ImageError, RequestError, StoreError

FORMAT = 4
"""3: private files say what they were built from (`told`). 4: they are told apart by their paths (`path_id`). An index of another form is built
again from its scan."""
FILE_COLUMNS: dict[str, str] = {"file_id": "VARCHAR", "series_id": "VARCHAR", "reason": "VARCHAR"}
PRIVATE_FILE_COLUMNS: dict[str, str] = {
    "file_id": "VARCHAR",
    "series_id": "VARCHAR",
    "reason": "VARCHAR",
    "place": "INTEGER",
    "path": "VARCHAR",
    "digest": "VARCHAR",
    "mtime_ns": "BIGINT",
    "sop_uid": "VARCHAR",
    "group_key": "VARCHAR",
    "path_id": "UBIGINT",
    "told": "UBIGINT",
}
"""`path_id`, `told`: as in `known.KNOWN_COLUMNS`, of what the rows were built from."""
PRIVATE_SERIES_COLUMNS: dict[str, str] = {
    "series_id": "VARCHAR",
    "source_tag": "VARCHAR",
    "part": "VARCHAR",
    "files_of": "VARCHAR",
    "study_uid": "VARCHAR",
    "series_uid": "VARCHAR",
    "mrn": "VARCHAR",
    "issuer": "VARCHAR",
    "accession": "VARCHAR",
    "study_date": "VARCHAR",
    "content_hash": "VARCHAR",
    "perceptual_hash": "VARCHAR",
    "instance": "VARCHAR",
    "made_from": "VARCHAR",
    "group_key": "VARCHAR",
}
"""`instance` and `made_from`: keyed hashes of the instance UID of a projection image and of those it was made from (see
`archive.twins`). `part`: JSON, what of its files a series is (see `domains.base.Domain.read`), or null for all of it.
`files_of`: the series that owns its files where several lie in one file, or null."""


@dataclass(frozen=True)
class SeriesRow:
    """One image series: one row of `series.parquet`.

    Text columns are closed vocabularies. `unknown`, None and an empty tuple mean that the source does not say.

    Args:
        series_id: 32 hex digits.
        study_id: 32 hex digits.
        patient_id: 32 hex digits.
        modality: DICOM modality of the closed list in `archive.attributes`, `other` or `unknown`.
        domain: ct, mri, xray, ultrasound, wsi, microscopy, other, or unknown for formats that cannot say.
        kind: volume, volume_4d, image, cine or slide.
        role: source, localiser, reformat, mip, derived_map, screenshot, report, label, overview (of slides) or unknown.
        subject_kind: human, phantom, animal or unknown.
        intent: presentation, processing or unknown.
        shape: (X, Y, Z) in canonical axes for volumes; (H, W) images, (T, H, W) clips, (H, W) of the finest level for slides.
        n_slices: Slices of the source.
        n_volumes: Volumes that the source kept in one series.
        volume_index: Which of them this is, from 0.
        volume_axis: The tag that tells them apart, `visit`, `time`, `block`, `mosaic` or `none`.
        spacing_mm: Along X, Y, Z in canonical axes; (row step, column step) for images and clips; None when missing.
        spacing_source: header, detector, magnification, calibration, region, user or unknown.
        slice_thickness_mm: As stated.
        slice_step_mm: Distance between slices, from their positions.
        step_cv: Its coefficient of variation.
        max_gap_mm: Its maximum.
        extent_mm: Shape times spacing.
        tilt_deg: Shear of the stack against its normal.
        slice_axis: Canonical array axis along which slices lie.
        plane: axial, coronal, sagittal or unknown, from the slice axis.
        orientation: Axis codes as stored, for instance LPS.
        patient_position: hfs, hfp, ffs, ffp, hfdr, hfdl, ffdr, ffdl or unknown.
        frame_time_ms: Mean time between frames.
        fps_source: vector, frame_time, cine_rate, recommended, container, timestamps or unknown.
        heart_rate: Beats per minute.
        stage: rest, stress or unknown.
        mpp: Micrometres per pixel of the finest level of a slide.
        dtype: Stored type.
        bits: Bits stored.
        photometric: DICOM photometric interpretation.
        transfer_syntax: Name of the closed list in `archive.dicom_header`; `none` for other formats.
        lossy: Lossy compression, now or before.
        lossy_ratio: As stated.
        padding_value: As stated.
        units: HU, arbitrary or unknown.
        n_files: Files of the series.
        bytes: Their size.
        vendor: Closed list.
        model_class: Closed list.
        field_strength_t: Tesla.
        kvp: Peak kilovoltage.
        mas: Exposure in mAs.
        ctdi: CTDIvol in mGy.
        kernel_class: soft, lung, bone, head or unknown.
        recon_method: fbp, iterative, deep or unknown.
        dual_energy: Dual-energy acquisition.
        kev: Energy of a monoenergetic image.
        contrast_state: none, given or unknown.
        contrast_phase: native, arterial, portal, delayed or unknown.
        tr: Repetition time, ms.
        te: Echo time, ms.
        ti: Inversion time, ms.
        flip: Flip angle, degrees.
        mr_type: se, ir, gr, ep, mixed or unknown (ScanningSequence).
        weighting: t1, t2, t2star, pd, flair, dwi, adc, swi, perfusion, bold, angio or unknown.
        fat_sat: Fat suppression.
        component: magnitude, phase, real, imaginary or unknown.
        b_values: s/mm2.
        suv_ready: Whether SUV can be computed.
        n_regions: Ultrasound regions.
        region_types: Of tissue_2d, colour_doppler, spectral, m_mode, ecg, other.
        body_region: Of the closed list in `archive.attributes`.
        body_region_source: tag, text or unknown.
        laterality: left, right, both or unknown.
        view: ap, pa, lateral, oblique, other or unknown.
        implant: Implant stated.
        face_possible: Head CT or MR that may show a face.
        sex: F, M, O or unknown.
        age_band: 0-1, 2-11, 12-17, then ten years each to 80-89, 90+, or unknown.
        adult: 18 or older.
        year: Year of the study.
        site: What the user named the source.
        scanner_id: 32 hex digits over manufacturer, model and serial number.
        source_deid: Whether the source says that identity was removed.
        study_rank: Order of the study within its patient, from 0.
        best_in_study: Chosen among the usable series of its study, modality and region.
        best_in_patient: The same within the patient.
        pair_group: 32 hex digits shared by rows that must stay in one split and are one image in two forms (twins, conflicts).
        split: train, val, test or unknown.
        quality_flags: See `archive.reasons.FLAGS`.
        privacy_flags: See `archive.reasons.PRIVACY_FLAGS`.
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
    subject_kind: str = "unknown"
    intent: str = "unknown"
    shape: tuple[int, ...] = ()
    n_slices: int | None = None
    n_volumes: int = 1
    volume_index: int = 0
    volume_axis: str = "none"
    spacing_mm: tuple[float, ...] | None = None
    spacing_source: str = "unknown"
    slice_thickness_mm: float | None = None
    slice_step_mm: float | None = None
    step_cv: float | None = None
    max_gap_mm: float | None = None
    extent_mm: tuple[float, ...] | None = None
    tilt_deg: float | None = None
    slice_axis: int | None = None
    plane: str = "unknown"
    orientation: str = "unknown"
    patient_position: str = "unknown"
    frame_time_ms: float | None = None
    fps_source: str = "unknown"
    heart_rate: float | None = None
    stage: str = "unknown"
    mpp: float | None = None
    dtype: str = "unknown"
    bits: int | None = None
    photometric: str = "unknown"
    transfer_syntax: str = "none"
    lossy: bool | None = None
    lossy_ratio: float | None = None
    padding_value: int | None = None
    units: str = "unknown"
    n_files: int = 1
    bytes: int = 0
    vendor: str = "unknown"
    model_class: str = "unknown"
    field_strength_t: float | None = None
    kvp: float | None = None
    mas: float | None = None
    ctdi: float | None = None
    kernel_class: str = "unknown"
    recon_method: str = "unknown"
    dual_energy: bool | None = None
    kev: float | None = None
    contrast_state: str = "unknown"
    contrast_phase: str = "unknown"
    tr: float | None = None
    te: float | None = None
    ti: float | None = None
    flip: float | None = None
    mr_type: str = "unknown"
    weighting: str = "unknown"
    fat_sat: bool | None = None
    component: str = "unknown"
    b_values: tuple[float, ...] = ()
    suv_ready: bool | None = None
    n_regions: int | None = None
    region_types: tuple[str, ...] = ()
    body_region: tuple[str, ...] = ()
    body_region_source: str = "unknown"
    laterality: str = "unknown"
    view: str = "unknown"
    implant: bool | None = None
    face_possible: bool | None = None
    sex: str = "unknown"
    age_band: str = "unknown"
    adult: bool | None = None
    year: int | None = None
    site: str = "unknown"
    scanner_id: str | None = None
    source_deid: bool | None = None
    study_rank: int | None = None
    best_in_study: bool | None = None
    best_in_patient: bool | None = None
    pair_group: str | None = None
    split: str = "unknown"
    quality_flags: tuple[str, ...] = ()
    privacy_flags: tuple[str, ...] = ()
    status: str = "ok"
    reason: str | None = None


GROUP_COLUMNS = ("sex", "age_band", "vendor", "site", "field_strength_t", "contrast_state", "kernel_class", "body_region", "view")
"""Columns that results are told apart by; all but `site` are closed vocabularies."""


def group_facts(row: SeriesRow) -> dict[str, str]:
    """Return the columns of a row by which results are told apart; `unknown` is a value."""
    found = {}
    for name in GROUP_COLUMNS:
        value = getattr(row, name)
        found[name] = (
            " ".join(value) if isinstance(value, tuple) else "" if value is None else f"{value:g}" if name.endswith("_t") else value
        )
    return {name: value or "unknown" for name, value in found.items()}


_TYPES = {
    "str": "VARCHAR",
    "int": "BIGINT",
    "float": "DOUBLE",
    "bool": "BOOLEAN",
    "tuple[str, ...]": "VARCHAR[]",
    "tuple[int, ...]": "INTEGER[]",
    "tuple[float, ...]": "DOUBLE[]",
}
SERIES_COLUMNS: dict[str, str] = {field.name: _TYPES[str(field.type).removesuffix(" | None")] for field in fields(SeriesRow)}
"""Column name -> DuckDB type of `series.parquet`."""
TUPLES = tuple(name for name, kind in SERIES_COLUMNS.items() if kind.endswith("[]"))


@dataclass(frozen=True)
class Selection:
    """What a condition selects, and what it could not decide.

    Args:
        rows: Rows in the order of their series ids.
        n_undecided: Rows left out only because a column says nothing: for some value of it they would have been selected.
        unknown: Column -> how many of these rows say nothing in it. One row may count in several columns.
        n_rejected: Rows that meet the condition but cannot be read as an image; left out unless asked for.
    """

    rows: list[SeriesRow]
    n_undecided: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    n_rejected: int = 0


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
        self._owners: dict[str, str] = {}
        self._parts: dict[str, dict[str, Any] | None] | None = None

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
        return self.choose(where, rejected=rejected).rows

    def choose(self, where: str | None = None, *, rejected: bool = False) -> Selection:
        """Return what a condition selects, and how many rows it lost to values that are unknown.

        A row is lost to unknown when the condition is neither true nor false once every `unknown`, null and empty list
        counts as null: `modality = 'CT'` loses rows of unknown modality, `modality = 'CT' and kvp > 100` does not lose an MR
        row without kvp.

        Args:
            where: See `select`. Subqueries may read the table `series` and nothing else.
            rejected: Include rows of status `rejected`.

        Raises:
            RequestError: The condition is not valid SQL on these columns.
        """
        import duckdb

        names = list(SERIES_COLUMNS)
        text = where if where and where.strip() else "true"
        connection = connect()
        try:
            connection.execute(f"CREATE TABLE series AS SELECT * FROM read_parquet({quote(self.path / 'series.parquet')})")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            named = check_condition(connection, text, names)
            usable = "true" if rejected else "status <> 'rejected'"
            query = f"SELECT {', '.join(names)} FROM series WHERE {inside(text)} AND {usable} ORDER BY series_id"
            found = connection.execute(query).fetchall()
            counted = f"SELECT count(*) FROM series WHERE {inside(text)} AND status = 'rejected'"
            (n_rejected,) = connection.execute(counted).fetchone()
            # The condition may name the table, so its stand-in has the same name. Decided rows drop out of both tests.
            known = f"(SELECT {unknown_as_null(SERIES_COLUMNS.items())} FROM series WHERE {usable}) AS series"
            missed = f"SELECT series_id FROM series WHERE {inside(text)} IS NOT TRUE"
            named = [name for name in named if name not in NEVER_UNKNOWN]
            counts = ", ".join(["count(*)", *(f"count(*) FILTER ({name} IS NULL)" for name in named)])
            blank = " OR ".join(["false", *(f"{name} IS NULL" for name in named)])
            lost = f"SELECT {counts} FROM {known} WHERE {inside(text)} IS NULL AND ({blank}) AND series_id IN ({missed})"
            n_undecided, *unknown = connection.execute(lost).fetchone()
        except duckdb.Error as err:
            raise refuse(text, str(err).splitlines()[0], names) from err
        finally:
            connection.close()
        per_column = {name: n for name, n in zip(named, unknown) if n}
        return Selection([_row(dict(zip(names, values))) for values in found], n_undecided, per_column, n_rejected)

    def files(self, series_id: str) -> list[Path]:
        """Return the source files of a series, DICOM slices in slice order.

        Raises:
            RequestError: The index has no such series.
            ImageError: A container has changed, or the member is damaged.
            StoreError: The disk is full: members of containers are unpacked into the private folder.
        """
        return [self._real(path) for path, _ in self._entries(series_id)]

    def first_paths(self) -> dict[str, Path]:
        """Return series_id -> path of its first file, of all series that have one, rejected ones too.

        Members of containers are not unpacked, so that there may be no such file.
        """
        files = self._all_entries()
        owner_of = {series: self._owners.get(series, series) for series in self._all_tags()}
        return {series: files[owner][0][0] for series, owner in owner_of.items() if files.get(owner)}

    def _real(self, path: Path) -> Path:
        """Return a path on disk; a member of a container is unpacked into the private folder first."""
        if SEPARATOR not in str(path) or path.exists():
            return path
        try:
            return unpack(str(path), self.path / "private" / "unpacked", lambda: self._beside(path))
        except StoreError:
            raise
        except (OSError, KeyError) as err:
            raise ImageError("vanished", "a container of this series has changed; run `medssl index` again") from err

    def _beside(self, path: Path) -> list[str]:
        """Return the paths of all used members of the container that holds a file."""
        container = str(path).partition(SEPARATOR)[0] + SEPARATOR
        assert self._files is not None
        return [str(other) for entries in self._files.values() for other, _ in entries if str(other).startswith(container)]

    def digests(self, series_id: str) -> list[str]:
        """Return the digests of the files of a series, in the order of `files`."""
        return [digest for _, digest in self._entries(series_id)]

    def source_tag(self, series_id: str) -> str:
        """Return a keyed hash over digests and times of the files of a series: another value means that they may have changed."""
        tags = self._all_tags()
        if series_id not in tags:
            raise RequestError(f"the index {self.path} has no series {series_id}")
        return tags[series_id]

    def _all_tags(self) -> dict[str, str]:
        if self._tags is None:
            rows = read_table([self.path / "private" / "series.parquet"], ("series_id", "source_tag", "part", "files_of"))
            self._owners = {row["series_id"]: row["files_of"] for row in rows if row["files_of"]}
            self._tags = {row["series_id"]: row["source_tag"] for row in rows}
            self._parts = {row["series_id"]: None if row["part"] is None else json.loads(row["part"]) for row in rows}
        return self._tags

    def part(self, series_id: str) -> dict[str, Any] | None:
        """Return what of its files a series is (see `domains.base.Domain.read`), or None for all of it."""
        self.source_tag(series_id)
        assert self._parts is not None
        return self._parts[series_id]

    def _entries(self, series_id: str) -> list[tuple[Path, str]]:
        files = self._all_entries()
        self.source_tag(series_id)
        return files[self._owners.get(series_id, series_id)]

    def _all_entries(self) -> dict[str, list[tuple[Path, str]]]:
        if self._files is None:
            table: dict[str, list[tuple[int, Path, str]]] = defaultdict(list)
            for row in read_table([self.path / "private" / "files.parquet"], ("series_id", "place", "path", "digest")):
                if row["series_id"] is not None and row["place"] is not None:
                    table[row["series_id"]].append((row["place"], Path(to_path(row["path"])), row["digest"]))
            self._files = {key: [(path, digest) for _, path, digest in sorted(rows)] for key, rows in table.items()}
        return self._files


def _row(values: dict[str, Any]) -> SeriesRow:
    for name in TUPLES:
        if values[name] is not None:
            values[name] = tuple(values[name])
    row = object.__new__(SeriesRow)
    row.__dict__.update(values)  # a frozen dataclass sets its ninety fields one by one, which takes longer than reading them
    return row
