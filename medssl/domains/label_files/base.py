"""What all label readers share: the grid of the image, the map that comes out, and how structures are painted into it.

A label file says which structures it labels. A structure that it names is labelled, also where no voxel has it: then it is
empty. A structure that it does not name is unlabelled, which is something else: whoever drew the liver alone said nothing of
the spleen.

Where structures overlap, the one with the higher value gets the voxel (tumour = 2 over liver = 1, whatever the order in the
file), and the voxels are counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.volume_files import GRID_TOLERANCE
from medssl.errors import GeometryError, ImageError

UNCERTAIN = -1
"""Value of voxels of which nobody says what they are; they are left out of losses and scores."""

IGNORE = "ignore"
"""Name of a structure whose voxels are uncertain, as nnU-Net has it."""

COUNTS: dict[str, str] = {
    "overlap_voxels": "voxels that more than one structure claims; the higher value has them",
    "unlisted": "structures of the file that the cohort does not list",
    "outside": "voxels or contours that lie outside the image",
    "between": "slices filled from a contour of a plane that is not theirs",
    "gaps": "slices without a contour between two with one",
    "crossing": "pairs of contours of one structure that cross in a plane",
    "skipped": "contours that enclose nothing: points, open lines, fewer than three corners",
    "undrawn": "structures that are named and have no contour: unlabelled, not empty",
    "empty": "structures that are labelled and have no voxel",
}
"""What readers count."""


@dataclass(frozen=True)
class Grid:
    """The canonical grid of an image.

    Args:
        affine: (4, 4) voxel centre index to RAS+ mm.
        shape: Voxels along X, Y, Z.
        slice_axis: Axis along which slices lie; None where it is not known.
        frame_of_reference: FrameOfReferenceUID of the image; None where its format has none.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    slice_axis: int | None = None
    frame_of_reference: str | None = None

    @classmethod
    def of(cls, sample: Any, frame_of_reference: str | None = None) -> Grid:
        """Return the grid of a `Sample`."""
        x, y, z = (int(n) for n in sample.image.shape[-3:])
        return cls(np.asarray(sample.affine, dtype=np.float64), (x, y, z), sample.meta.slice_axis, frame_of_reference)

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel edges along X, Y, Z."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    def index(self, points_lps: np.ndarray) -> np.ndarray:
        """Return (N, 3) continuous voxel indices of (N, 3) points in DICOM's patient coordinates, mm."""
        ras = np.asarray(points_lps, dtype=np.float64) * (-1.0, -1.0, 1.0)
        return np.asarray((ras - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T)


@dataclass(frozen=True)
class LabelMap:
    """A label map on the grid of its image.

    Args:
        array: (X, Y, Z) int16 or int32: structure values, 0 background, -1 uncertain.
        names: Value to the name that the file has for it, for the structures that the file labels. Names come from files and
            may hold anything: they stay in `private/`.
        named: Whether the form names its structures. Plain maps do not, and label everything they can.
        counts: What was counted, see `COUNTS`.
        flags: `frame_unverified` where the frames of reference of map and image could not be compared.
    """

    array: np.ndarray
    names: Mapping[int, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    named: bool = True


def name_key(name: str) -> str:
    """Return a structure name as names are compared: without case, and `_`, `-` and spaces alike."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Return the values 1, 2, 3 ... for names in the order of their keys; names with one key are one structure, `ignore` is none."""
    return {key: value for value, key in enumerate(sorted({name_key(name) for name in names} - {IGNORE}), start=1)}


class Painter:
    """Paints structures into one map, one after another.

    Args:
        grid: Grid of the image.
        structures: Name to value, as the cohort lists them; None numbers the names that `declare` is given.
    """

    def __init__(self, grid: Grid, structures: Mapping[str, int] | None = None) -> None:
        self.array = np.zeros(grid.shape, dtype=np.int16)
        self.counts: Counter[str] = Counter()
        self.names: dict[int, str] = {}
        self._values = None if structures is None else {name_key(name): value for name, value in structures.items()}
        self._twice = np.zeros(grid.shape, dtype=bool)
        self._doubt: np.ndarray | None = None

    def declare(self, names: Sequence[str]) -> list[int | None]:
        """Say which structures the file labels; return the value of each, None for those that the cohort does not list.

        `ignore` is uncertain, whether listed or not, and no structure that is labelled.
        """
        table = {**(numbered(names) if self._values is None else self._values), IGNORE: UNCERTAIN}
        values = [table.get(name_key(name)) for name in names]
        for name, value in zip(names, values):
            if value is None:
                self.counts["unlisted"] += 1
            elif value != UNCERTAIN:
                self.names.setdefault(value, name)
        return values

    def add(self, value: int | None, mask: np.ndarray, start: Sequence[int]) -> None:
        """Paint True voxels of a block that starts at an index of the grid and may reach beyond it."""
        if value is None:
            return
        box = bounding_box(mask)  # a plane lies across the memory of a volume: touch as little of it as possible
        if box is None:
            return
        start = [a + part.start for a, part in zip(start, box)]
        block, at, outside = clipped(mask[box], start, self.array.shape)
        self.counts["outside"] += outside
        if block.size and value == UNCERTAIN:
            if self._doubt is None:
                self._doubt = np.zeros(self.array.shape, dtype=bool)
            self._doubt[at] |= block
        elif block.size:
            here = self.array[at]  # a view
            self._twice[at] |= block & (here > 0) & (here != value)
            here[block & (here < value)] = value

    def uncertain(self, mask: np.ndarray) -> None:
        """Mark voxels of the whole grid as uncertain where no structure has them."""
        self.array[mask & (self.array == 0)] = UNCERTAIN

    def done(self, flags: Sequence[str] = ()) -> LabelMap:
        """Return the map. What is painted as uncertain stays so under every structure: `ignore` has the highest value in nnU-Net."""
        if self._doubt is not None:
            self.array[self._doubt] = UNCERTAIN
            self._twice &= ~self._doubt
        self.counts["overlap_voxels"] += int(self._twice.sum())
        present = set(values_in(self.array))
        self.counts["empty"] += sum(value not in present for value in self.names)
        counts = {name: int(self.counts[name]) for name in COUNTS if self.counts[name]}
        return LabelMap(self.array, self.names, counts, tuple(flags))


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Return the box around the True voxels; None where there is none."""
    edges = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not hit.size:
            return None
        edges.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(edges)


def values_in(array: np.ndarray) -> list[int]:
    """Return the different values of a map in order; `np.unique` would sort all of its voxels."""
    if array.dtype.itemsize > 2:
        return [int(v) for v in np.unique(array)]
    low = int(np.iinfo(array.dtype).min)
    found: set[int] = set()
    for slab in array:
        found.update((np.flatnonzero(np.bincount(slab.ravel().astype(np.int32) - low)) + low).tolist())
    return sorted(found)


def clipped(block: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> tuple[np.ndarray, tuple[slice, ...], int]:
    """Return the part of a bool block inside a grid, where it goes, and how many of its True voxels lie outside."""
    low = np.clip(np.asarray(start), 0, shape)
    high = np.clip(np.asarray(start) + block.shape, low, shape)
    inner = block[tuple(slice(a, b) for a, b in zip(low - np.asarray(start), high - np.asarray(start)))]
    return inner, tuple(slice(a, b) for a, b in zip(low, high)), int(block.sum()) - int(inner.sum())


def placed(array: np.ndarray, affine: np.ndarray, grid: Grid) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Turn a block of voxels into the axes of a grid.

    Args:
        array: (I, J, K) in axes of its own.
        affine: (4, 4) its voxel centre index to RAS+ mm.
        grid: Grid of the image.

    Returns:
        A view in the grid's axes, and the index of its first voxel, which may lie outside.

    Raises:
        GeometryError: Voxels of the block are not voxels of the grid: a corner is more than a tenth of the smallest voxel edge off.
    """
    step = np.linalg.inv(grid.affine) @ affine
    axes = np.abs(step[:3, :3]).argmax(axis=0)
    exact = np.zeros((3, 3))
    exact[axes, range(3)] = np.sign(step[axes, range(3)])
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(array.shape) - 1.0)
    found = corners @ step[:3, :3].T + step[:3, 3]
    offset = np.rint(found.mean(axis=0) - corners.mean(axis=0) @ exact.T)
    apart = float(np.linalg.norm((found - corners @ exact.T - offset) @ grid.affine[:3, :3].T, axis=1).max())
    limit = GRID_TOLERANCE * float(grid.spacing_mm.min())
    if len(set(axes.tolist())) < 3 or apart > limit:
        raise GeometryError(
            f"the label's voxels lie up to {apart:.2f} mm away from voxels of its image; at most {limit:.2f} mm is accepted; "
            "export the label on the grid of its image, or resample it with nearest neighbours"
        )
    turned = array.transpose(np.argsort(axes))
    turned = turned[tuple(slice(None, None, -1 if exact[g].sum() < 0 else 1) for g in range(3))]
    x, y, z = ((corners @ exact.T).min(axis=0) + offset).astype(int).tolist()
    return turned, (x, y, z)


def check_frame(frame: str | None, grid: Grid) -> tuple[str, ...]:
    """Compare frames of reference; return the flag that says so where one of them is not stated.

    Raises:
        GeometryError: They differ: equal coordinates are then other places in the patient.
    """
    if not frame or not grid.frame_of_reference:
        return ("frame_unverified",)
    if frame != grid.frame_of_reference:
        raise GeometryError(
            "the label refers to another frame of reference than its image; its coordinates are those of another scan; "
            "register the two and export the label again, or give the image that it was drawn on"
        )
    return ()


def open_dicom(path: Path) -> Any:
    """Read a DICOM label object through pydicom, whose messages would quote its content.

    Raises:
        ImageError: It cannot be read.
    """
    import pydicom

    from medssl.archive.headers.dicom_raw import BoundedFile

    try:
        with BoundedFile(path) as handle:
            return pydicom.dcmread(handle, force=True)
    except OSError:
        raise
    except Exception as err:
        raise damaged(err) from None


def damaged(err: Exception) -> ImageError:
    """Return the error for a file that breaks its reader, without the reader's words."""
    return ImageError("unreadable", f"the label file cannot be parsed ({type(err).__name__}); export it again from its source")
