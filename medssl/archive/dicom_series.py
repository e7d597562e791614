"""Build volumes from DICOM slices: group, order along the slice normal, check the geometry.

Series are built, not trusted: slices are ordered by the projection of their position on the normal, never by file
name or number, and a tag splits a series only if that removes collisions (several slices at one position).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.archive.file_headers import FLIP

COLLISION_MM = 0.01
"""Slices closer than this along the normal are at one position; positions are written with two to four decimals."""
STEP_TOLERANCE = 0.02
"""Relative deviation of a slice step from the median that rounding of positions explains."""
STEP_TOLERANCE_MM = 0.02
TILT_TOLERANCE_DEG = 0.5
"""Half a degree moves the last of 100 slices of 1 mm by 0.9 mm."""

SPLIT_TAGS = (
    "echo_number", "temporal_position", "b_value", "image_type", "trigger_time", "echo_time", "inversion_time",
    "acquisition_number", "content_time", "acquisition_time",
)  # fmt: skip
"""Tags that may tell volumes of one series apart, tried in this order."""

MAPS = frozenset(
    {
        "ADC", "FA", "TRACEW", "TRACE", "CBF", "CBV", "MTT", "TTP", "TMAX", "PERFUSION", "T1_MAP", "T2_MAP",
        "T2STAR_MAP", "SUBTRACTION", "SUBTRACT", "PHASE_MAP", "FIELD_MAP", "EFV", "IODINE", "SEGMENTATION", "DOSE",
    }
)  # fmt: skip
"""ImageType values that name a map computed from other images."""


@dataclass(frozen=True)
class SliceGeometry:
    """Where the slices of one volume lie.

    Args:
        order: Index of each slice, from low to high along the normal.
        affine: (4, 4) index (column, row, slice) to RAS+ mm, slices in `order`; None when there is no usable geometry.
        spacing_mm: Pixel spacing along a row, down a column, and the slice step.
        step_cv: Coefficient of variation of the slice steps.
        max_gap_mm: Largest slice step in mm.
        tilt_deg: Angle between the slice normal and the line through the slice positions.
        faults: Reason codes; the volume is usable when there is none.
    """

    order: np.ndarray
    affine: np.ndarray | None
    spacing_mm: tuple[float, float, float] | None
    step_cv: float = 0.0
    max_gap_mm: float = 0.0
    tilt_deg: float = 0.0
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class SliceGroup:
    """One volume found in a series.

    Args:
        indices: Positions in the list handed to `split_series`, in slice order.
        geometry: Its geometry; `geometry.order` refers to the list handed in, restricted to this group, and is
            already applied.
        flags: Quality flags.
        split_by: The tag that separated it from its siblings, `visit`, or None.
        volume_index: Its number among its siblings.
        n_volumes: How many siblings there are, itself included.
    """

    indices: tuple[int, ...]
    geometry: SliceGeometry
    flags: tuple[str, ...] = ()
    split_by: str | None = None
    volume_index: int = 0
    n_volumes: int = 1


def slice_geometry(positions: np.ndarray, orientation: Sequence[float], pixel_spacing: Sequence[float] | None) -> SliceGeometry:
    """Order slices along their normal and check that they form a regular, orthogonal grid.

    Args:
        positions: (n, 3) ImagePositionPatient, mm in LPS.
        orientation: (6,) ImageOrientationPatient: direction along a row, then down a column, in LPS.
        pixel_spacing: (2,) PixelSpacing: down a column, then along a row, in mm; None when missing.
    """
    n = len(positions)
    unordered = np.arange(n)
    along_row, down_column = np.asarray(orientation[:3], float), np.asarray(orientation[3:6], float)
    lengths = np.linalg.norm(along_row), np.linalg.norm(down_column)
    if min(lengths) < 0.5 or abs(along_row @ down_column) > 0.01 * lengths[0] * lengths[1]:
        return SliceGeometry(unordered, None, None, faults=("bad_orientation",))
    along_row, down_column = along_row / lengths[0], down_column / lengths[1]
    normal = np.cross(along_row, down_column)
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    faults = []
    if pixel_spacing is None or len(pixel_spacing) != 2 or min(pixel_spacing) <= 0:
        faults.append("no_spacing")
    if n == 1:
        faults.append("single_slice")
    if faults:
        return SliceGeometry(order, None, None, faults=tuple(faults))
    assert pixel_spacing is not None
    steps = np.diff(depth[order])
    if np.min(steps) < COLLISION_MM:
        return SliceGeometry(order, None, None, faults=("collision",))
    step = float(np.median(steps))
    line = (positions[order[-1]] - positions[order[0]]) / (n - 1)
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(line - (line @ normal) * normal), line @ normal)))
    # Deviation of each slice from the straight line through the first and the last, within the slice plane.
    offsets = positions[order] - positions[order[0]] - np.arange(n)[:, None] * line
    sideways = np.linalg.norm(offsets - (offsets @ normal)[:, None] * normal, axis=1)
    if tilt > TILT_TOLERANCE_DEG:
        faults.append("gantry_tilt")
    irregular = np.max(np.abs(steps - step)) > max(STEP_TOLERANCE * step, STEP_TOLERANCE_MM)
    # A tilted, irregular stack strays from that line only because of its gaps: do not count it twice.
    if irregular or (tilt <= TILT_TOLERANCE_DEG and np.max(sideways) > 0.5 * min(pixel_spacing)):
        faults.append("irregular_slices")
    affine = np.eye(4)
    affine[:3, 0] = along_row * pixel_spacing[1]
    affine[:3, 1] = down_column * pixel_spacing[0]
    affine[:3, 2] = line
    affine[:3, 3] = positions[order[0]]
    spacing = (float(pixel_spacing[1]), float(pixel_spacing[0]), float(np.linalg.norm(line)))
    return SliceGeometry(
        order,
        FLIP @ affine,
        spacing,
        float(np.std(steps) / np.mean(steps)),
        float(np.max(steps)),
        tilt,
        tuple(faults),
    )


def split_series(headers: Sequence[Mapping[str, Any]]) -> list[SliceGroup]:
    """Split the slices of one series into volumes.

    Slices of another size, spacing or orientation go to another group first. Within a group, collisions are resolved
    by the first tag of `SPLIT_TAGS` that leaves none, else by the k-th visit to each position in the order of
    InstanceNumber.

    Args:
        headers: One per slice, as `dicom_header.read_header` returns them.

    Returns:
        Groups in a deterministic order; every slice is in exactly one.
    """
    groups: list[SliceGroup] = []
    for cluster in _clusters(headers):
        groups.extend(_split_cluster(headers, cluster))
    return groups


def _clusters(headers: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Group slices of equal size, spacing and orientation, within tolerance, in the order of first appearance."""
    found: list[tuple[tuple[Any, ...], np.ndarray, list[int]]] = []
    for i, header in enumerate(headers):
        located = len(header.get("position") or ()) == 3 and len(header.get("orientation") or ()) == 6
        key = (header.get("rows"), header.get("columns"), header.get("samples_per_pixel", 1), located)
        spacing = header.get("pixel_spacing") or ()
        numbers = np.array([*(header["orientation"] if located else ()), *spacing])
        for other, vector, members in found:
            if other == key and vector.shape == numbers.shape and np.allclose(vector, numbers, rtol=1e-3, atol=2e-3):
                members.append(i)
                break
        else:
            found.append((key, numbers, [i]))
    return [members for _, _, members in found]


