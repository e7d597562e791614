"""Scores of tiles as a picture: painted where their tiles lie, overlaps averaged, blended over the slide, blank outside tissue.

The picture is made for eyes; the raw scores and the painted map are saved beside it, because colours cannot be read back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.slides.grid import TileGrid
from medssl.domains.slides.slide import Slide
from medssl.domains.slides.tissue import TissueMask
from medssl.errors import RequestError
from medssl.weights import write_atomic

VIS_MPP = 8.0
SCALES = ("rank", "softmax", "signed", "raw")
SOFTMAX_CLIP = 0.99


@dataclass(frozen=True)
class Heatmap:
    """A painted map.

    Args:
        values: (H, W) float32, mean of the scaled scores of the tiles that cover a pixel; NaN where none does.
        scaled: (N,) float32 scores from 0 to 1.
        picture: (H, W, 3) uint8, blended over the slide.
        scale: Level-0 pixels per map pixel along x and y.
    """

    values: np.ndarray
    scaled: np.ndarray
    picture: np.ndarray
    scale: tuple[float, float]


def scale_scores(scores: np.ndarray, scale: str = "rank", branch: int | None = None) -> np.ndarray:
    """Map scores to [0, 1].

    Args:
        scores: (N,), or (N, K) with one column per class or time interval.
        scale: `rank`: percentile rank, ties sharing their mean (raw attention looks cold); `softmax`: softmax over tiles, divided
            by its 99th percentile and clipped; `signed`: 0.5 + score / (2 max |score|), for risk that rises or falls (survival
            attribution); `raw`: as they are, and they must lie in [0, 1].
        branch: Column of (N, K).

    Raises:
        RequestError: Another scale, a missing branch, or scores that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim == 2:
        if branch is None or not 0 <= branch < scores.shape[1]:
            raise RequestError(f"scores have {scores.shape[1]} branches; name one with branch=0 to {scores.shape[1] - 1}")
        scores = scores[:, branch]
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise RequestError(f"scores of shape {scores.shape}, finite: {bool(np.isfinite(scores).all())}; one finite score per tile")
    if not len(scores):
        return np.zeros(0, dtype=np.float32)
    if scale == "rank":
        from scipy.stats import rankdata

        value = (rankdata(scores) - 1) / max(1, len(scores) - 1)
    elif scale == "softmax":
        value = np.exp(scores - scores.max())
        value = np.minimum(value / max(float(np.quantile(value, SOFTMAX_CLIP)), np.finfo(np.float64).tiny), 1.0)
    elif scale == "signed":
        value = 0.5 + scores / (2 * max(float(np.abs(scores).max()), np.finfo(np.float64).tiny))
    elif scale == "raw" and scores.min() >= 0 and scores.max() <= 1:
        value = scores
    else:
        raise RequestError(
            f"scale {scale!r} of scores from {scores.min():g} to {scores.max():g}; known: {', '.join(SCALES)} (of 0..1)"
        )
    return np.asarray(value, dtype=np.float32)


def paint(grid: TileGrid, scaled: np.ndarray, shape: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    """Return (H, W) float32: mean over the tiles that cover a pixel's centre, NaN where there is none.

    Args:
        grid: The grid.
        scaled: (N,).
        shape: (H, W) of the map.
        scale: Level-0 pixels per map pixel along x and y.
    """
    total = np.zeros(shape)
    count = np.zeros(shape, dtype=np.int32)
    low = np.ceil(grid.coords / scale - 0.5).astype(np.int64)
    high = np.ceil((grid.coords + np.array(grid.field0)) / scale - 0.5).astype(np.int64)
    high = np.maximum(high, low + 1)  # a tile smaller than a map pixel still shows
    for (x0, y0), (x1, y1), value in zip(np.maximum(low, 0), high, scaled):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def make_heatmap(
    slide: Slide,
    grid: TileGrid,
    scores: np.ndarray,
    *,
    vis_mpp: float = VIS_MPP,
    scale: str = "rank",
    branch: int | None = None,
    alpha: float = 0.4,
    tissue: TissueMask | None = None,
) -> Heatmap:
    """Paint scores over a slide.

    Args:
        slide: The slide.
        grid: The grid that the scores belong to.
        scores: (N,) or (N, K).
        vis_mpp: Scale of the picture.
        scale: See `scale_scores`.
        branch: Column of (N, K).
        alpha: Weight of the colours, 0 to 1.
        tissue: Nothing is painted outside it.

    Raises:
        RequestError: Scores that do not fit the grid.
    """
    from matplotlib import colormaps

    scaled = scale_scores(scores, scale, branch)
    if len(scaled) != len(grid):
        raise RequestError(f"{len(scaled)} scores for {len(grid)} tiles; one each, in the order of the grid")
    background = slide.overview(vis_mpp)
    factor = slide.scale(vis_mpp)
    values = paint(grid, scaled, background.shape[:2], factor)
    if tissue is not None:
        values[~_resized(tissue, values.shape, factor)] = np.nan
    colours = colormaps["coolwarm" if scale == "signed" else "jet"](np.nan_to_num(values))[..., :3] * 255
    seen = np.isfinite(values)
    picture = background.copy()
    picture[seen] = np.rint((1 - alpha) * background[seen] + alpha * colours[seen]).astype(np.uint8)
    return Heatmap(values, scaled, picture, factor)


def _resized(tissue: TissueMask, shape: tuple[int, ...], scale: tuple[float, float]) -> np.ndarray:
    """Return a mask at the scale of the map: each map pixel takes the mask pixel under its centre."""
    rows = np.minimum(((np.arange(shape[0]) + 0.5) * scale[1] / tissue.scale[1]).astype(int), tissue.mask.shape[0] - 1)
    columns = np.minimum(((np.arange(shape[1]) + 0.5) * scale[0] / tissue.scale[0]).astype(int), tissue.mask.shape[1] - 1)
    return tissue.mask[np.ix_(rows, columns)]


def top_tiles(grid: TileGrid, scaled: np.ndarray, k: int = 10) -> dict[str, Any]:
    """Return the k highest tiles as GeoJSON squares in level-0 pixels, the highest first."""
    width, height = grid.field0
    features = []
    for rank, index in enumerate(np.argsort(-scaled, kind="stable")[:k], start=1):
        x, y = (float(value) for value in grid.coords[index])
        ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[[round(a, 2), round(b, 2)] for a, b in ring]]},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": "Top tile", "color": [200, 0, 0]},
                    "rank": rank,
                    "tile": int(index),
                    "score": round(float(scaled[index]), 6),
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def save_heatmap(heatmap: Heatmap, grid: TileGrid, scores: np.ndarray, folder: Path, *, k: int = 10) -> list[Path]:
    """Write `heatmap.png`, `heatmap.npz` (scores, scaled, values, coords, scale) and `top_tiles.geojson`.

    The picture shows a patient's tissue: keep it private.
    """
    from PIL import Image

    picture, arrays = BytesIO(), BytesIO()
    Image.fromarray(heatmap.picture).save(picture, format="PNG")
    np.savez_compressed(
        arrays,
        scores=np.asarray(scores),
        scaled=heatmap.scaled,
        values=heatmap.values,
        coords=grid.coords,
        scale=np.array(heatmap.scale),
    )
    files = {
        "heatmap.png": picture.getvalue(),
        "heatmap.npz": arrays.getvalue(),
        "top_tiles.geojson": json.dumps(top_tiles(grid, heatmap.scaled, k)).encode(),
    }
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]
