"""Scores of a segmentation per structure: Dice, and the 95th percentile Hausdorff distance in mm."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def dice(prediction: np.ndarray, label: np.ndarray, structures: Iterable[int]) -> dict[int, float]:
    """Return 2 |P and L| / (|P| + |L|) per structure.

    Args:
        prediction: Integer label map, any shape.
        label: Integer label map of the same shape.
        structures: Label values to score.

    Returns:
        Structure to Dice between 0 and 1; NaN where the structure is in neither map, so that it is left out of means.

    Reference:
        Dice 1945, "Measures of the Amount of Ecologic Association Between Species".
    """
    scores = {}
    for structure in structures:
        p, t = prediction == structure, label == structure
        total = int(p.sum()) + int(t.sum())
        scores[structure] = 2.0 * int((p & t).sum()) / total if total else float("nan")
    return scores


def hd95_mm(prediction: np.ndarray, label: np.ndarray, structures: Iterable[int], spacing_mm: Sequence[float]) -> dict[int, float]:
    """Return the symmetric 95th percentile Hausdorff distance between surfaces per structure, through MONAI.

    The surface of a mask is its voxels with a face neighbour outside; of the two directed 95th percentiles the larger
    counts.

    Args:
        prediction: (X, Y, Z) or (H, W) integer label map.
        label: Of the same shape.
        structures: Label values to score.
        spacing_mm: Voxel size along each axis in mm.

    Returns:
        Structure to mm. NaN where the structure is in neither map. Where it is in one only there is no distance: the
        diagonal of the volume stands in, the largest that could occur, so that a network that finds nothing is not
        rewarded by being left out of the mean.

    Reference:
        Taha and Hanbury 2015, "Metrics for evaluating 3D medical image segmentation"; MONAI 1.6
        `metrics/hausdorff_distance.py`.
    """
    import torch
    from monai.metrics import compute_hausdorff_distance

    diagonal = float(np.linalg.norm(np.asarray(label.shape) * np.asarray(spacing_mm, dtype=np.float64)))
    scores = {}
    for structure in structures:
        p, t = prediction == structure, label == structure
        if not p.any() and not t.any():
            scores[structure] = float("nan")
        elif not p.any() or not t.any():
            scores[structure] = diagonal
        else:
            box = _bounding_box(p | t)
            pair = [torch.from_numpy(np.ascontiguousarray(m[box]))[None, None] for m in (p, t)]
            with warnings.catch_warnings():
                # MONAI 1.5 to 1.6 warns about an argument that it passes to itself
                warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
                distance = compute_hausdorff_distance(
                    pair[0], pair[1], include_background=True, percentile=95, spacing=[float(s) for s in spacing_mm]
                )
            scores[structure] = float(distance)
    return scores


def volumes_ml(label: np.ndarray, structures: Iterable[int], affine: np.ndarray) -> dict[int, float]:
    """Return the volume of each structure of a label map (X, Y, Z) in ml, of voxels as large as the affine (4, 4) to mm says."""
    voxel = abs(float(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3]))) / 1000
    return {structure: float((label == structure).sum()) * voxel for structure in structures}


def areas_mm2(label: np.ndarray, structures: Iterable[int], spacing_mm: Sequence[float]) -> dict[int, float]:
    """Return the area of each structure of the label map of a picture, of pixels of `spacing_mm` (rows, columns) mm."""
    pixel = float(spacing_mm[0]) * float(spacing_mm[1])
    return {structure: float((label == structure).sum()) * pixel for structure in structures}


def mean_score(scores: Mapping[int, float]) -> float:
    """Return the mean over the structures that have a score; NaN when none has."""
    values = [value for value in scores.values() if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the box around a mask with one voxel of margin, so that distances are computed where something is."""
    edges = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        edges.append(slice(max(0, int(hit[0]) - 1), int(hit[-1]) + 2))
    return tuple(edges)