def _geometry(headers: Sequence[Mapping[str, Any]], members: Sequence[int]) -> SliceGeometry:
    first = headers[members[0]]
    if len(first.get("position") or ()) != 3 or len(first.get("orientation") or ()) != 6:
        return SliceGeometry(np.arange(len(members)), None, None, faults=("no_position",))
    positions = np.array([headers[i]["position"] for i in members], dtype=np.float64)
    return slice_geometry(positions, first["orientation"], first.get("pixel_spacing"))


def _group(headers: Sequence[Mapping[str, Any]], members: Sequence[int], **changes: Any) -> SliceGroup:
    geometry = _geometry(headers, members)
    return SliceGroup(tuple(members[i] for i in geometry.order), geometry, **changes)


def _split_cluster(headers: Sequence[Mapping[str, Any]], members: list[int]) -> list[SliceGroup]:
    whole = _group(headers, members)
    if "collision" not in whole.geometry.faults:
        return [whole]
    stated = max((headers[i].get("n_temporal_positions") or 0) for i in members)
    for tag in SPLIT_TAGS:
        parts: dict[str, list[int]] = defaultdict(list)
        for i in members:
            parts[str(headers[i].get(tag))].append(i)
        if not 1 < len(parts) < len(members):
            continue
        if any("collision" in _geometry(headers, part).faults for part in parts.values()):
            continue
        if len({len(part) for part in parts.values()}) > 1 and tag in ("content_time", "acquisition_time"):
            continue  # times differ within a volume too: only an even split says that they name volumes
        ordered = sorted(parts.values(), key=lambda part: min(headers[i].get("instance_number") or 0 for i in part))
        return _volumes(headers, ordered, tag, "split_by_tag", stated)
    visits = _visits(headers, members)
    if visits is None:
        return [whole]
    return _volumes(headers, visits, "visit", "split_by_visit", stated)


