"""A source: items in a store, a sampler, and the views made of what it draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl.store.reader import StoreReader
from medssl.types import Box, Draw, DrawKey, Views, ViewsMeta


class Sampler(Protocol):
    """Anything with a pure `draw`."""

    def draw(self, key: DrawKey) -> Draw:
        """Return which items and which boxes a key means."""
        ...


class ViewMaker(Protocol):
    """What a source needs of `views.pipeline.VolumeViews`; named here because `views` and `sampling` do not import each other."""

    name: str

    def margin_mm(self, spacing_mm: Sequence[float], key: DrawKey | None = None) -> Sequence[float]:
        """Extra mm on each side that the reader must fetch for the views of a key."""
        ...

    def batch(self, crops: Sequence[Any], device: torch.device | str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Return data by key, and valid, spacing_mm and positions_mm of the views."""
        ...


def voxel_box(box: Box, margin_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (start, size) in voxels of the smallest voxel box that covers a box and its margin.

    A thousandth of a voxel is forgiven, so that a box aligned to voxels does not fetch one more on each side.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    low = (np.asarray(box.start_mm) - np.asarray(margin_mm)) / spacing
    high = (np.asarray(box.start_mm) + np.asarray(box.size_mm) + np.asarray(margin_mm)) / spacing
    start = np.floor(low + 1e-3).astype(int)
    stop = np.ceil(high - 1e-3).astype(int)
    return tuple(int(v) for v in start), tuple(int(v) for v in stop - start)


def read_crop(
    reader: StoreReader,
    series_id: str,
    margin_mm: Callable[[Sequence[float], DrawKey], Sequence[float]],
    box: Box,
    *,
    crop: Callable[..., Any],
    key: DrawKey,
    id: int,
) -> Any:
    """Read the voxels that a box and the margin of its views cover.

    Args:
        reader: The store.
        series_id: Series.
        margin_mm: (spacing in mm, key) -> extra mm on each side.
        box: What was drawn, mm from the first voxel's outer corner.
        crop: The dataclass of a fetched crop, `views.pipeline.Crop`.
        key: The draw's key.
        id: Item.
    """
    record = reader.record(series_id)
    spacing = record.voxel_mm
    start, size = voxel_box(box, margin_mm(spacing, key), spacing)
    image, valid = reader.read_box(series_id, start, size)
    origin = tuple(float(s * d) for s, d in zip(start, spacing))
    return crop(
        image=image, valid=valid, spacing_mm=tuple(spacing), origin_mm=origin, box=box, stats=record.stats, key=key, id=id
    )  # fmt: skip


class StoreSource(ABC):
    """Items of one domain in one store: what every kind of source shares.

    A kind adds `read(key)`, what the sampler draws for a key as a list of fetched items with `id` and `key`, and `views(fetched, device)`.

    Args:
        name: Name of the source in the recipe.
        domain: Domain name.
        reader: The store.
        series: id -> series_id.
        sampler: Draws ids and places.
        views: Makes views.
        item: The dataclass of a fetched item, from the module of the views.
        weight: Relative frequency of steps that use this source.
    """

    def __init__(
        self,
        name: str,
        domain: str,
        reader: StoreReader,
        series: Mapping[int, str],
        sampler: Any,
        views: Any,
        *,
        item: Callable[..., Any],
        weight: float = 1.0,
    ) -> None:
        self.name, self.domain, self.reader, self.series = name, domain, reader, series
        self.sampler, self.view_maker, self.item, self.weight = sampler, views, item, weight

    def __len__(self) -> int:
        return len(self.series)

    @abstractmethod
    def read(self, key: DrawKey) -> list[Any]:
        """Draw and read what a key means."""

    def fetch(self, keys: list[DrawKey]) -> list[Any]:
        """Draw and read a micro-batch; runs in any thread and touches no device."""
        return [item for key in keys for item in self.read(key)]

    def bundle(
        self,
        fetched: Sequence[Any],
        data: dict[str, Tensor],
        valid: dict[str, Tensor],
        spacing_mm: dict[str, Tensor],
        positions_mm: dict[str, Tensor] | None = None,
    ) -> Views:
        """Return views with what is known about their items."""
        meta = ViewsMeta(
            source=self.name,
            domain=self.domain,
            ids=torch.tensor([item.id for item in fetched], dtype=torch.int64),
            spacing_mm=spacing_mm,
            positions_mm=positions_mm or {},
            valid=valid,
            keys=tuple(item.key for item in fetched),
        )
        return Views(data=data, meta=meta)


class ImageSource(StoreSource):
    """Crops of volumes and images: the sampler draws boxes, the items are `views.pipeline.Crop`."""

    sampler: Sampler
    view_maker: ViewMaker

    def read(self, key: DrawKey) -> list[Any]:
        """Read the boxes that are drawn."""
        draw = self.sampler.draw(key)
        return [
            read_crop(self.reader, self.series[item], self.view_maker.margin_mm, box, crop=self.item, key=key, id=item)
            for item, box in zip(draw.ids, draw.boxes)
        ]

    def views(self, fetched: list[Any], device: torch.device) -> Views:
        """Make views on the device."""
        name = self.view_maker.name
        data, valid, spacing, positions = self.view_maker.batch(fetched, device)
        return self.bundle(fetched, data, {name: valid}, {name: spacing}, {name: positions})
