"""Samplers: which item and which box, as a pure function of the draw key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.seeding import counter_rng
from medssl.types import Box, Draw, DrawKey


@lru_cache(maxsize=4)
def _permutation(seed: int, source: str, epoch: int, count: int) -> np.ndarray:
    return counter_rng(seed, "permutation", source, epoch).permutation(count)


def item_at(key: DrawKey, source: str, batch: int, count: int) -> int:
    """Return the place (0 to count - 1) of the item that a key draws: each pass visits all items once, in a new order.

    Args:
        key: The draw key.
        source: Name of the source; two sources shuffle differently.
        batch: Items per optimiser step.
        count: Number of items.
    """
    number = key.step * batch + key.position
    epoch, place = divmod(number, count)
    return int(_permutation(key.seed, source, epoch, count)[place])


def place_box(centre_mm: np.ndarray, size_mm: np.ndarray, extent_mm: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Return the start of a box near a centre, moved inside the volume where it fits and centred on the volume where it does not.

    The start is rounded to whole voxels, so that a view at the item's own spacing is an exact copy of voxels.

    Args:
        centre_mm: (3,) wanted centre.
        size_mm: (3,) size of the box.
        extent_mm: (3,) size of the volume.
        spacing_mm: (3,) voxel size.
    """
    inside = np.clip(centre_mm - size_mm / 2, 0.0, np.maximum(extent_mm - size_mm, 0.0))
    start = np.where(size_mm >= extent_mm, (extent_mm - size_mm) / 2, inside)
    return np.asarray(np.round(start / spacing_mm) * spacing_mm)


class CropSampler:
    """Random crops, most of them around foreground.

    Args:
        source: Name of the source.
        ids: Ids of its items, ascending.
        record: id -> store record with `shape`, `spacing_mm` and `foreground` (K, 3) voxel indices.
        box_size_mm: spacing -> size of the box that the views need.
        batch: Items per optimiser step.
        foreground: Share of crops that are centred on a foreground voxel; the others lie anywhere. Air fills 60 to 80 % of many
            scans, and a masked autoencoder would spend its capacity on it.
    """

    def __init__(
        self,
        source: str,
        ids: Sequence[int],
        record: Callable[[int], Any],
        box_size_mm: Callable[[Sequence[float]], Sequence[float]],
        *,
        batch: int,
        foreground: float = 0.75,
    ) -> None:
        if not 0.0 <= foreground <= 1.0:
            raise RequestError(f"sampler.foreground is {foreground}; accepted: 0 (anywhere) to 1 (always around foreground)")
        self.source = source
        self.ids = list(ids)
        self.record = record
        self.box_size_mm = box_size_mm
        self.batch = batch
        self.foreground = foreground

    def draw(self, key: DrawKey) -> Draw:
        """Draw one item and one box; a pure function of the key."""
        item = self.ids[item_at(key, self.source, self.batch, len(self.ids))]
        rng = counter_rng(key.seed, key.step, key.position, self.source, "crop")
        record = self.record(item)
        spacing = np.asarray(record.spacing_mm, dtype=np.float64)
        extent = np.asarray(record.shape, dtype=np.float64) * spacing
        around_foreground = rng.random() < self.foreground and len(record.foreground) > 0
        point = record.foreground[rng.integers(len(record.foreground))] + 0.5 if around_foreground else None
        anywhere = rng.random(3) * extent
        centre = anywhere if point is None else np.asarray(point) * spacing
        size = np.asarray(self.box_size_mm(record.spacing_mm), dtype=np.float64)
        start = place_box(centre, size, extent, spacing)
        box = Box(tuple(float(v) for v in start), tuple(float(v) for v in size))  # type: ignore[arg-type]
        return Draw(self.source, (item,), (box,))


class CentreSampler:
    """The box in the middle of each item, for monitors and probes: item number `position`, no randomness.

    Args:
        source: Name of the source.
        ids: Ids, ascending.
        record: See `CropSampler`.
        box_size_mm: See `CropSampler`.
    """

    def __init__(
        self,
        source: str,
        ids: Sequence[int],
        record: Callable[[int], Any],
        box_size_mm: Callable[[Sequence[float]], Sequence[float]],
    ) -> None:
        self.source = source
        self.ids = list(ids)
        self.record = record
        self.box_size_mm = box_size_mm

    def draw(self, key: DrawKey) -> Draw:
        """Return the middle of item number `key.position`."""
        item = self.ids[key.position]
        record = self.record(item)
        spacing = np.asarray(record.spacing_mm, dtype=np.float64)
        extent = np.asarray(record.shape, dtype=np.float64) * spacing
        size = np.asarray(self.box_size_mm(record.spacing_mm), dtype=np.float64)
        start = place_box(extent / 2, size, extent, spacing)
        box = Box(tuple(float(v) for v in start), tuple(float(v) for v in size))  # type: ignore[arg-type]
        return Draw(self.source, (item,), (box,))
