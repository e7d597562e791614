"""Tiles of a grid, one by one or through a `DataLoader`: the same pixels in the same order with any number of workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.domains.slides.grid import TileGrid
from medssl.domains.slides.slide import Slide
from medssl.errors import ImageError

MAX_BAD_SHARE = 0.01
"""A slide of which more tiles cannot be decoded has failed."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """One tile.

    Args:
        index: Row of the grid.
        image: (3, H, W) uint8; white where it could not be decoded. May be a view.
        coords: (x, y) in level-0 pixels.
        ok: False when it could not be decoded.
        native: Whether pixels are the file's own, without resampling.
    """

    index: int
    image: np.ndarray
    coords: tuple[int, int]
    ok: bool
    native: bool


class Tiles:
    """The tiles of one slide: a map-style data set for `torch.utils.data.DataLoader`, and an iterable. Picklable.

    Args:
        slide: The slide.
        grid: Where tiles lie.
    """

    def __init__(self, slide: Slide, grid: TileGrid) -> None:
        self.slide, self.grid = slide, grid

    def __len__(self) -> int:
        return len(self.grid)

    def tile(self, index: int) -> Tile:
        """Read one tile; a region that cannot be decoded, even after opening the slide again, becomes white with `ok` False."""
        n = self.grid.tile_px
        x, y = (int(value) for value in self.grid.coords[index])
        try:
            region = self.slide.read(x, y, (n, n), self.grid.mpp)
        except ImageError as err:
            if err.reason != "unreadable":
                raise
            logger.warning("%s: tile %d cannot be decoded; it is white", self.slide.name, index)
            return Tile(index, np.full((3, n, n), 255, dtype=np.uint8), (x, y), ok=False, native=False)
        return Tile(index, region.image.transpose(2, 0, 1), (x, y), ok=True, native=region.native)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a tile as what `default_collate` takes: image (3, H, W), coords (2,), index, ok."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        tile = self.tile(index)
        # A decoded region may be read-only memory of Pillow, which torch must not be given.
        image = np.array(tile.image, order="C")
        return {"image": image, "coords": self.grid.coords[index], "index": index, "ok": tile.ok}

    def __iter__(self) -> Iterator[Tile]:
        """Read all tiles in order.

        Raises:
            ImageError: More than `MAX_BAD_SHARE` of them cannot be decoded.
        """
        count = BadTiles(self.slide.name, len(self))
        for index in range(len(self)):
            tile = self.tile(index)
            count.add(0 if tile.ok else 1)
            yield tile


class BadTiles:
    """Counts tiles that could not be decoded, and fails a slide that has too many.

    Args:
        name: How to call the slide.
        total: Its tiles.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.bad = name, total, 0

    def add(self, bad: int) -> None:
        """Count.

        Raises:
            ImageError: Too many.
        """
        self.bad += bad
        if self.bad > MAX_BAD_SHARE * self.total:
            raise ImageError(
                "unreadable",
                f"{self.name}: {self.bad} of {self.total} tiles cannot be decoded; at most {MAX_BAD_SHARE:.0%} are accepted; copy the "
                "slide again from its source",
            )


def tile_loader(tiles: Tiles, *, batch: int = 64, workers: int = 0, context: str | None = None) -> Any:
    """Return a `torch.utils.data.DataLoader` over tiles in order.

    Args:
        tiles: The tiles.
        batch: Tiles per batch.
        workers: Worker processes.
        context: `fork`, `spawn` or `forkserver`; None takes the platform's own.
    """
    from torch.utils.data import DataLoader, Dataset

    data: Dataset[dict[str, Any]] = tiles  # type: ignore[assignment]
    return DataLoader(
        data, batch_size=batch, shuffle=False, num_workers=workers, multiprocessing_context=context if workers else None
    )
