"""A source: items in a store, a sampler, and the views made of what it draws."""

from __future__ import annotations

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


class ImageSource:
    """Items of one domain in one store.

    Args:
        name: Name of the source in the recipe.
        domain: Domain name.
        reader: The store.
        series: id -> series_id.
        sampler: Draws ids and boxes.
        views: Makes views.
        crop: The dataclass of a fetched crop, `views.pipeline.Crop`.
        weight: Relative frequency of steps that use this source.
    """

    def __init__(
        self,
        name: str,
        domain: str,
        reader: StoreReader,
        series: Mapping[int, str],
        sampler: Sampler,
        views: ViewMaker,
        *,
        crop: Callable[..., Any],
        weight: float = 1.0,
    ) -> None:
        self.name = name
        self.domain = domain
        self.reader = reader
        self.series = series
        self.sampler = sampler
        self.view_maker = views
        self.crop = crop
        self.weight = weight

    def __len__(self) -> int:
        return len(self.series)

    def fetch(self, keys: list[DrawKey]) -> list[Any]:
        """Draw and read the crops of a micro-batch; runs in any thread and touches no device."""
        crops = []
        for key in keys:
            draw = self.sampler.draw(key)
            crops += [
                read_crop(self.reader, self.series[item], self.view_maker.margin_mm, box, crop=self.crop, key=key, id=item)
                for item, box in zip(draw.ids, draw.boxes)
            ]
        return crops

    def views(self, fetched: list[Any], device: torch.device) -> Views:
        """Make views on the device."""
        data, valid, spacing, positions = self.view_maker.batch(fetched, device)
        meta = ViewsMeta(
            source=self.name,
            domain=self.domain,
            ids=torch.tensor([crop.id for crop in fetched], dtype=torch.int64),
            spacing_mm={self.view_maker.name: spacing},
            positions_mm={self.view_maker.name: positions},
            valid={self.view_maker.name: valid},
            keys=tuple(crop.key for crop in fetched),
        )
        return Views(data=data, meta=meta)
