"""RT structure sets: contours in patient coordinates, filled onto the grid of their image.

A voxel belongs to a structure when its centre lies inside the structure's contours of its plane. Inside is counted by the
even-odd rule over all contours of a plane, so that a contour within another is a hole (CLOSEDPLANAR_XOR, and what most systems
mean by nested CLOSED_PLANAR contours), and a keyhole, one line that runs in, around the hole and back, is one too.

Contours lie in planes across one axis of the grid, on slices or between them. A plane stands for the slab around it: half the
structure's usual distance of planes to either side, at least half a slice. So contours drawn on every third slice fill all three.
Planes more than 10 mm apart are not taken for neighbours: they may be two lesions.

Reference: DICOM PS3.3 C.8.8.5 and C.8.8.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.label_files.base import Grid, LabelMap, Painter, check_frame, damaged, open_dicom
from medssl.errors import GeometryError, ImageError, MedsslError

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
FLATNESS = 0.25
"""Largest distance of a contour's points from their plane, in slices: coordinates are rounded to 0.01 mm and worse by some systems."""
MAX_STEP_MM = 10.0
"""Planes further apart say nothing of the slices between them."""
SAME_PLANE = 0.05
"""Contours this close, in slices, lie in one plane."""


@dataclass(frozen=True)
class Roi:
    """One region of a structure set.

    Args:
        name: Its name.
        frame_of_reference: Frame of reference of its contours; empty when not stated.
        contours: (N, 3) points in patient coordinates (LPS), mm, of each closed contour.
        skipped: Contours that enclose nothing.
    """

    name: str
    frame_of_reference: str
    contours: tuple[np.ndarray, ...]
    skipped: int


def read_rtstruct(path: Path, grid: Grid, structures: Mapping[str, int] | None = None) -> LabelMap:
    """Read a structure set onto the grid of the image.

    Args:
        path: The file.
        grid: Grid of the image; its `frame_of_reference` is compared where both state one.
        structures: ROI name to value; None numbers the names of drawn regions in their order. A region that is named and not
            drawn, as templates leave them, is unlabelled.

    Raises:
        GeometryError: Another frame of reference, contours that lie in no plane across an axis of the image, or all outside.
        ImageError: It cannot be read.
    """
    rois = regions(open_dicom(path))
    painter = Painter(grid, structures)
    painter.counts["undrawn"] += sum(not roi.contours for roi in rois)
    painter.counts["skipped"] += sum(roi.skipped for roi in rois)
    drawn = [roi for roi in rois if roi.contours]
    values = painter.declare([roi.name for roi in drawn])
    flags: set[str] = set()
    n_filled = 0
    for roi, value in zip(drawn, values):
        if value is not None:
            flags.update(check_frame(roi.frame_of_reference, grid))
            n_filled += _fill(roi, value, grid, painter)
    wanted = sum(value is not None for value in values)
    if wanted and not n_filled:
        raise GeometryError("all contours lie outside the image; give the image that they were drawn on")
    return painter.done(sorted(flags))


def regions(dataset: Any) -> list[Roi]:
    """Return the regions of a structure set in the order of its list.

    Raises:
        ImageError: The structure set is damaged.
    """
    try:
        by_number = {int(item.ReferencedROINumber): item for item in dataset.get("ROIContourSequence") or ()}
        return [_region(item, by_number.get(int(item.ROINumber))) for item in dataset.get("StructureSetROISequence") or ()]
    except MedsslError:
        raise
    except Exception as err:  # pydicom quotes values
        raise damaged(err) from None


def _region(item: Any, drawn: Any) -> Roi:
    contours, skipped = [], 0
    for contour in (drawn.get("ContourSequence") or ()) if drawn is not None else ():
        points = _numbers(contour)
        if len(points) % 3 or not np.isfinite(points).all():
            raise ImageError("unreadable", "a contour whose numbers are not points; export the structure set again")
        if str(contour.get("ContourGeometricType")) in CLOSED and len(points) >= 9:
            contours.append(points.reshape(-1, 3))
        else:
            skipped += 1
    name = str(item.get("ROIName") or f"roi {item.ROINumber}")
    return Roi(name, str(item.get("ReferencedFrameOfReferenceUID") or ""), tuple(contours), skipped)


def _numbers(contour: Any) -> np.ndarray:
    """Return the coordinates of a contour from the bytes of its decimal strings: pydicom would make an object of each."""
    raw = contour.get_item("ContourData") if "ContourData" in contour else None
    value = getattr(raw, "value", None)
    if isinstance(value, bytes):
        return np.array([float(part) for part in value.decode("ascii").strip(" \0").split("\\") if part.strip()])
    return np.array([float(v) for v in value or ()])


