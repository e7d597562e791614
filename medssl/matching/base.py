"""What a matcher is: given points in one volume, the same places in another, in world millimetres.

Three frames occur. World mm: RAS+, what an affine maps to. Item mm: along the item's own axes, from the outer corner of voxel 0 (see
`types.Box`). Cells: indices of an embedding map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from medssl.errors import RequestError
from medssl.types import Sample


class MatchVolume:
    """One volume to match in; its voxels are read when a matcher asks for them.

    Args:
        name: What messages call it: a series id.
        affine: (4, 4), voxel centre index to RAS+ mm.
        spacing_mm: (3,) voxel size.
        shape: (X, Y, Z).
        read: Reads the canonical sample.
        version: Changes when the voxels do; embeddings of another version are stale.
    """

    def __init__(
        self,
        name: str,
        affine: np.ndarray,
        spacing_mm: tuple[float, ...],
        shape: tuple[int, ...],
        read: Callable[[], Sample],
        version: str = "",
    ) -> None:
        self.name, self.shape, self.read, self.version = name, tuple(int(n) for n in shape), read, version
        self.affine = np.asarray(affine, dtype=np.float64)
        self.spacing_mm = np.asarray(spacing_mm, dtype=np.float64)

    @classmethod
    def of_sample(cls, sample: Sample, name: str = "") -> MatchVolume:
        """Return the volume of a sample.

        Raises:
            RequestError: It is an image or a clip.
        """
        if sample.affine is None or sample.spacing_mm is None:
            raise RequestError(
                f"series {name or sample.meta.series_id} is no volume but of the kind {sample.meta.kind}; match volumes"
            )
        shape = sample.image.shape[1:]
        return cls(name or sample.meta.series_id, sample.affine, sample.spacing_mm, shape, lambda: sample)

    @classmethod
    def of_store(cls, reader: Any, series_id: str) -> MatchVolume:
        """Return an item of a store (`store.reader.StoreReader`)."""
        record = reader.record(series_id)
        return cls(series_id, record.affine, record.voxel_mm, record.shape, lambda: reader.read(series_id), record.checksum)

    @cached_property
    def extent_mm(self) -> np.ndarray:
        """(3,) edges in mm."""
        return np.asarray(self.shape) * self.spacing_mm

    def to_item(self, world_mm: np.ndarray) -> np.ndarray:
        """Turn world mm (N, 3) into item mm."""
        index = (np.asarray(world_mm, dtype=np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T
        return np.asarray((index + 0.5) * self.spacing_mm)

    def to_world(self, item_mm: np.ndarray) -> np.ndarray:
        """Turn item mm (N, 3) into world mm."""
        index = np.asarray(item_mm, dtype=np.float64) / self.spacing_mm - 0.5
        return np.asarray(index @ self.affine[:3, :3].T + self.affine[:3, 3])

    def inside(self, item_mm: np.ndarray) -> np.ndarray:
        """Return which points (N, 3), item mm, lie in the volume."""
        return np.asarray(((item_mm >= 0) & (item_mm <= self.extent_mm)).all(axis=1))


@dataclass(frozen=True)
class Matches:
    """Where points were found.

    Args:
        points_mm: (N, 3) float64, world mm in the target; NaN where there is no match at all.
        scores: (N,) float64, at most 1 (as good as the point itself); 0 where there is no match.
    """

    points_mm: np.ndarray
    scores: np.ndarray


class Matcher(Protocol):
    """Anything that finds corresponding points; `registry.MATCHERS` lists those that come with medssl."""

    name: str

    def match(self, source: MatchVolume, points_mm: np.ndarray, target: MatchVolume) -> Matches:
        """Find points of one volume in another.

        Args:
            source: Where the points are known.
            points_mm: (N, 3) world mm.
            target: Where they are looked for.

        Returns:
            One match per point. A point outside the body of the source has none.
        """
        ...


def checked_points(points_mm: Any) -> np.ndarray:
    """Return points as (N, 3) float64.

    Raises:
        RequestError: They are not triples of finite numbers.
    """
    try:
        points = np.asarray(points_mm, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0 or not np.isfinite(points).all():
        raise RequestError("points: accepted are triples of finite numbers x, y, z in world mm (RAS+), one or several")
    return points


def no_matches(count: int) -> Matches:
    """Return what stands for points without a match."""
    return Matches(np.full((count, 3), np.nan), np.zeros(count))


def body_mask(sample: Sample) -> np.ndarray:
    """Return the foreground of a volume as its domain found it, (X, Y, Z) bool: what lies at or above its own minimum."""
    mask = np.asarray(sample.image[0] >= sample.meta.stats.get("min", -np.inf))
    return mask if sample.valid is None else mask & sample.valid


def coarse_body(sample: Sample, step_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the body of a volume on coarse blocks of whole voxels, its holes (lungs, fluid, bowel gas) filled slice by slice.

    Args:
        sample: The volume.
        step_mm: Wanted edge of a block.

    Returns:
        (X, Y, Z) bool, the blocks that are at least half body, and (3,) their edges in mm.
    """
    assert sample.spacing_mm is not None
    edge = [max(1, round(step_mm / s)) for s in sample.spacing_mm]
    blocks = filled(block_mean(body_mask(sample), edge) >= 0.5)
    return blocks, np.asarray(edge) * np.asarray(sample.spacing_mm)


def filled(mask: np.ndarray) -> np.ndarray:
    """Return a mask (X, Y, Z) with its holes filled in every axial slice: airways and bowel are open at the ends of a volume."""
    from scipy import ndimage

    return np.stack([ndimage.binary_fill_holes(mask[:, :, k]) for k in range(mask.shape[2])], axis=2)


def block_mean(array: np.ndarray, edge: Any) -> np.ndarray:
    """Return means over blocks of voxels as float32; the last block along an axis may be smaller.

    Args:
        array: (X, Y, Z).
        edge: (3,) voxels.
    """
    for axis, size in enumerate(edge):
        starts = np.arange(0, array.shape[axis], int(size))
        counts = np.diff([*starts, array.shape[axis]]).astype(np.float32)
        sums = np.add.reduceat(array.astype(np.float32, copy=False), starts, axis=axis)
        array = sums / counts.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.asarray(array, dtype=np.float32)
