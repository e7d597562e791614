"""Build volumes from DICOM slices: group, order along the slice normal, check the geometry.

Series are built, not trusted: slices are ordered by the projection of their position on the normal, never by file
name or number, and a tag splits a series only if that removes collisions (several slices at one position) or separates
regular geometry; tags that vary without need are recorded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import FLIP

COLLISION_MM = 0.01
"""Slices closer than this along the normal are at one position; positions are written with two to four decimals."""
STEP_TOLERANCE = 0.02
"""Relative deviation of a slice step from the median that rounding of positions explains."""
STEP_TOLERANCE_MM = 0.02
MAX_MM = 1e6
"""A kilometre: what is farther from the scanner is a slip of the file's, and its square may be infinite."""
TILT_TOLERANCE_DEG = 0.5
"""Half a degree moves the last of 100 slices of 1 mm by 0.9 mm."""
MAX_TILT_DEG = 45.0
MAX_SHIFT_MM = 400.0
"""Gantries tilt by 30 degrees at most; what is sheared more than this is no tilted stack, and its grid would grow too large."""
STILL_PIXELS = 0.05
MISSING_SHARE = 0.1
"""Share of a regular grid that may be missing slices and still be filled with invalid planes."""
JITTER = 0.25
"""Relative deviation of slice steps from their median up to which slices are interpolated onto even steps."""
MIN_BLOCK = 4
"""Slices of one step that make a block: three equal steps are no accident."""

SPLIT_TAGS = (
    "echo_number", "temporal_position", "b_value", "image_type", "trigger_time", "echo_time", "inversion_time",
    "acquisition_number", "content_time", "acquisition_time",
)  # fmt: skip
"""Tags that may tell volumes of one series apart, tried in this order."""
CLOCKS = frozenset({"content_time", "acquisition_time"})


@dataclass(frozen=True)
class SliceGeometry:
    """Where the slices of one volume lie, and how they become a regular, orthogonal grid.

    Args:
        order: Index of each slice, from low to high along the normal.
        affine: (4, 4) index (column, row, slice) of the delivered grid to RAS+ mm; None when there is no usable geometry.
        spacing_mm: Of the delivered grid: along a row, down a column, from slice to slice.
        step_mm: Median distance between neighbouring slice positions; along a tilted couch more than the slice spacing.
        step_cv: Coefficient of variation of these distances.
        max_gap_mm: The largest of them.
        tilt_deg: Angle between the slice normal and the line through the slice positions.
        faults: Reason codes; the volume is usable when there is none.
        flags: Quality flags: `tilt_corrected`, `gaps_filled`, `slices_resampled`.
        shifts: (n, 2) pixels by which each slice, in `order`, is moved along its rows and down its columns into the
            delivered grid, 0 or more; None when nothing moves.
        planes: For every plane of the delivered grid its place among the slices in `order`, fractions between two
            of them, NaN where a slice is missing; None when every slice is a plane.
        grow: Columns and rows that the delivered grid has more than a slice.
    """

    order: np.ndarray
    affine: np.ndarray | None
    spacing_mm: tuple[float, float, float] | None
    step_mm: float = 0.0
    step_cv: float = 0.0
    max_gap_mm: float = 0.0
    tilt_deg: float = 0.0
    faults: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    shifts: np.ndarray | None = None
    planes: np.ndarray | None = None
    grow: tuple[int, int] = (0, 0)

    def shape(self, columns: int, rows: int) -> tuple[int, int, int]:
        """Return (columns, rows, slices) of the delivered grid."""
        n = len(self.order) if self.planes is None else len(self.planes)
        return columns + self.grow[0], rows + self.grow[1], n


@dataclass(frozen=True)
class SliceGroup:
    """One volume found in a series.

    Args:
        indices: Positions in the list handed to `split_series`, in slice order.
        geometry: Its geometry; `geometry.order` refers to the list handed in, restricted to this group, and is
            already applied.
        flags: Quality flags.
        split_by: What separated it from its siblings: a tag, several joined by `+`, `visit`, `block`, `mosaic`, or None.
        volume_index: Its number among its siblings.
        n_volumes: How many siblings there are, itself included.
        varying: Tags of `SPLIT_TAGS` that take several values in it: recorded, not split on.
    """

    indices: tuple[int, ...]
    geometry: SliceGeometry
    flags: tuple[str, ...] = ()
    split_by: str | None = None
    volume_index: int = 0
    n_volumes: int = 1
    varying: tuple[str, ...] = ()


