"""Pictures, slices and stacks out of the store: which planes a draw means, and how they are read and turned.

A slice is turned as a radiologist looks at it: anterior or superior at the top, the patient's right (sagittal: anterior) at the left.
Slices of a stack keep the order of the array: towards the right, anterior or superior; frames keep time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl.errors import RequestError
from medssl.sampling.samplers import item_at
from medssl.sampling.source import StoreSource
from medssl.seeding import counter_rng
from medssl.store.reader import StoreReader
from medssl.types import DrawKey, Views

SLAB = 32
"""Slices decoded at a time: the edge of a block of the store."""


@dataclass(frozen=True)
class PlaneDraw:
    """Which planes of which item.

    Args:
        id: Row number in `items.parquet`.
        planes: Indices along `axis`, ascending.
        axis: 0, 1, 2 of a volume; 0 for frames of a clip; None for a picture.
    """

    id: int
    planes: tuple[int, ...]
    axis: int | None


class PlaneSampler:
    """Pictures as they are, single slices and frames, or stacks that cover a part of a volume or clip.

    Args:
        source: Name of the source.
        ids: Ids of its items, ascending.
        record: id -> store record.
        slices: Most planes of a stack; None draws one plane.
        batch: Items per optimiser step.
        cover: Range of the share of a volume or clip that a stack covers, uniform; its planes are spread evenly over it.
        foreground: Share of single slices that go through a foreground voxel.
        partitions: S > 0 draws the single slice of batch position p from part p mod S of the volume (Chaitanya et al. 2020), see
            `partition_planes`.
        axis: Slice axis; `auto` takes the one along which the source had slices, else the one with the largest spacing, else Z.
    """

    def __init__(
        self,
        source: str,
        ids: Sequence[int],
        record: Callable[[int], Any],
        slices: int | None,
        *,
        batch: int,
        cover: Sequence[float] = (1.0, 1.0),
        foreground: float = 0.75,
        partitions: int = 0,
        axis: int | str = "auto",
    ) -> None:
        low, high = cover if isinstance(cover, Sequence) and len(cover) == 2 else (0.0, 0.0)
        if not 0 < low <= high <= 1:
            raise RequestError(f"sampler.cover is {cover!r}; accepted: [lo, hi] with 0 < lo <= hi <= 1")
        if not 0 <= foreground <= 1:
            raise RequestError(f"sampler.foreground is {foreground}; accepted: 0 (anywhere) to 1 (always through foreground)")
        if partitions < 0 or (partitions and slices is not None):
            raise RequestError(
                f"sampler.partitions is {partitions}; accepted: 0, or the number of parts for views of single slices"
            )
        if axis not in ("auto", 0, 1, 2):
            raise RequestError(f"sampler.axis is {axis!r}; accepted: auto, 0, 1 or 2")
        self.source, self.ids, self.record, self.slices, self.batch = source, list(ids), record, slices, batch
        self.cover, self.foreground, self.partitions, self.axis = (float(low), float(high)), foreground, partitions, axis

    def draw(self, key: DrawKey) -> PlaneDraw:
        """Draw one item and its planes; a pure function of the key."""
        item = self.ids[item_at(key, self.source, self.batch, len(self.ids))]
        record = self.record(item)
        axis = slice_axis(record, self.axis)
        if axis is None:
            return PlaneDraw(item, (0,), None)
        rng = counter_rng(key.seed, key.step, key.position, self.source, "planes")
        count = record.shape[axis]
        if self.slices is not None:
            share = rng.uniform(*self.cover)
            return PlaneDraw(item, spread(count, self.slices, share, rng.random()), axis)
        if self.partitions:
            places = partition_planes(count, self.partitions, key.position % self.partitions)
            return PlaneDraw(item, (int(places[rng.integers(len(places))]),), axis)
        through = rng.random() < self.foreground and len(record.foreground) > 0 and record.kind == "volume"
        place = int(record.foreground[rng.integers(len(record.foreground))][axis]) if through else int(rng.integers(count))
        return PlaneDraw(item, (place,), axis)


def partition_planes(count: int, partitions: int, part: int) -> np.ndarray:
    """Return the planes of one of S equal parts of a volume; where no plane lies in it, the nearest one.

    Plane k lies k / (count - 1) along its volume (`shares`), a single plane half-way; part p is the range from p / S to (p + 1) / S. This is
    what an objective sees in `<view>_share`, so that both sides agree on every plane.

    Args:
        count: Planes of the volume.
        partitions: S.
        part: p, 0 to S - 1.
    """
    doubled, last = (np.array([1]), 2) if count == 1 else (2 * np.arange(count), 2 * (count - 1))
    own = np.minimum(doubled * partitions // last, partitions - 1)
    if (own == part).any():
        return np.flatnonzero(own == part)
    away = np.abs(2 * doubled * partitions - (2 * part + 1) * last)  # from the middle of the part, in whole numbers
    return np.flatnonzero(away == away.min())[:1]


class MiddlePlanes:
    """The middle plane of each item, or planes spread over all of it, for monitors and probes: item number `position`.

    Args:
        source: Name of the source.
        ids: Ids, ascending.
        record: See `PlaneSampler`.
        slices: See `PlaneSampler`.
        axis: See `PlaneSampler`.
    """

    def __init__(
        self, source: str, ids: Sequence[int], record: Callable[[int], Any], slices: int | None, axis: int | str = "auto"
    ) -> None:
        self.source, self.ids, self.record, self.slices, self.axis = source, list(ids), record, slices, axis

    def draw(self, key: DrawKey) -> PlaneDraw:
        """Return the planes of item number `key.position`."""
        item = self.ids[key.position]
        record = self.record(item)
        axis = slice_axis(record, self.axis)
        if axis is None:
            return PlaneDraw(item, (0,), None)
        return PlaneDraw(item, spread(record.shape[axis], self.slices or 1, 1.0, 0.5), axis)


def slice_axis(record: Any, axis: int | str = "auto") -> int | None:
    """Return the array axis that planes are counted along; None for a picture, 0 (time) for a clip."""
    if record.kind == "image":
        return None
    if record.kind == "clip":
        return 0
    if axis != "auto":
        return int(axis)
    if record.slice_axis is not None:
        return int(record.slice_axis)
    coarsest = int(np.argmax(record.voxel_mm))
    return coarsest if record.voxel_mm[coarsest] > 1.01 * min(record.voxel_mm) else 2


def spread(count: int, most: int, share: float, start: float) -> tuple[int, ...]:
    """Return at most `most` different plane indices, evenly spread over a share of `count` planes.

    Args:
        count: Planes of the item.
        most: Planes wanted.
        share: Share of the item to cover, 0 to 1; at least `min(most, count)` planes are covered.
        start: Where the covered part begins, 0 (at the first possible plane) to 1 (at the last possible one).
    """
    covered = min(count, max(round(count * share), min(most, count)))
    first = round((count - covered) * start)
    if covered <= most:
        return tuple(range(first, first + covered))
    return tuple(first + int((k + 0.5) * covered / most) for k in range(most))


def display(planes: np.ndarray, axis: int) -> np.ndarray:
    """Turn slices of a RAS+ volume as a radiologist looks at them.

    Args:
        planes: (..., A, B): the two array axes that remain of X, Y, Z, in this order.
        axis: The slice axis, 0, 1 or 2.

    Returns:
        (..., H, W). Axial: rows from anterior to posterior, columns from the patient's right to left. Coronal: from superior to
        inferior, from right to left. Sagittal: from superior to inferior, from anterior to posterior.
    """
    return np.swapaxes(planes, -1, -2)[..., ::-1, ::-1]


class PlaneViewMaker(Protocol):
    """What a source needs of `views.planes.PlaneViews`."""

    name: str
    slices: int | None

    def batch(
        self, items: Sequence[Any], device: torch.device | str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return data, and valid and spacing_mm by view."""
        ...


