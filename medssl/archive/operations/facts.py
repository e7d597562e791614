"""Counts of an archive, as plain JSON values: for the report page (exact) and for the release (patients per cell)."""

from __future__ import annotations

import functools
import statistics
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from medssl.archive.reasons import FILE_REASONS, FLAGS, IMAGE_REASONS, PRIVACY_FLAGS, SERIES_REASONS
from medssl.archive.table import SERIES_COLUMNS, Archive, SeriesRow

SPACING_EDGES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Upper edges in mm of the bins of in-plane spacing: X-ray and slides below 0.2, CT about 0.7, MR about 1."""
STEP_EDGES = (0.6, 0.9, 1.1, 1.6, 2.1, 3.1, 4.1, 5.1, 7.1, 10.0)
"""Upper edges in mm of slice steps: between the customary 0.5, 0.625, 1, 1.25, 1.5, 2, 2.5, 3, 5 and 7."""
SIZE_EDGES = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
"""Upper edges of the longest in-plane side, in pixels."""
SLICE_EDGES = (1, 10, 25, 50, 100, 200, 400, 800)
"""Upper edges of the number of slices or frames."""


def slice_axis(row: SeriesRow) -> int | None:
    """Return the axis along which slices lie; where a volume does not say, that of the largest spacing, the last of equal ones."""
    if row.slice_axis is not None or not row.spacing_mm or len(row.spacing_mm) != 3:
        return row.slice_axis
    x, y, z = row.spacing_mm
    return 2 if z >= x and z >= y else (1 if y >= x else 0)


def in_plane_mm(row: SeriesRow) -> float | None:
    """Return the coarser of the two spacings within a slice, in mm, or None when unknown."""
    if not row.spacing_mm:
        return None
    axis = slice_axis(row)
    edges = [value for k, value in enumerate(row.spacing_mm) if len(row.spacing_mm) < 3 or k != axis]
    return max(edges) if len(edges) == 2 else None


def slice_step_mm(row: SeriesRow) -> float | None:
    """Return the distance between slices in mm, or None for images and where unknown."""
    axis = slice_axis(row)
    if row.spacing_mm and len(row.spacing_mm) == 3 and axis is not None:
        return row.spacing_mm[axis]
    return row.slice_step_mm


def in_plane_pixels(row: SeriesRow) -> int | None:
    """Return the longer side of a slice, frame or image in pixels."""
    if len(row.shape) >= 3 and row.kind in ("volume", "volume_4d"):
        axis = slice_axis(row)
        return max(n for k, n in enumerate(row.shape[:3]) if k != axis)
    return max(row.shape[-2:]) if len(row.shape) >= 2 else None


def slices(row: SeriesRow) -> int | None:
    """Return the number of slices or frames, 1 for an image or a slide, or None when unknown."""
    if row.n_slices is not None:
        return row.n_slices
    if row.kind == "cine":
        return row.shape[0] if len(row.shape) == 3 else None
    if row.kind in ("volume", "volume_4d"):
        axis = slice_axis(row)
        return row.shape[axis] if axis is not None and len(row.shape) >= 3 else None
    return 1


@functools.cache
def bin_names(edges: tuple[float, ...]) -> tuple[str, ...]:
    """Return the names of all bins in order: `up to 0.1`, `0.1 to 0.2`, ..., `over 5`, and `unknown` last.

    Where all edges are whole numbers, so are the values, and a bin begins after the one before: `1`, `2 to 10`.
    """
    whole = all(isinstance(edge, int) for edge in edges)
    first = "1" if whole and edges[0] == 1 else f"up to {edges[0]:g}"
    inner = [f"{low + 1 if whole else low:g} to {high:g}" for low, high in pairwise(edges)]
    return (first, *inner, f"over {edges[-1]:g}", "unknown")


def bin_of(value: float | None, edges: tuple[float, ...]) -> str:
    """Return the name of the bin that holds a value; an edge belongs to the bin below it."""
    return bin_names(edges)[-1 if value is None else bisect_left(edges, value)]


def _one(name: str) -> Callable[[SeriesRow], str]:
    return lambda row: "unknown" if getattr(row, name) is None else str(getattr(row, name))


def _regions(row: SeriesRow) -> str:
    return "unknown" if not row.body_region else (row.body_region[0] if len(row.body_region) == 1 else "several")


TABLES: dict[str, Callable[[SeriesRow], str]] = {
    "modality": _one("modality"),
    "role": _one("role"),
    "vendor": _one("vendor"),
    "body_region": _regions,
    "year": _one("year"),
    "sex": _one("sex"),
    "age_band": _one("age_band"),
    "site": _one("site"),
    "in_plane_spacing_mm": lambda row: bin_of(in_plane_mm(row), SPACING_EDGES),
    "slice_step_mm": lambda row: bin_of(slice_step_mm(row), STEP_EDGES),
    "in_plane_pixels": lambda row: bin_of(in_plane_pixels(row), SIZE_EDGES),
    "slices": lambda row: bin_of(slices(row), SLICE_EDGES),
}
"""Table -> the one value of a row in it."""
BINS: dict[str, tuple[float, ...]] = {
    "in_plane_spacing_mm": SPACING_EDGES,
    "slice_step_mm": STEP_EDGES,
    "in_plane_pixels": SIZE_EDGES,
    "slices": SLICE_EDGES,
}


ASKED: dict[str, tuple[str, Callable[[SeriesRow], bool]]] = {
    **dict.fromkeys(
        ("modality", "role", "vendor", "body_region", "sex", "age_band", "year", "split", "spacing_mm"), ("", lambda row: True)
    ),
    "slice_thickness_mm": ("volumes", lambda row: row.kind in ("volume", "volume_4d")),
    "kvp": ("CT and X-ray", lambda row: row.domain in ("ct", "xray")),
    "kernel_class": ("CT", lambda row: row.domain == "ct"),
    "contrast_state": ("CT and MR", lambda row: row.domain in ("ct", "mri")),
    "field_strength_t": ("MR", lambda row: row.domain == "mri"),
    "weighting": ("MR", lambda row: row.domain == "mri"),
    "laterality": ("X-ray", lambda row: row.domain == "xray"),
    "view": ("X-ray", lambda row: row.domain == "xray"),
    "frame_time_ms": ("clips", lambda row: row.kind == "cine"),
    "mpp": ("slides", lambda row: row.kind == "slide"),
}
"""Columns that a selection is likely to name -> the series that could answer, in words and as a condition."""


def collect_facts(archive: Archive) -> dict[str, Any]:
    """Return everything the report page shows: exact counts, so for the owner's eyes.

    Returns:
        JSON values: `files` (seen, used, by reason with meaning), `series`, `tables` (name -> value -> series and patients; people nobody
        knows are not counted), `by_split`, `flags`, `privacy_flags`, `unknown` (column, of which series, how many say nothing),
        `geometry` (median, 10th and 90th percentile per modality), `pixels` (what `index --pixels` found: `series`, `read`, `waiting`,
        and with meanings `failed`, `quality` and `privacy`; `near_duplicates`), None when nobody has looked.
    """
    rows = archive.select(rejected=True)
    usable = [row for row in rows if row.status != "rejected"]
    meanings = {**SERIES_REASONS, **FILE_REASONS}
    return {
        "files": {
            "seen": archive.summary.get("n_files_seen"),
            "used": archive.summary.get("n_files_used"),
            "reasons": [
                {"code": name, "files": count, "meaning": meanings.get(name, "")}
                for name, count in sorted(dict(archive.summary.get("reasons") or {}).items(), key=lambda item: (-item[1], item[0]))
            ],
        },
        "series": {
            "all": len(rows),
            "usable": len(usable),
            "no_domain": sum(row.domain in ("unknown", "other") for row in usable),
            "patients": len({row.patient_id for row in usable}),
            "patients_unknown": len({row.patient_id for row in usable if "patient_unknown" in row.quality_flags}),
            "patients_torn": _torn(usable),
            "studies": len({row.study_id for row in usable}),
            "bytes": sum(row.bytes for row in usable),
            "rejected": _reasons(rows, meanings),
        },
        "tables": {name: _cells(usable, value, BINS.get(name)) for name, value in TABLES.items()},
        "by_split": _by_split(usable),
        "flags": _flags(usable, "quality_flags", FLAGS),
        "privacy_flags": _flags(rows, "privacy_flags", PRIVACY_FLAGS),
        "unknown": _unknown(usable),
        "geometry": _geometry(usable),
        "pixels": _pixels(archive.summary.get("pixels")),
    }


def _pixels(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    flags = dict(found.get("flags") or {})

    def explained(counts: Mapping[str, int], meanings: Mapping[str, str]) -> list[dict[str, Any]]:
        return [
            {"code": name, "series": n, "meaning": meanings.get(name, "")}
            for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    return {
        **{name: int(found.get(name) or 0) for name in ("series", "read", "waiting")},
        "failed": explained(dict(found.get("failed") or {}), {**SERIES_REASONS, **FILE_REASONS, **IMAGE_REASONS}),
        "quality": explained({name: n for name, n in flags.items() if name not in PRIVACY_FLAGS}, FLAGS),
        "privacy": explained({name: n for name, n in flags.items() if name in PRIVACY_FLAGS}, PRIVACY_FLAGS),
        "near_duplicates": dict(found.get("near_duplicates") or {}),
    }


def _torn(rows: Iterable[SeriesRow]) -> int:
    splits: dict[str, set[str]] = {}
    for row in rows:
        if row.split != "unknown":
            splits.setdefault(row.patient_id, set()).add(row.split)
    return sum(len(found) > 1 for found in splits.values())


def _reasons(rows: Iterable[SeriesRow], meanings: Mapping[str, str]) -> list[dict[str, Any]]:
    counts = Counter(row.reason for row in rows if row.reason is not None)
    return [{"code": name, "series": n, "meaning": meanings.get(name, "")} for name, n in counts.most_common()]


def _cells(rows: Sequence[SeriesRow], value: Callable[[SeriesRow], str], edges: tuple[float, ...] | None) -> list[dict[str, Any]]:
    values = [value(row) for row in rows]
    series = Counter(values)
    known = {(name, row.patient_id) for name, row in zip(values, rows) if "patient_unknown" not in row.quality_flags}
    patients = Counter(name for name, _ in known)
    names: Sequence[str] = bin_names(edges) if edges else sorted(series, key=lambda name: (name == "unknown", -series[name], name))
    if edges:  # an empty bin inside is shown, those at the ends are not
        there = [k for k, name in enumerate(names[:-1]) if series[name]]
        inner = names[there[0] : there[-1] + 1] if there else []
        names = [*inner, *(["unknown"] if series["unknown"] else [])]
    return [{"value": name, "series": series[name], "patients": patients[name]} for name in names]


def _by_split(rows: Sequence[SeriesRow]) -> list[dict[str, Any]]:
    found = []
    for split in ("train", "val", "test", "unknown"):
        inside = [row for row in rows if row.split == split]
        if inside:
            modalities = Counter(row.modality for row in inside)
            patients = len({row.patient_id for row in inside if "patient_unknown" not in row.quality_flags})
            found.append(
                {"split": split, "series": len(inside), "patients": patients, "modalities": dict(sorted(modalities.items()))}
            )
    return found


def _flags(rows: Sequence[SeriesRow], column: str, meanings: Mapping[str, str]) -> list[dict[str, Any]]:
    counts = Counter(flag for row in rows for flag in getattr(row, column))
    return [{"code": name, "series": n, "meaning": meanings.get(name, "")} for name, n in counts.most_common()]


def _unknown(rows: Sequence[SeriesRow]) -> list[dict[str, Any]]:
    """Return, for columns a selection is likely to name, how many of the rows that could say something say nothing."""
    assert set(ASKED) <= set(SERIES_COLUMNS)
    found = []
    for name, (which, applies) in ASKED.items():
        asked = [row for row in rows if applies(row)]
        if asked:
            silent = sum(getattr(row, name) in (None, "unknown", ()) for row in asked)
            found.append({"column": name, "which": which, "series": len(asked), "unknown": silent})
    return sorted(found, key=lambda one: (-one["unknown"] / one["series"], -one["series"], one["column"]))


def _geometry(rows: Sequence[SeriesRow]) -> list[dict[str, Any]]:
    found = []
    groups: dict[str, list[SeriesRow]] = defaultdict(list)
    for row in rows:
        groups[row.modality].append(row)
    for modality, inside in sorted(groups.items(), key=lambda item: (item[0] == "unknown", -len(item[1]), item[0])):
        found.append(
            {
                "modality": modality,
                "series": len(inside),
                "in_plane_mm": _spread(in_plane_mm(row) for row in inside),
                "step_mm": _spread(slice_step_mm(row) for row in inside),
                "pixels": _spread(in_plane_pixels(row) for row in inside),
                "slices": _spread(slices(row) for row in inside),
                "bytes": sum(row.bytes for row in inside),
            }
        )
    return found


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Return median, 10th and 90th percentile (values that occur) of what is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    last = len(known) - 1
    return {
        "median": float(statistics.median(known)),
        "low": float(known[round(0.1 * last)]),
        "high": float(known[round(0.9 * last)]),
    }
