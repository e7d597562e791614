"""What all volume readers share: the raw volume, the array it is collected in, and the turn into canonical axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medssl.archive.headers.file_headers import VolumeHeader, volume_fault
from medssl.archive.reasons import SERIES_REASONS
from medssl.errors import GeometryError, ImageError

SLAB_BYTES = 8 << 20
ANISOTROPY = 1.2
"""A voxel edge longer than the others by this factor is taken for the slice axis where the header does not name one."""


@dataclass
class RawVolume:
    """A volume as its file holds it, in canonical axes.

    Args:
        array: (X, Y, Z) uint8, int16 or float32; rescale slope and intercept are applied; may be a strided view.
        affine: (4, 4) float64, voxel centre index to RAS+ mm.
        spacing_mm: (3,) voxel edges along X, Y, Z.
        slice_axis: Array axis along which slices lie, or None.
        modality: DICOM modality (`CT`, `MR`, ...), or `unknown`.
        flags: Quality flags (see `archive.reasons.FLAGS`).
        valid: (X, Y, Z) bool, False = padding or not finite (such voxels hold 0); None when all are valid.
        units: `HU`, `arbitrary`, or `unknown` for formats that cannot say.
        image_type: DICOM ImageType values; empty for other formats.
        facts: What else the files say, in closed vocabularies and numbers (see `types.ImageMeta`).
    """

    array: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    slice_axis: int | None
    modality: str = "unknown"
    flags: tuple[str, ...] = ()
    valid: np.ndarray | None = None
    units: str = "unknown"
    image_type: tuple[str, ...] = ()
    facts: Mapping[str, str | float | bool] = field(default_factory=dict)


class Stack:
    """Collects slabs (z, y, x) into one array of the narrowest dtype that has held all of them so far."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.array = np.empty(shape, dtype=np.uint8)
        self.valid: np.ndarray | None = None
        self.low, self.high = np.inf, -np.inf
        self.flags: list[str] = []

    def put(self, start: int, slab: np.ndarray, invalid: np.ndarray | None = None) -> None:
        """Store a slab of any integer or real dtype; True in `invalid` excludes a voxel. The slab may be changed."""
        if slab.dtype.kind == "f":
            finite = np.isfinite(slab)
            if not finite.all():
                self.flag("nan_voxels")
                invalid = ~finite if invalid is None else invalid | ~finite
        if invalid is not None and invalid.any():
            if self.valid is None:
                self.valid = np.ones(self.array.shape, dtype=bool)
            self.valid[start : start + len(slab)] = ~invalid
            slab = np.where(invalid, slab.dtype.type(0), slab)
            kept = slab[~invalid]
        else:
            kept = slab
        if kept.size:
            self.low = min(self.low, float(kept.min()))
            self.high = max(self.high, float(kept.max()))
        self._widen(start, slab)
        self.array[start : start + len(slab)] = slab

    def flag(self, name: str) -> None:
        """Add a quality flag once."""
        if name not in self.flags:
            self.flags.append(name)

    def _widen(self, start: int, slab: np.ndarray) -> None:
        low, high = float(slab.min()), float(slab.max())
        whole = slab.dtype.kind in "iub" or (
            self.array.dtype != np.float32 and low >= -32768 and high <= 32767 and bool(np.array_equal(np.rint(slab), slab))
        )
        if self.array.dtype != np.float32:
            if not whole or low < -32768 or high > 32767:
                self._change(start, np.float32)
            elif self.array.dtype == np.uint8 and (low < 0 or high > 255):
                self._change(start, np.int16)
        if self.array.dtype == np.float32 and slab.dtype != np.float32 and "float32_rounded" not in self.flags:
            exact = max(-low, high) <= 2**24 if whole else np.array_equal(slab.astype(np.float32), slab)
            if not exact:
                self.flag("float32_rounded")

    def _change(self, filled: int, dtype: Any) -> None:
        wider = np.empty(self.array.shape, dtype=dtype)
        wider[:filled] = self.array[:filled]
        self.array = wider