class Sampler(Protocol):
    """Anything with a pure `draw` of planes."""

    def draw(self, key: DrawKey) -> PlaneDraw:
        """Return which planes a key means."""
        ...


class PlaneSource(StoreSource):
    """Items seen as pictures or stacks: the sampler draws planes, the items are `views.planes.Planes`."""

    view_maker: PlaneViewMaker

    def read(self, key: DrawKey) -> list[Any]:
        """Read the planes that are drawn."""
        draw: PlaneDraw = self.sampler.draw(key)
        series_id = self.series[draw.id]
        record = self.reader.record(series_id)
        image, valid = read_planes(self.reader, series_id, draw)
        planes = self.item(
            image=image,
            valid=valid,
            pixel_mm=pixel_mm(record, draw.axis),
            depth=depths(record, draw, stack=self.view_maker.slices is not None),
            share=shares(record, draw),
            stats=record.stats,
            key=key,
            id=draw.id,
        )
        return [planes]

    def views(self, fetched: list[Any], device: torch.device) -> Views:
        """Make views on the device."""
        return self.bundle(fetched, *self.view_maker.batch(fetched, device))


def read_planes(reader: StoreReader, series_id: str, draw: PlaneDraw) -> tuple[np.ndarray, np.ndarray]:
    """Read the planes of a draw.

    Returns:
        (N, C, H, W) in the stored dtype and (N, H, W) bool, slices turned by `display`.
    """
    record = reader.record(series_id)
    if draw.axis is None:
        image, valid = reader.read_box(series_id, (0, 0), record.shape)
        return image[None], valid[None]
    if record.kind == "clip":
        image, valid = reader.read_frames(series_id, draw.planes)
        return image, np.broadcast_to(valid, (len(image), *valid.shape))
    images, masks = [], []
    for run in _slabs(draw.planes):
        start, size = [0, 0, 0], list(record.shape)
        start[draw.axis], size[draw.axis] = run[0], run[-1] + 1 - run[0]
        image, valid = reader.read_box(series_id, start, size)
        chosen = [place - run[0] for place in run]
        images.append(np.moveaxis(image, draw.axis + 1, 0)[chosen])
        masks.append(np.moveaxis(valid, draw.axis, 0)[chosen])
    image, valid = np.concatenate(images), np.concatenate(masks)
    return np.ascontiguousarray(display(image, draw.axis)), np.ascontiguousarray(display(valid, draw.axis))