def slice_geometry(positions: np.ndarray, orientation: Sequence[float], pixel_spacing: Sequence[float] | None) -> SliceGeometry:
    """Order slices along their normal and find the regular, orthogonal grid that they fill.

    A stack that is sheared against its normal (gantry tilt) is moved into place slice by slice within the slice planes;
    the grid grows until it holds all of them. Few missing slices leave empty planes; small jitter of the steps is
    interpolated. What is less regular than that is a fault.

    Args:
        positions: (n, 3) ImagePositionPatient, mm in LPS.
        orientation: (6,) ImageOrientationPatient: direction along a row, then down a column, in LPS.
        pixel_spacing: (2,) PixelSpacing: down a column, then along a row, in mm; None when missing.
    """
    n = len(positions)
    unordered = np.arange(n)
    if max(np.max(np.abs(positions)), *np.abs(orientation), *np.abs(() if pixel_spacing is None else pixel_spacing)) > MAX_MM:
        return SliceGeometry(unordered, None, None, faults=("no_position",))
    along_row, down_column = np.asarray(orientation[:3], float), np.asarray(orientation[3:6], float)
    lengths = np.linalg.norm(along_row), np.linalg.norm(down_column)
    if min(lengths) < 0.5 or abs(along_row @ down_column) > 0.01 * lengths[0] * lengths[1]:
        return SliceGeometry(unordered, None, None, faults=("bad_orientation",))
    along_row, down_column = along_row / lengths[0], down_column / lengths[1]
    normal = np.cross(along_row, down_column)
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    if pixel_spacing is None or len(pixel_spacing) != 2 or min(pixel_spacing) <= 0:
        return SliceGeometry(order, None, None, faults=("no_spacing",))
    if n == 1:
        return SliceGeometry(order, None, None, faults=("single_slice",))
    positions, depth = positions[order], depth[order] - depth[order[0]]
    if np.min(np.diff(depth)) < COLLISION_MM:
        return SliceGeometry(order, None, None, faults=("collision",))
    moved = positions - positions[0]
    inside = np.stack([moved @ along_row, moved @ down_column], axis=1)  # (n, 2) mm within the slice plane
    slope = inside[-1] / depth[-1]
    tilt = float(np.degrees(np.arctan(np.linalg.norm(slope))))
    sideways = np.linalg.norm(inside - depth[:, None] * slope, axis=1)
    pixel = np.array([pixel_spacing[1], pixel_spacing[0]], dtype=np.float64)
    planes, step, flags, faults = _planes(depth)
    if np.max(sideways) > 0.5 * min(pixel_spacing):
        faults = ("irregular_slices",)
    shifts, origin, grow = None, np.zeros(2), (0, 0)
    axis = (moved[-1] / depth[-1]) * step
    if tilt > TILT_TOLERANCE_DEG:
        if tilt > MAX_TILT_DEG or np.max(np.ptp(inside, axis=0)) > MAX_SHIFT_MM:
            faults = ("gantry_tilt", *faults)
        else:
            shifts, origin, grow = _shifts(inside / pixel)
            flags = ("tilt_corrected", *flags)
            axis = normal * step
    affine = np.eye(4)
    affine[:3, 0] = along_row * pixel[0]
    affine[:3, 1] = down_column * pixel[1]
    affine[:3, 2] = axis
    affine[:3, 3] = positions[0] + along_row * pixel[0] * origin[0] + down_column * pixel[1] * origin[1]
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    return SliceGeometry(
        order=order,
        affine=FLIP @ affine,
        spacing_mm=(float(pixel[0]), float(pixel[1]), float(np.linalg.norm(axis))),
        step_mm=float(np.median(gaps)),
        step_cv=float(np.std(gaps) / np.mean(gaps)),
        max_gap_mm=float(np.max(gaps)),
        tilt_deg=tilt,
        faults=faults,
        flags=flags if not faults else (),
        shifts=shifts,
        planes=planes,
        grow=grow,
    )