def _volumes(
    headers: Sequence[Mapping[str, Any]], parts: Sequence[list[int]], tag: str, flag: str, stated: int
) -> list[SliceGroup]:
    flags: tuple[str, ...] = (flag,)
    if stated > 1 and stated != len(parts) and (tag == "visit" or tag.endswith(("position", "time"))):
        flags = (flag, "temporal_mismatch")
    return [_group(headers, part, flags=flags, split_by=tag, volume_index=k, n_volumes=len(parts)) for k, part in enumerate(parts)]


def _visits(headers: Sequence[Mapping[str, Any]], members: Sequence[int]) -> list[list[int]] | None:
    """Return the k-th slice at each position for every k, or None when positions are visited unequally often."""
    orientation = np.asarray(headers[members[0]]["orientation"], float)
    normal = np.cross(orientation[:3], orientation[3:6])
    numbers = [headers[i].get("instance_number") for i in members]
    if any(number is None for number in numbers) or len(set(numbers)) < len(numbers):
        return None
    depth = np.array([np.asarray(headers[i]["position"], float) @ normal for i in members])
    order = np.argsort(depth, kind="stable")
    breaks = np.flatnonzero(np.diff(depth[order]) >= COLLISION_MM) + 1
    places = np.split(order, breaks)
    counts = {len(place) for place in places}
    if len(counts) > 1:
        return None
    columns = [sorted((members[i] for i in place), key=lambda i: int(headers[i]["instance_number"])) for place in places]
    return [[column[k] for column in columns] for k in range(counts.pop())]


def role_of(image_type: Sequence[str], sop_class_uid: str = "") -> str:
    """Return the role of an image from ImageType (0008,0008).

    One of source, localiser, reformat, mip, derived_map, screenshot. DERIVED alone does not make a map: converters
    write it on everything.
    """
    values = {part.upper() for value in image_type for part in (value, *value.replace("/", " ").split())}
    if sop_class_uid.startswith("1.2.840.10008.5.1.4.1.1.7") or {"SCREEN", "SCREENSHOT", "CAPTURE"} & values:
        return "screenshot"
    if {"LOCALIZER", "SCOUT"} & values:
        return "localiser"
    if {"MIP", "MINIP", "MIN_IP", "MAX_IP", "PROJECTION"} & values:
        return "mip"
    if MAPS & values:
        return "derived_map"
    if {"REFORMATTED", "MPR", "CSA", "RESAMPLED", "AVERAGE"} & values:
        return "reformat"
    return "source"
