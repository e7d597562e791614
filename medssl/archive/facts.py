"""Counts of an archive, as plain JSON values: for the report page (exact) and for the release (patients per cell)."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medssl.archive.reasons import FILE_REASONS, FLAGS, PRIVACY_FLAGS, SERIES_REASONS
from medssl.archive.table import SERIES_COLUMNS, Archive, SeriesRow

SPACING_EDGES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
"""Upper edges in mm of the bins of in-plane spacing: X-ray and slides below 0.2, CT about 0.7, MR about 1."""
STEP_EDGES = (0.6, 0.9, 1.1, 1.6, 2.1, 3.1, 4.1, 5.1, 7.1, 10.0)
"""Upper edges in mm of slice steps: between the customary 0.5, 0.625, 1, 1.25, 1.5, 2, 2.5, 3, 5 and 7."""
SIZE_EDGES = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
"""Upper edges of the longest in-plane side, in pixels."""
SLICE_EDGES = (1, 10, 25, 50, 100, 200, 400, 800)
"""Upper edges of the number of slices or frames."""


def in_plane_mm(row: SeriesRow) -> float | None:
    """Return the coarser of the two spacings within a slice, in mm, or None when unknown."""
    if not row.spacing_mm:
        return None
    edges = [value for axis, value in enumerate(row.spacing_mm) if len(row.spacing_mm) < 3 or axis != row.slice_axis]
    return max(edges) if len(edges) == 2 else None


def slice_step_mm(row: SeriesRow) -> float | None:
    """Return the distance between slices in mm, or None for images and where unknown."""
    if row.spacing_mm and len(row.spacing_mm) == 3 and row.slice_axis is not None:
        return row.spacing_mm[row.slice_axis]
    return row.slice_step_mm


def in_plane_pixels(row: SeriesRow) -> int | None:
    """Return the longer side of a slice, frame or image in pixels."""
    if len(row.shape) >= 3 and row.kind in ("volume", "volume_4d"):
        sides = [n for axis, n in enumerate(row.shape[:3]) if axis != row.slice_axis]
        return max(sides)
    return max(row.shape[-2:]) if len(row.shape) >= 2 else None


def bin_of(value: float | None, edges: Sequence[float]) -> str:
    """Return the name of the bin that holds a value: `up to 0.1`, `0.1 to 0.2`, ..., `over 5`, or `unknown`."""
    if value is None:
        return "unknown"
    low = None
    for edge in edges:
        if value <= edge:
            return f"up to {edge:g}" if low is None else f"{low:g} to {edge:g}"
        low = edge
    return f"over {edges[-1]:g}"


def bin_names(edges: Sequence[float]) -> list[str]:
    """Return the names of all bins in order, `unknown` last."""
    middles = [edges[0], *edges[1:]]
    return [*(bin_of(edge, edges) for edge in middles), f"over {edges[-1]:g}", "unknown"]


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
    "slices": lambda row: bin_of(row.n_slices if row.n_slices is not None else 1, SLICE_EDGES),
}
"""Table -> the one value of a row in it."""
BINS: dict[str, Sequence[float]] = {
    "in_plane_spacing_mm": SPACING_EDGES,
    "slice_step_mm": STEP_EDGES,
    "in_plane_pixels": SIZE_EDGES,
    "slices": SLICE_EDGES,
}


def collect_facts(archive: Archive) -> dict[str, Any]:
    """Return everything the report page shows: exact counts, so for the owner's eyes.

    Returns:
        JSON values: `files` (seen, used, by reason with meaning), `series`, `tables` (name -> value -> series and patients),
        `by_split`, `flags`, `privacy_flags`, `unknown` (column -> share of usable rows), `spacing` (median per modality).
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


def _cells(rows: Sequence[SeriesRow], value: Callable[[SeriesRow], str], edges: Sequence[float] | None) -> list[dict[str, Any]]:
    series = Counter(value(row) for row in rows)
    patients = Counter(name for name, _ in {(value(row), row.patient_id) for row in rows})
    names = bin_names(edges) if edges else sorted(series, key=lambda name: (name == "unknown", -series[name], name))
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
            patients = len({row.patient_id for row in inside})
            found.append(
                {"split": split, "series": len(inside), "patients": patients, "modalities": dict(sorted(modalities.items()))}
            )
    return found


def _flags(rows: Sequence[SeriesRow], column: str, meanings: Mapping[str, str]) -> list[dict[str, Any]]:
    counts = Counter(flag for row in rows for flag in getattr(row, column))
    return [{"code": name, "series": n, "meaning": meanings.get(name, "")} for name, n in counts.most_common()]


def _unknown(rows: Sequence[SeriesRow]) -> dict[str, float]:
    """Return column -> share of rows that say nothing in it, for columns a selection is likely to name."""
    names = (
        "modality", "role", "spacing_mm", "slice_thickness_mm", "vendor", "body_region", "laterality", "view", "sex", "age_band",
        "year", "kvp", "kernel_class", "contrast_state", "field_strength_t", "weighting", "frame_time_ms", "mpp", "split",
    )  # fmt: skip
    assert set(names) <= set(SERIES_COLUMNS)
    if not rows:
        return {}
    return {name: sum(getattr(row, name) in (None, "unknown", ()) for row in rows) / len(rows) for name in names}


def _geometry(rows: Sequence[SeriesRow]) -> list[dict[str, Any]]:
    found = []
    for modality, _ in Counter(row.modality for row in rows).most_common():
        inside = [row for row in rows if row.modality == modality]
        found.append(
            {
                "modality": modality,
                "series": len(inside),
                "in_plane_mm": _median(in_plane_mm(row) for row in inside),
                "step_mm": _median(slice_step_mm(row) for row in inside),
                "pixels": _median(in_plane_pixels(row) for row in inside),
                "slices": _median(row.n_slices for row in inside),
                "bytes": sum(row.bytes for row in inside),
            }
        )
    return found


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None