def fault(reason: str) -> ImageError:
    """Return the error for a reason of `archive.reasons.SERIES_REASONS`."""
    text = f"{SERIES_REASONS.get(reason, reason)}; a regular three-dimensional volume is needed; leave this series out"
    geometric = ("gantry_tilt", "irregular_slices", "collision", "bad_orientation", "no_position", "single_slice")
    return GeometryError(text, reason=reason) if reason in geometric else ImageError(reason, text)


def slabs(shape: tuple[int, int, int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) runs along z of about `SLAB_BYTES`."""
    step = max(1, SLAB_BYTES // max(1, shape[1] * shape[2] * itemsize))
    for start in range(0, shape[0], step):
        yield start, min(step, shape[0] - start)


def canonical(
    stack: Stack, affine: np.ndarray, slice_axis: int | None, flags: Sequence[str], **fields: Any
) -> tuple[RawVolume, Stack]:
    """Turn a filled stack (z, y, x in stored order) into RAS+ axes; only views are made."""
    from nibabel import orientations

    array = stack.array.transpose(2, 1, 0)
    if slice_axis is None:
        slice_axis = _longest_edge(affine)
    change = orientations.io_orientation(affine)
    valid = None if stack.valid is None else orientations.apply_orientation(stack.valid.transpose(2, 1, 0), change)
    turned = affine @ orientations.inv_ornt_aff(change, array.shape)
    x, y, z = (float(edge) for edge in np.linalg.norm(turned[:3, :3], axis=0))
    return RawVolume(
        array=orientations.apply_orientation(array, change),
        affine=turned,
        spacing_mm=(x, y, z),
        slice_axis=None if slice_axis is None else int(change[slice_axis, 0]),
        flags=tuple(dict.fromkeys([*flags, *stack.flags])),
        valid=valid,
        **fields,
    ), stack


def _longest_edge(affine: np.ndarray) -> int | None:
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    order = np.argsort(edges)
    return int(order[2]) if edges[order[2]] >= ANISOTROPY * edges[order[1]] else None


def scaler(slope: float, intercept: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that applies slope and intercept: exactly on integers, in float64 otherwise."""
    if slope in (0.0, 1.0) and intercept == 0.0:
        return lambda slab: slab
    if slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**31:

        def whole(slab: np.ndarray) -> np.ndarray:
            if slab.dtype.kind == "f":
                return slab.astype(np.float64) * slope + intercept
            return slab.astype(np.int64) * int(slope) + int(intercept)

        return whole
    return lambda slab: slab.astype(np.float64) * slope + intercept


def single_volume(header: VolumeHeader, volume: int | None) -> tuple[tuple[int, int, int], np.ndarray, tuple[str, ...]]:
    """Return size (z, y, x), affine and flags of one volume of a single-file format.

    Args:
        header: The file's header.
        volume: Which volume of a file of four or more dimensions; None for the only one.

    Raises:
        ImageError: There is no such volume, or it cannot be used.
    """
    shape, reason = header.shape, header.reason
    if volume is not None:
        check_volume(volume, int(np.prod(shape[3:], dtype=np.int64)) if len(shape) > 3 else 1)
        shape = shape[:3]
        if reason == "not_3d":
            reason = volume_fault(shape, header.affine)
    if reason == "not_3d":
        raise ImageError(
            "not_3d",
            f"{len(shape)}D image of {size_text(shape)}; one 3D volume is needed; name one with part or split the file",
        )
    if reason is not None:
        raise fault(reason)
    assert header.affine is not None
    x, y, z = shape
    return (z, y, x), header.affine, header.flags


def check_volume(volume: int, n: int) -> None:
    """Refuse the number of a volume that a file of n volumes does not have."""
    if not 0 <= volume < n:
        raise ImageError("not_3d", f"volume {volume} of a file of {n}; numbers run from 0; index the file again")


def size_text(shape: Sequence[int]) -> str:
    """Return for instance `512x512x60`."""
    return "x".join(str(n) for n in shape)