def _planes(depth: np.ndarray) -> tuple[np.ndarray | None, float, tuple[str, ...], tuple[str, ...]]:
    """Return the places of the grid's planes among the slices (see `SliceGeometry`), their step, flags and faults."""
    n = len(depth)
    steps = np.diff(depth)
    step = float(np.median(steps))
    tolerance = max(STEP_TOLERANCE * step, STEP_TOLERANCE_MM)
    if np.max(np.abs(steps - step)) <= tolerance:
        return None, float(depth[-1]) / (n - 1), (), ()
    multiples = np.maximum(np.rint(steps / step), 1)
    missing = int(multiples.sum()) - (n - 1)
    if np.max(np.abs(steps - multiples * step)) <= tolerance and missing <= MISSING_SHARE * (n + missing):
        planes = np.full(n + missing, np.nan)
        planes[np.concatenate([[0], np.cumsum(multiples)]).astype(int)] = np.arange(n)
        return planes, float(depth[-1]) / (n + missing - 1), ("gaps_filled",), ()
    if np.max(np.abs(steps - step)) <= JITTER * step:
        even = np.linspace(0.0, depth[-1], n)
        return np.interp(even, depth, np.arange(n, dtype=float)), float(depth[-1]) / (n - 1), ("slices_resampled",), ()
    return None, float(depth[-1]) / (n - 1), (), ("irregular_slices",)


