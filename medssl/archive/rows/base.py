"""What building series rows needs, whatever the format: files with their headers, ids, geometry in canonical axes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medssl.archive.ids import IdKey, source_fold, source_tag
from medssl.archive.table import SeriesRow

DOMAINS = {"CT": "ct", "MR": "mri", "CR": "xray", "DX": "xray", "RG": "xray", "US": "ultrasound", "SM": "wsi", "GM": "microscopy"}
"""Modality -> domain; all others are `other`."""
UNITLESS = frozenset({"mri", "xray", "ultrasound", "wsi", "microscopy"})
"""Domains whose values have no physical unit."""
DTYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64", "bool", "complex64", "complex128",
)  # fmt: skip
PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}


def domain_of(modality: str) -> str:
    """Return the domain of a modality; `unknown` for unknown."""
    return "unknown" if modality == "unknown" else DOMAINS.get(modality, "other")


def stored_type(name: str | None) -> str:
    """Return the column `dtype` for a numpy type in any spelling (`>i2`), `rgb` for structured ones, `other` or `unknown`."""
    if name is None or name in ("unknown", "rgb"):
        return name or "unknown"
    try:
        found = np.dtype(name).name
    except TypeError:
        return "other"
    return found if found in DTYPES else "other"


@dataclass
class Placed:
    """Where one scanned file ended up.

    Args:
        path: Source path, as text (private).
        digest: Digest of it (private).
        sop_uid: Instance UID (private).
        series_id: Its series, or None.
        place: Its position in the series' file order, or None for files that belong to no series.
        reason: Why it is not used, or None.
    """

    path: str
    digest: str
    sop_uid: str | None = None
    series_id: str | None = None
    place: int | None = None
    reason: str | None = None


@dataclass
class Group:
    """What became of the files of one group.

    Args:
        series: Rows of `series.parquet`.
        private: One row of `table.PRIVATE_SERIES_COLUMNS` for each of them.
        files: One `Placed` for each file.
    """

    series: list[SeriesRow] = field(default_factory=list)
    private: list[dict[str, Any]] = field(default_factory=list)
    files: list[Placed] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What the user said about a file: site, split, patient where a table names one, and the modality of files that do not say."""

    site: str = "unknown"
    split: str = "unknown"
    patient: str | None = None
    modality: str = "unknown"


@dataclass(frozen=True)
class Scanned:
    """One scanned file with its whole header.

    Args:
        path: Source path, as text.
        size: Bytes.
        kind: `dicom`, `volume`, `sidecar` or `other`.
        reason: Why it cannot be used, or None.
        digest: Its digest.
        header: Header values.
        conflict: Another file with other content has the same instance UID.
        choice: What the user said about it.
        mtime_ns: When it was changed.
        known: `path_id` and `told` of `table.PRIVATE_FILE_COLUMNS`.
    """

    path: str
    size: int
    kind: str
    reason: str | None
    digest: str
    header: Mapping[str, Any]
    conflict: bool = False
    choice: Choice = field(default_factory=Choice)
    mtime_ns: int = 0
    known: tuple[int, int | None] = (0, None)


def canonical(affine: np.ndarray, shape: Sequence[int], slice_axis: int | None) -> dict[str, Any]:
    """Return shape, spacing, extent, slice axis, plane and stored axis codes of a volume with this affine."""
    from nibabel import orientations

    change = orientations.io_orientation(affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    where = [int(axis) for axis in np.argsort(change[:, 0])]
    canonical_shape = tuple(int(shape[axis]) for axis in where)
    canonical_spacing = tuple(round(float(spacing[axis]), 6) for axis in where)
    axis = None if slice_axis is None else int(change[slice_axis, 0])
    return {
        "shape": canonical_shape,
        "spacing_mm": canonical_spacing,
        "extent_mm": tuple(round(n * s, 3) for n, s in zip(canonical_shape, canonical_spacing)),
        "slice_axis": axis,
        "plane": "unknown" if axis is None else PLANES[axis],
        "orientation": "".join(str(code) for code in orientations.ornt2axcodes(change)),
    }


def patient_of(key: IdKey, choice: Choice, *, placeholder: bool, issuer: str, value: str, fallback: str) -> tuple[str, bool]:
    """Return the patient id, and whether it is only a stand-in."""
    if choice.patient is not None:
        return key.make("patient", choice.site, choice.patient), False
    if placeholder:
        return key.make("patient", "unknown", fallback), True
    return key.make("patient", issuer, value), False


def common_choice(choices: Iterable[Choice]) -> Choice:
    """Return the choice all files of a series share; what they disagree on is unknown."""
    found = set(choices)
    if len(found) == 1:
        return found.pop()
    sites, splits, patients = ({getattr(choice, name) for choice in found} for name in ("site", "split", "patient"))
    return Choice(
        sites.pop() if len(sites) == 1 else "unknown",
        splits.pop() if len(splits) == 1 else "unknown",
        patients.pop() if len(patients) == 1 else None,
    )


def unique(series_id: str, key: IdKey, taken: set[str]) -> str:
    """Return the id, or another one where the group has it already."""
    n, wanted = 1, series_id
    while series_id in taken:
        n += 1
        series_id = key.make("series", "again", f"{wanted} {n}")
    taken.add(series_id)
    return series_id


def place(
    out: Group,
    row: SeriesRow,
    members: Sequence[Scanned],
    placed: Mapping[str, Placed],
    key: IdKey,
    private: Mapping[str, Any] | None = None,
    part: Mapping[str, Any] | None = None,
) -> None:
    """Add a row, its private half and the places of its files.

    A file that holds several series belongs to the first of them; the others name that one (`files_of`).
    """
    out.series.append(row)
    tag = source_tag(key, source_fold((member.digest, member.mtime_ns) for member in members))
    owner = placed[members[0].path].series_id
    text = None if part is None else json.dumps(part)
    out.private.append({"series_id": row.series_id, "source_tag": tag, "part": text, "files_of": owner, **(private or {})})
    for number, member in enumerate(members):
        file = placed[member.path]
        if file.series_id is None:
            file.series_id, file.place, file.reason = row.series_id, number, row.reason
        elif row.reason is None:
            file.reason = None  # one of the series in it can be used


def as_record(row: SeriesRow) -> dict[str, Any]:
    """Return a row as JSON-able values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(row).items()}
