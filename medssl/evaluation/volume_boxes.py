"""Boxes in volumes from label maps: one per connected part of a structure, or one per structure.

A map that labels some structures only does not say where the others are: it is refused. Uncertain voxels (-1, or the value of `ignore`)
become boxes that count neither way, and so does what touches them, whose extent nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.volumes import Volume, structure_points

Corner = tuple[slice, slice, slice]


@dataclass(frozen=True)
class VolumeBoxes:
    """Boxes of one volume. Edges are places between voxels, from the outer corner of the first one.

    Args:
        boxes: (N, 6) in voxels: low corner, high corner.
        labels: (N,) place in the structures.
        ignore: (N,) bool, counts neither way.
        region: (N,) bool, those of `ignore` that are uncertain voxels, with any number of objects or none.
        pieces: Per box its corner (three slices) and its voxels there: whole-volume masks of many parts would fill the memory.
        shape: (X, Y, Z) of the volume.
        points: Box, from 1, to (K, 3) voxels in it, for crops; without those that count neither way.
        spacing_mm: Of the volume, so that it need not be read again.
        left_out: Parts with fewer voxels than asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    region: np.ndarray
    pieces: tuple[tuple[Corner, np.ndarray], ...]
    shape: tuple[int, ...]
    points: Mapping[int, np.ndarray]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    left_out: int = 0

    @property
    def parts(self) -> np.ndarray:
        """(X, Y, Z) int16: the place of a voxel's box, from 1; 0 where there is none. Made anew at each use."""
        found = np.zeros(self.shape, dtype=np.int16)
        for row, (corner, mask) in enumerate(self.pieces):
            found[corner][mask] = row + 1
        return found

    @property
    def voxels(self) -> np.ndarray:
        """(N,) voxels of every part."""
        return np.array([int(mask.sum()) for _, mask in self.pieces], dtype=np.int64)

    def boxes_mm(self, spacing_mm: Sequence[float]) -> np.ndarray:
        """Return the boxes in mm from the outer corner of the first voxel."""
        found: np.ndarray = self.boxes * np.asarray([*spacing_mm, *spacing_mm])
        return found


def volume_boxes(volume: Volume, structures: Sequence[int], *, split: bool = True, min_voxels: int = 1) -> VolumeBoxes:
    """Return the boxes of a labelled volume.

    Args:
        volume: With its label map.
        structures: Values to look for; their order gives the labels.
        split: One box per connected part (26 neighbours), as for lesions; False gives one per structure, as for organs.
        min_voxels: Parts with fewer voxels are left out, and counted.

    Raises:
        RequestError: There is no label map, or it labels some structures only.
    """
    if volume.label is None:
        raise RequestError("boxes from label maps: a case has no label map; give it one, or take it out of the cohort")
    lacking = [s for s in structures if not volume.labels(s)]
    if lacking:
        raise RequestError(
            f"boxes from label maps: a map does not label structure {', '.join(map(str, lacking))}, which is not to say that it is absent; "
            "detection needs maps of all structures: take such cases out of the cohort, or list fewer structures"
        )
    found = parts_of(volume.label, structures, split=split, min_voxels=min_voxels)
    return replace(found, spacing_mm=volume.spacing_mm)


def parts_of(label: np.ndarray, structures: Sequence[int], *, split: bool = True, min_voxels: int = 1) -> VolumeBoxes:
    """Return the boxes of a label map (X, Y, Z) of whole numbers; see `volume_boxes`."""
    from scipy import ndimage

    around = np.ones((3, 3, 3), dtype=bool)
    uncertain = label < 0
    near_doubt = ndimage.binary_dilation(uncertain, around) if uncertain.any() else uncertain
    pieces: list[tuple[Corner, np.ndarray]] = []
    facts: list[tuple[int, bool, bool]] = []
    left_out = 0
    asked: list[tuple[int, int | None]] = [(k, value) for k, value in enumerate(structures)]
    asked += [(k, None) for k in range(len(structures)) if uncertain.any()]
    for k, value in asked:
        mask = uncertain if value is None else label == value
        numbered, count = ndimage.label(mask, around) if split or value is None else (mask.astype(np.int32), int(mask.any()))
        for number, corner in enumerate(ndimage.find_objects(numbered, max_label=count), start=1):
            part = numbered[corner] == number
            if value is not None and part.sum() < min_voxels:
                left_out += 1
                continue
            pieces.append((corner, part))
            facts.append((k, value is None or bool((part & near_doubt[corner]).any()), value is None))
    boxes = [[*(side.start for side in corner), *(side.stop for side in corner)] for corner, _ in pieces]
    labels, ignore, region = (np.array([row[column] for row in facts]) for column in range(3))
    return VolumeBoxes(
        np.array(boxes, dtype=np.float64).reshape(-1, 6),
        labels.astype(np.int64),
        ignore.astype(bool),
        region.astype(bool),
        tuple(pieces),
        label.shape,
        {row + 1: _points(*pieces[row]) for row in range(len(pieces)) if not ignore[row]},
        left_out=left_out,
    )


def _points(corner: Corner, mask: np.ndarray) -> np.ndarray:
    """Return voxels (K, 3) of a part, in the volume."""
    found: np.ndarray = structure_points(mask.astype(np.int16))[1] + np.array([side.start for side in corner])
    return found


def extent(mask: np.ndarray) -> np.ndarray:
    """Return the box (2 D,) of a mask that is not empty."""
    sides = [
        np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis))) for axis in range(mask.ndim)
    ]
    return np.array([*(side[0] for side in sides), *(side[-1] + 1 for side in sides)], dtype=np.float64)
