"""Where tiles lie: a regular grid at an exact scale, kept where there is tissue."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medssl.domains.slides.slide import Slide
from medssl.domains.slides.tissue import TissueMask
from medssl.errors import RequestError

EDGES = ("drop", "pad")
MIN_TISSUE = 0.25
ROUNDING = 0.5
"""Level-0 pixels by which a full tile may reach beyond the slide, because its corner is rounded to a whole pixel."""


@dataclass(frozen=True)
class TileGrid:
    """Tiles of one slide, row by row.

    Args:
        coords: (N, 2) int64, left and upper edge in level-0 pixels.
        tissue: (N,) float32, share of each tile's field that is tissue; 1 without a mask.
        tile_px: Edge of a tile in pixels at `mpp`.
        overlap_px: Pixels at `mpp` that neighbours share.
        mpp: Micrometres per pixel of tiles.
        mpp0: Of level 0, along x and y.
        size0: (W, H) of level 0.
        edge: `drop` leaves tiles out that reach beyond the slide, `pad` fills them with white.
        min_tissue: What `tissue` had to reach.
        tissue_params: Method and parameters that found tissue.
    """

    coords: np.ndarray
    tissue: np.ndarray
    tile_px: int
    overlap_px: int
    mpp: float
    mpp0: tuple[float, float]
    size0: tuple[int, int]
    edge: str = "drop"
    min_tissue: float = 0.0
    tissue_params: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def field0(self) -> tuple[float, float]:
        """Edge lengths of a tile in level-0 pixels: floats."""
        return self.tile_px * self.mpp / self.mpp0[0], self.tile_px * self.mpp / self.mpp0[1]


def make_grid(
    slide: Slide,
    *,
    mpp: float,
    tile_px: int = 256,
    overlap_px: int = 0,
    tissue: TissueMask | None = None,
    min_tissue: float = MIN_TISSUE,
    edge: str = "drop",
) -> TileGrid:
    """Lay a grid over a slide.

    Args:
        slide: The slide.
        mpp: Micrometres per pixel of tiles.
        tile_px: Edge of a tile in pixels.
        overlap_px: Pixels shared by neighbours, less than `tile_px`.
        tissue: Where tissue is; None keeps every tile.
        min_tissue: Smallest tissue share of a tile; 0 keeps whatever tissue touches.
        edge: `drop` or `pad`.

    Raises:
        RequestError: Numbers out of range.
    """
    if tile_px < 1 or not 0 <= overlap_px < tile_px or not 0 <= min_tissue <= 1 or edge not in EDGES or not mpp > 0:
        raise RequestError(
            f"grid: tile_px {tile_px}, overlap_px {overlap_px}, min_tissue {min_tissue}, edge {edge!r}, mpp {mpp}; tiles of at least "
            f"one pixel, an overlap below that, a share from 0 to 1, an edge of {' or '.join(EDGES)} and mpp above 0 are accepted"
        )
    info, scale = slide.info, slide.scale(mpp)
    span = [tile_px * s for s in scale]
    columns = positions(info.width, span[0], (tile_px - overlap_px) * scale[0], edge)
    rows = positions(info.height, span[1], (tile_px - overlap_px) * scale[1], edge)
    coords = np.stack([np.tile(columns, len(rows)), np.repeat(rows, len(columns))], axis=1).astype(np.int64)
    if tissue is None:
        share = np.ones(len(coords), dtype=np.float32)
    else:
        share = tissue_share(tissue, coords, (span[0], span[1]))
        keep = share > 0 if min_tissue == 0 else share >= min_tissue
        coords, share = coords[keep], share[keep]
    return TileGrid(
        coords=coords,
        tissue=share,
        tile_px=tile_px,
        overlap_px=overlap_px,
        mpp=mpp,
        mpp0=(info.mpp_x, info.mpp_y),
        size0=(info.width, info.height),
        edge=edge,
        min_tissue=min_tissue if tissue is not None else 0.0,
        tissue_params={"used": "none"} if tissue is None else tissue.describe(),
    )


def positions(length: int, span: float, step: float, edge: str) -> np.ndarray:
    """Return where tiles start along one axis.

    The step stays a float and each place is rounded on its own (halves up), so that no error grows along the slide.

    Args:
        length: Of the axis, in level-0 pixels.
        span: Edge of a tile's field.
        step: Distance between tiles.
        edge: `drop` or `pad`.
    """
    if edge == "pad":
        count = 1 + max(0, math.ceil((length - span - ROUNDING) / step))
    else:
        count = max(0, math.floor((length + ROUNDING - span) / step) + 1)
    places: np.ndarray = np.floor(np.arange(count) * step + 0.5)
    return places.astype(np.int64)


def tissue_share(tissue: TissueMask, coords: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Return the share of each tile's field that is tissue, exactly: mask pixels count by the area that lies inside.

    Args:
        tissue: The mask; outside it there is none.
        coords: (N, 2) level-0 pixels.
        span: Edges of the field in level-0 pixels.

    Returns:
        (N,) float32.
    """
    total = np.zeros((tissue.mask.shape[0] + 1, tissue.mask.shape[1] + 1))
    total[1:, 1:] = tissue.mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    x0, y0 = coords[:, 0] / tissue.scale[0], coords[:, 1] / tissue.scale[1]
    x1, y1 = (coords[:, 0] + span[0]) / tissue.scale[0], (coords[:, 1] + span[1]) / tissue.scale[1]

    def upto(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Tissue above and left of a point: between grid points the sum is bilinear, because a pixel is constant."""
        y = np.clip(y, 0, tissue.mask.shape[0])
        x = np.clip(x, 0, tissue.mask.shape[1])
        i = np.minimum(y.astype(np.int64), tissue.mask.shape[0] - 1)
        j = np.minimum(x.astype(np.int64), tissue.mask.shape[1] - 1)
        v, u = y - i, x - j
        upper = total[i, j] * (1 - u) + total[i, j + 1] * u
        lower = total[i + 1, j] * (1 - u) + total[i + 1, j + 1] * u
        value: np.ndarray = upper * (1 - v) + lower * v
        return value

    inside = upto(y1, x1) - upto(y0, x1) - upto(y1, x0) + upto(y0, x0)
    share: np.ndarray = inside / ((x1 - x0) * (y1 - y0))
    # Cancellation of large sums leaves 1e-12 where there is nothing, and "any touch" asks for more than zero.
    share = np.where(share < 1e-7, 0.0, np.minimum(share, 1.0))
    return share.astype(np.float32)
