"""Put slices onto the regular, orthogonal grid that `archive.dicom_series.slice_geometry` found for them."""

from __future__ import annotations

import numpy as np

from medssl.archive.headers.dicom_series import SliceGeometry
from medssl.domains.volume_stack import Stack

SNAP = 1e-3
"""A shift this close to a whole pixel, or a plane this close to a slice, is one: interpolating would only blur."""


def regrid(stack: Stack, geometry: SliceGeometry) -> Stack:
    """Move slices within their planes and put missing or uneven ones onto even steps, by linear interpolation.

    Args:
        stack: (n, rows, columns) slices in the order of the geometry; integers stay integers, rounded to the nearest.
        geometry: What to do; slices without shifts and planes are returned as they are.

    Returns:
        The delivered grid; voxels without real content hold 0 and are invalid.
    """
    if geometry.shifts is None and geometry.planes is None:
        return stack
    n, rows, columns = stack.array.shape
    width, height, depth = geometry.shape(columns, rows)
    out = Stack((depth, height, width))
    out.array = np.zeros((depth, height, width), dtype=stack.array.dtype)
    out.valid = np.zeros(out.array.shape, dtype=bool)
    out.flags = list(stack.flags)
    planes = np.arange(n, dtype=float) if geometry.planes is None else geometry.planes
    for k, place in enumerate(planes):
        if np.isnan(place):
            continue
        low = int(place + SNAP)
        weight = place - low
        plane, valid = _moved(stack, low, geometry.shifts, (height, width))
        if weight > SNAP:
            above, also = _moved(stack, low + 1, geometry.shifts, (height, width))
            plane, valid = (1 - weight) * plane + weight * above, valid & also
        plane[~valid] = 0
        out.array[k] = np.rint(plane) if out.array.dtype != np.float32 else plane
        out.valid[k] = valid
        kept = out.array[k][valid]
        if kept.size:
            out.low, out.high = min(out.low, float(kept.min())), max(out.high, float(kept.max()))
    if out.valid.all():
        out.valid = None
    return out


def _moved(stack: Stack, k: int, shifts: np.ndarray | None, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return slice k on the grown plane as float64, and which of its pixels are real."""
    values = stack.array[k].astype(np.float64)
    valid = np.ones(values.shape, dtype=bool) if stack.valid is None else stack.valid[k]
    if shifts is None:
        return values, valid
    for axis, shift in ((0, shifts[k, 1]), (1, shifts[k, 0])):
        values, valid = shift_axis(values, valid, float(shift), size[axis], axis)
    return values, valid


def shift_axis(values: np.ndarray, valid: np.ndarray, shift: float, size: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Move an image along one axis by linear interpolation.

    Args:
        values: Any shape, float64.
        valid: The same shape, bool.
        shift: Pixels, 0 or more: what was at i comes to i + shift.
        size: Length of the axis afterwards.
        axis: Which.

    Returns:
        Values and validity; a pixel is valid where all pixels that it is made of are.
    """
    whole = int(np.floor(shift + SNAP))
    part = shift - whole if shift - whole > SNAP else 0.0
    values, valid = np.moveaxis(values, axis, 0), np.moveaxis(valid, axis, 0)
    moved = np.zeros((size, *values.shape[1:]))
    real = np.zeros(moved.shape, dtype=bool)
    n = len(values)
    if part == 0.0:
        moved[whole : whole + n], real[whole : whole + n] = values, valid
    else:
        # Pixel j takes its value from between j - whole - 1 and j - whole.
        moved[whole + 1 : whole + n] = part * values[:-1] + (1 - part) * values[1:]
        real[whole + 1 : whole + n] = valid[:-1] & valid[1:]
    return np.moveaxis(moved, 0, axis), np.moveaxis(real, 0, axis)
