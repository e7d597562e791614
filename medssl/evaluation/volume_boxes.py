"""Boxes in volumes from label maps: one per connected part of a structure, or one per structure.

A map that labels some structures only does not say where the others are: it is refused. Uncertain voxels (-1, or the value of `ignore`)
become boxes that count neither way, and so does what touches them, whose extent nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.volumes import Volume


@dataclass(frozen=True)
class VolumeBoxes:
    """Boxes of one volume. Edges are places between voxels, from the outer corner of the first one.

    Args:
        boxes: (N, 6) in voxels: low corner, high corner.
        labels: (N,) place in the structures.
        ignore: (N,) bool, counts neither way.
        parts: (X, Y, Z) int16: the place of a voxel's box, from 1; 0 where there is none.
        voxels: (N,) voxels of every part.
        left_out: Parts with fewer voxels than asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    parts: np.ndarray
    voxels: np.ndarray
    left_out: int = 0

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
    return parts_of(volume.label, structures, split=split, min_voxels=min_voxels)


def parts_of(label: np.ndarray, structures: Sequence[int], *, split: bool = True, min_voxels: int = 1) -> VolumeBoxes:
    """Return the boxes of a label map (X, Y, Z) of whole numbers; see `volume_boxes`."""
    from scipy import ndimage

    around = np.ones((3, 3, 3), dtype=bool)
    uncertain = label < 0
    near_doubt = ndimage.binary_dilation(uncertain, around) if uncertain.any() else uncertain
    found: list[tuple[np.ndarray, int, bool]] = []
    left_out = 0
    masks = [(k, label == value, False) for k, value in enumerate(structures)]
    masks += [(k, uncertain, True) for k in range(len(structures)) if uncertain.any()]
    for k, mask, hidden in masks:
        numbered, count = ndimage.label(mask, around) if split or hidden else (mask.astype(np.int32), int(mask.any()))
        for number, corner in enumerate(ndimage.find_objects(numbered), start=1):
            if corner is None or number > count:
                continue
            part = np.zeros_like(mask)
            part[corner] = numbered[corner] == number
            if not hidden and part.sum() < min_voxels:
                left_out += 1
                continue
            found.append((part, k, hidden or bool((part & near_doubt).any())))
    parts = np.zeros(label.shape, dtype=np.int16)
    boxes = np.zeros((len(found), 6))
    for row, (part, _, _) in enumerate(found):
        parts[part] = row + 1
        boxes[row] = extent(part)
    return VolumeBoxes(
        boxes,
        np.array([k for _, k, _ in found], dtype=np.int64),
        np.array([hidden for _, _, hidden in found], dtype=bool),
        parts,
        np.array([int(part.sum()) for part, _, _ in found], dtype=np.int64),
        left_out,
    )


def extent(mask: np.ndarray) -> np.ndarray:
    """Return the box (2 D,) of a mask that is not empty."""
    sides = [
        np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis))) for axis in range(mask.ndim)
    ]
    return np.array([*(side[0] for side in sides), *(side[-1] + 1 for side in sides)], dtype=np.float64)