def _shifts(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Return shifts, origin of the grown grid in pixels of the first slice, and the growth, for offsets in pixels."""
    # An axis along which nothing but rounding moves stays as it is: interpolating there would only blur.
    offsets = np.where(np.ptp(offsets, axis=0) > STILL_PIXELS, offsets, 0.0)
    origin = offsets.min(axis=0)
    shifts = offsets - origin
    columns, rows = (int(value) for value in np.ceil(shifts.max(axis=0) - 1e-6))
    return shifts, origin, (columns, rows)


def split_series(headers: Sequence[Mapping[str, Any]]) -> list[SliceGroup]:
    """Split the slices of one series into volumes.

    Slices of another size, spacing or orientation go to another group first. Within a group, collisions are resolved
    by the first tag of `SPLIT_TAGS`, or the first even pair of them, that leaves none, else by the k-th visit to each
    position in the order of InstanceNumber. Slices that form no regular grid are split into blocks of one step, or by
    a tag that leaves regular grids. A mosaic (`archive.mosaic`) is a volume of its own.

    Args:
        headers: One per slice, as `dicom_header.read_header` returns them; of a mosaic with its layout as `mosaic`.

    Returns:
        Groups in a deterministic order; every slice is in exactly one.
    """
    mosaics = [i for i, header in enumerate(headers) if header.get("mosaic")]
    groups: list[SliceGroup] = []
    for cluster in _clusters(headers, [i for i, header in enumerate(headers) if not header.get("mosaic")]):
        groups.extend(_split_cluster(headers, cluster))
    for cluster in _clusters(headers, mosaics):
        groups.extend(_mosaic_groups(headers, cluster))
    return groups


def _clusters(headers: Sequence[Mapping[str, Any]], which: Sequence[int]) -> list[list[int]]:
    """Group slices of equal size, spacing and orientation, within tolerance, in the order of first appearance."""
    found: list[list[int]] = []
    alike: dict[tuple[Any, ...], _Alike] = {}
    seen: dict[tuple[Any, ...], list[int]] = {}  # exact values met before: most slices repeat them digit by digit
    for i in which:
        header = headers[i]
        located = len(header.get("position") or ()) == 3 and len(header.get("orientation") or ()) == 6
        key = (header.get("rows"), header.get("columns"), header.get("samples_per_pixel", 1), located)
        values = (*(header["orientation"] if located else ()), *(header.get("pixel_spacing") or ()))
        exact = (*key, *values)
        members = seen.get(exact)
        if members is None:
            known = alike.setdefault((*key, len(values)), _Alike(len(values)))
            members = known.find(values)
            if members is None:
                members = known.add(values)
                found.append(members)
            seen[exact] = members
        members.append(i)
    return found


class _Alike:
    """Clusters whose values have one length, by the values of the first slice of each.

    They are kept as one array, so that a series in which every slice has another orientation costs one comparison of arrays a slice.
    """

    def __init__(self, width: int) -> None:
        self._values = np.empty((4, width))
        self._members: list[list[int]] = []

    def find(self, values: Sequence[float]) -> list[int] | None:
        """Return the first cluster whose values equal these within 0.002 and 0.1 %."""
        wanted = np.array(values, dtype=np.float64)
        near = np.abs(self._values[: len(self._members)] - wanted) <= 2e-3 + 1e-3 * np.abs(wanted)
        which = np.flatnonzero(near.all(axis=1))
        return self._members[which[0]] if len(which) else None

    def add(self, values: Sequence[float]) -> list[int]:
        """Open a cluster and return the list of its members."""
        n = len(self._members)
        if n == len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
        self._values[n] = values
        self._members.append([])
        return self._members[n]


def _geometry(headers: Sequence[Mapping[str, Any]], members: Sequence[int]) -> SliceGeometry:
    first = headers[members[0]]
    if len(first.get("position") or ()) != 3 or len(first.get("orientation") or ()) != 6:
        return SliceGeometry(np.arange(len(members)), None, None, faults=("no_position",))
    positions = np.array([headers[i]["position"] for i in members], dtype=np.float64)
    return slice_geometry(positions, first["orientation"], first.get("pixel_spacing"))


def _group(headers: Sequence[Mapping[str, Any]], members: Sequence[int], flags: Sequence[str] = (), **changes: Any) -> SliceGroup:
    geometry = _geometry(headers, members)
    return SliceGroup(
        tuple(members[i] for i in geometry.order.tolist()),
        geometry,
        (*flags, *geometry.flags),
        varying=_varying(headers, members),
        **changes,
    )


def _varying(headers: Sequence[Mapping[str, Any]], members: Sequence[int]) -> tuple[str, ...]:
    return tuple(tag for tag in SPLIT_TAGS if _varies([headers[i].get(tag) for i in members]))


def _varies(values: Sequence[Any]) -> bool:
    """Return whether the values differ in writing; slices of one series mostly share one object, which needs no writing."""
    first = values[0]
    text = str(first)
    return any(value is not first and str(value) != text for value in values)


def _split_cluster(headers: Sequence[Mapping[str, Any]], members: list[int]) -> list[SliceGroup]:
    whole = _group(headers, members)
    if "collision" in whole.geometry.faults:
        found = _separate(headers, members)
        if found is None:
            return [whole]
        tag, parts = found
        stated = max((headers[i].get("n_temporal_positions") or 0) for i in members)
        flags = ["split_by_visit" if tag == "visit" else "split_by_tag"]
        if stated > 1 and stated != len(parts) and (tag == "visit" or tag.endswith(("position", "time"))):
            flags.append("temporal_mismatch")
    elif "irregular_slices" in whole.geometry.faults:
        tag, parts, flags = "", [members], []
    else:
        return [whole]
    pieces: list[tuple[str, list[int], tuple[str, ...]]] = []
    for part in parts:
        split = _regular_parts(headers, part) if "irregular_slices" in _geometry(headers, part).faults else None
        if split is None:
            pieces.append((tag, part, tuple(flags)))
        else:
            extra = "split_by_block" if split[0] == "block" else "split_by_tag"
            pieces.extend((tag or split[0], piece, tuple(dict.fromkeys([*flags, extra]))) for piece in split[1])
    return [
        _group(headers, piece, piece_flags, split_by=name or None, volume_index=k, n_volumes=len(pieces))
        for k, (name, piece, piece_flags) in enumerate(pieces)
    ]


def _values(headers: Sequence[Mapping[str, Any]], members: Sequence[int], tags: Sequence[str]) -> list[list[int]] | None:
    """Return the slices apart by the values of these tags, or None when that separates nothing or everything."""
    parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in members:
        parts[tuple(str(headers[i].get(tag)) for tag in tags)].append(i)
    if not 1 < len(parts) < len(members):
        return None
    return sorted(parts.values(), key=lambda part: min(headers[i].get("instance_number") or 0 for i in part))


def _places(headers: Sequence[Mapping[str, Any]], members: Sequence[int]) -> np.ndarray:
    """Return the number of the position at which each slice lies; slices at one position share it."""
    orientation = np.asarray(headers[members[0]]["orientation"], float)
    normal = np.cross(orientation[:3], orientation[3:6])
    depth = np.array([headers[i]["position"] for i in members], dtype=np.float64) @ normal
    order = np.argsort(depth, kind="stable")
    places = np.empty(len(members), dtype=np.int64)
    places[order] = np.concatenate([[0], np.cumsum(np.diff(depth[order]) >= COLLISION_MM)])
    return places


def _separate(headers: Sequence[Mapping[str, Any]], members: list[int]) -> tuple[str, list[list[int]]] | None:
    """Return the tag, or `visit`, that leaves no two slices at one position, and the slices apart; None when none does."""
    place = dict(zip(members, _places(headers, members).tolist()))
    varying = _varying(headers, members)
    pairs = [pair for pair in combinations(varying, 2) if not any(tag in CLOCKS for tag in pair)]
    for tags in [*((tag,) for tag in varying), *pairs]:
        parts = _values(headers, members, tags)
        if parts is None or any(len({place[i] for i in part}) < len(part) for part in parts):
            continue
        # Times differ within a volume too, and pairs of tags by chance: only an even split says that they name volumes.
        if len({len(part) for part in parts}) > 1 and (len(tags) > 1 or tags[0] in CLOCKS):
            continue
        return "+".join(tags), parts
    visits = _visits(headers, members, place)
    return None if visits is None else ("visit", visits)


def _visits(headers: Sequence[Mapping[str, Any]], members: Sequence[int], place: Mapping[int, int]) -> list[list[int]] | None:
    """Return the k-th slice at each position for every k, or None when positions are visited unequally often."""
    numbers = [headers[i].get("instance_number") for i in members]
    if any(number is None for number in numbers) or len(set(numbers)) < len(numbers):
        return None
    columns: dict[int, list[int]] = defaultdict(list)
    for i in sorted(members, key=lambda i: int(headers[i]["instance_number"])):
        columns[place[i]].append(i)
    if len({len(column) for column in columns.values()}) > 1:
        return None
    return [list(visit) for visit in zip(*(columns[k] for k in sorted(columns)))]


def _regular_parts(headers: Sequence[Mapping[str, Any]], members: Sequence[int]) -> tuple[str, list[list[int]]] | None:
    """Return `block` or a tag and the regular stacks into which it splits slices of uneven steps; None when none does."""
    ordered = [members[i] for i in _geometry(headers, members).order]
    blocks, rest = _blocks(headers, ordered)
    if len(blocks) > 1 and not rest:
        return "block", blocks
    for tag in SPLIT_TAGS:
        parts = _values(headers, members, (tag,))
        if parts is None or min(len(part) for part in parts) < MIN_BLOCK:
            continue
        if not any(_geometry(headers, part).faults for part in parts):
            return tag, parts
    if blocks and len(rest) < len(ordered) / 2:
        return "block", [*blocks, *([rest] if rest else [])]
    return None


def _blocks(headers: Sequence[Mapping[str, Any]], ordered: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Return the runs of `MIN_BLOCK` slices or more with one step, from low to high, and the slices in none."""
    positions = np.array([headers[i]["position"] for i in ordered], dtype=np.float64)
    orientation = np.asarray(headers[ordered[0]]["orientation"], float)
    steps = np.diff(positions @ np.cross(orientation[:3], orientation[3:6]))
    blocks: list[list[int]] = []
    rest: list[int] = []
    start = 0
    while start < len(ordered):
        stop = start + 1
        while stop < len(ordered) and abs(steps[stop - 1] - steps[start]) <= max(STEP_TOLERANCE * steps[start], STEP_TOLERANCE_MM):
            stop += 1
        if stop - start >= MIN_BLOCK:
            blocks.append(list(ordered[start:stop]))
        else:
            stop = start + 1
            rest.append(ordered[start])
        start = stop
    return blocks, rest


def _mosaic_groups(headers: Sequence[Mapping[str, Any]], members: Sequence[int]) -> list[SliceGroup]:
    ordered = sorted(members, key=lambda i: headers[i].get("instance_number") or 0)
    groups = []
    for k, i in enumerate(ordered):
        geometry = mosaic_geometry(headers[i])
        groups.append(SliceGroup((i,), geometry, split_by="mosaic", volume_index=k, n_volumes=len(ordered)))
    return groups


def mosaic_geometry(header: Mapping[str, Any]) -> SliceGeometry:
    """Return the geometry of the volume inside a Siemens mosaic.

    The position in the header is that of the corner of a mosaic laid over the centre of the slice: it is moved to the
    corner of the first tile.

    Args:
        header: A header whose `mosaic` is what `archive.mosaic.mosaic_layout` found.
    """
    layout = header["mosaic"]
    n, (rows, columns) = int(layout["n"]), layout["tile"]
    order = np.arange(n)
    spacing: Sequence[float] = header.get("pixel_spacing") or ()
    position, orientation = header.get("position") or (), header.get("orientation") or ()
    if len(position) != 3 or len(orientation) != 6:
        return SliceGeometry(order, None, None, faults=("no_position",))
    if len(spacing) != 2 or not layout.get("step_mm"):
        return SliceGeometry(order, None, None, faults=("no_spacing",))
    along_row, down_column = np.asarray(orientation[:3], float), np.asarray(orientation[3:], float)
    normal = np.cross(along_row, down_column)
    if layout.get("normal") and normal @ np.asarray(layout["normal"], float) < 0:
        normal = -normal
    corner = np.asarray(position, float)
    corner = corner + along_row * spacing[1] * (header["columns"] - columns) / 2
    corner = corner + down_column * spacing[0] * (header["rows"] - rows) / 2
    positions = corner + order[:, None] * normal * float(layout["step_mm"])
    return slice_geometry(positions, orientation, spacing)