def _fill(roi: Roi, value: int, grid: Grid, painter: Painter) -> int:
    """Paint a region; return in how many slices of the image it lies."""
    indices = [grid.index(points) for points in roi.contours]
    axis = plane_axis(indices, grid)
    u, v = (a for a in range(3) if a != axis)
    planes = _planes(indices, axis)
    heights = np.array([height for height, _ in planes])
    gaps = np.diff(heights)
    gaps = gaps[gaps * grid.spacing_mm[axis] <= MAX_STEP_MM]
    half = max(1.0, float(np.median(gaps)) if gaps.size else 1.0) / 2
    shape = (grid.shape[u], grid.shape[v])
    n_filled, used = 0, set()
    for k in range(grid.shape[axis]):
        j = plane_of_slice(k, heights, half)
        if j is None:
            painter.counts["gaps"] += bool(heights[0] < k < heights[-1])
            continue
        height, members = planes[j]
        mask, crossing, outside = fill_plane([indices[m][:, (u, v)] for m in members], shape)
        if j not in used:
            painter.counts["crossing"] += crossing
            painter.counts["outside"] += outside
        used.add(j)
        painter.counts["between"] += abs(height - k) > FLATNESS
        start = [0, 0, 0]
        start[axis] = k
        painter.add(value, np.expand_dims(mask, axis), start)
        n_filled += 1
    outside_planes = [j for j, (height, _) in enumerate(planes) if height < -half or height >= grid.shape[axis] - 1 + half]
    painter.counts["outside"] += sum(len(planes[j][1]) for j in outside_planes)
    return n_filled


def plane_axis(indices: Sequence[np.ndarray], grid: Grid) -> int:
    """Return the axis of the grid across which all contours lie flat: the slice axis where there is a choice.

    Raises:
        GeometryError: There is none.
    """
    thick = np.max([np.ptp(points, axis=0) for points in indices], axis=0)
    order = [a for a in (grid.slice_axis,) if a is not None] + [int(a) for a in np.argsort(thick)]
    for axis in order:
        if thick[axis] <= FLATNESS:
            return axis
    raise GeometryError(
        "contours of a structure lie across the planes of the image, or in planes of different directions; "
        "give the image that they were drawn on, or export the structure as a mask"
    )


def _planes(indices: Sequence[np.ndarray], axis: int) -> list[tuple[float, list[int]]]:
    """Return (height in slices, contours) of each plane, from below."""
    heights = [float(points[:, axis].mean()) for points in indices]
    planes: list[tuple[float, list[int]]] = []
    for number in sorted(range(len(heights)), key=heights.__getitem__):
        if planes and heights[number] - planes[-1][0] <= SAME_PLANE:
            planes[-1][1].append(number)
        else:
            planes.append((heights[number], [number]))
    return planes


def plane_of_slice(k: int, heights: np.ndarray, half: float) -> int | None:
    """Return the plane that fills a slice: the nearest with height - half <= k < height + half; None without."""
    near = np.flatnonzero((heights - half <= k + 1e-3) & (k + 1e-3 < heights + half))
    if not near.size:
        return None
    apart = np.abs(heights[near] - k)
    return int(near[int(apart.argmin())])


def fill_plane(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Fill the contours of one plane by the even-odd rule.

    Args:
        polygons: (N, 2) corners in voxel indices; the last is joined to the first.
        shape: Voxels along both axes.

    Returns:
        The bool mask, how many pairs of contours cross (overlap without one lying in the other), and how many contours reach
        beyond the image.
    """
    corners = np.concatenate(polygons)
    low = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, shape)
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, low, shape)
    box = (int(high[0] - low[0]), int(high[1] - low[1]))
    masks = [fill_polygon(points - low, box) for points in polygons]
    edge = np.array(shape) - 0.5
    outside = sum(bool((points < -0.5).any() or (points > edge).any()) for points in polygons)
    crossing = 0
    for i, first in enumerate(masks):
        for second in masks[:i]:
            both = int((first & second).sum())
            crossing += bool(both and both < min(int(first.sum()), int(second.sum())))
    filled = np.zeros(shape, dtype=bool)
    filled[low[0] : high[0], low[1] : high[1]] = np.logical_xor.reduce(masks)
    return filled, crossing, outside


def fill_polygon(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return which voxel centres lie inside a closed line, by the even-odd rule.

    Of centres on the line those on its lower side belong to it, so that regions that share an edge share no voxel.
    """
    (x1, y1), (x2, y2) = points.T, np.roll(points, -1, axis=0).T
    low = np.clip(np.ceil(np.minimum(y1, y2)), 0, shape[1]).astype(int)  # an edge crosses the rows low <= row < high
    counts = np.clip(np.ceil(np.maximum(y1, y2)), low, shape[1]).astype(int) - low
    edge = np.repeat(np.arange(len(points)), counts)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + low[edge]
    at = np.ceil(x1[edge] + (rows - y1[edge]) * (x2 - x1)[edge] / (y2 - y1)[edge])
    toggles = np.zeros((shape[0] + 1, shape[1]), dtype=np.int32)
    np.add.at(toggles, (np.clip(at, 0, shape[0]).astype(int), rows), 1)
    return np.asarray(np.cumsum(toggles, axis=0)[:-1] % 2 == 1)