def _slabs(planes: Sequence[int]) -> list[list[int]]:
    """Group ascending indices by the slab of the store they lie in, so that no slab is decoded twice or without need."""
    groups: dict[int, list[int]] = {}
    for place in planes:
        groups.setdefault(place // SLAB, []).append(place)
    return list(groups.values())


def pixel_mm(record: Any, axis: int | None) -> tuple[float, float] | None:
    """Return the step between rows and between columns of a displayed plane, None where the item does not know."""
    if record.spacing_mm is None:
        return None
    if record.kind != "volume" or axis is None:
        rows, columns = record.spacing_mm
        return float(rows), float(columns)
    columns, rows = (record.spacing_mm[a] for a in range(3) if a != axis)
    return float(rows), float(columns)


def depths(record: Any, draw: PlaneDraw, *, stack: bool) -> np.ndarray:
    """Return the place of each plane: mm from the first slice, ms from the first frame; 0 for a picture.

    Raises:
        RequestError: A stack of frames whose times nobody knows.
    """
    if draw.axis is None:
        return np.zeros(1)
    if record.kind == "clip":
        if record.frame_times_ms is None:
            if not stack:
                return np.zeros(len(draw.planes))
            raise RequestError(
                f"series {record.series_id} has no frame times, and a stack needs them; leave it out of the query (frame_time_ms is not null)"
            )
        return np.asarray(record.frame_times_ms, dtype=np.float64)[list(draw.planes)]
    return np.asarray(draw.planes, dtype=np.float64) * float(record.voxel_mm[draw.axis])


def shares(record: Any, draw: PlaneDraw) -> np.ndarray:
    """Return how far along its stack each plane lies, 0 to 1; NaN for a picture, 0.5 where there is one plane."""
    if draw.axis is None:
        return np.full(1, np.nan)
    last = record.shape[draw.axis] - 1
    return np.full(len(draw.planes), 0.5) if last == 0 else np.asarray(draw.planes, dtype=np.float64) / last
