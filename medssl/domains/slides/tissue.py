"""Where tissue is: a mask at a coarse scale, its polygons in level-0 pixels, and back.

Two methods. `hsv`: saturation above a threshold, as CLAM does it, with CLAM's presets. `otsu`: grey level below Otsu's threshold. What
finds nothing falls back: a lower saturation threshold, then Otsu; what is left without tissue has the status `empty_tissue` and
is no error. `none` takes the whole slide, for regions of interest without background.

References: Lu et al., Nature Biomedical Engineering 2021 (CLAM), the parameters of its presets; Otsu, IEEE Trans. SMC 1979.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.slides.slide import Slide
from medssl.errors import RequestError
from medssl.weights import write_atomic

MASK_MPP = 8.0
AREA_TILE = 512
"""Areas are counted in squares of so many level-0 pixels, as in CLAM's presets."""
MIN_CONTRAST = 10.0
"""Grey levels between the means of Otsu's two classes; glass without tissue has noise of two or three."""
SMALL_SHARE = 0.02
"""Limits of area are at most this share of the picture: a preset made for whole slides must not empty a small region."""
BORDER = 0.05
"""White border around the picture before Otsu, as a share of its edges: a tile full of tissue has no background of its own."""
HSV_METHODS = ("hsv", "otsu", "none")


@dataclass(frozen=True)
class TissueParams:
    """How tissue is found.

    Args:
        method: `hsv`, `otsu` or `none`.
        mpp: Scale of the mask.
        saturation: Threshold on saturation, 0 to 255 (`hsv`).
        median: Edge of the median filter on saturation, in mask pixels (`hsv`).
        close: Edge of the square that closes gaps, in mask pixels (`hsv`).
        close_um: Radius of the disc that dilates the mask (`otsu`), in micrometres.
        min_area: Smallest piece of tissue, in `AREA_TILE` squares of level 0.
        min_hole: Smallest hole that stays a hole, in the same unit.
        max_holes: Holes kept in one piece, the largest.
    """

    method: str = "hsv"
    mpp: float = MASK_MPP
    saturation: float = 8.0
    median: int = 7
    close: int = 4
    close_um: float = 8.0
    min_area: float = 16.0
    min_hole: float = 4.0
    max_holes: int = 8

    def __post_init__(self) -> None:
        if self.method not in HSV_METHODS:
            raise RequestError(f"tissue method {self.method!r}; known: {', '.join(HSV_METHODS)}")


PRESETS: dict[str, TissueParams] = {
    "tcga": TissueParams(saturation=8, median=7, close=4, min_area=16, min_hole=4),
    "biopsy": TissueParams(saturation=15, median=11, close=2, min_area=1, min_hole=1, max_holes=2),
    "resection": TissueParams(saturation=15, median=11, close=4, min_area=100, min_hole=16),
    "otsu": TissueParams(method="otsu", min_area=1, min_hole=1),
    "none": TissueParams(method="none"),
}


@dataclass(frozen=True)
class TissueMask:
    """Tissue of one slide.

    Args:
        mask: (H, W) bool, True = tissue. Pixel (0, 0) starts at level-0 (0, 0).
        scale: Level-0 pixels per mask pixel along x and y.
        params: What found it.
        used: `hsv`, `hsv_lower`, `otsu`, `none`, `user`, or `empty`.
    """

    mask: np.ndarray
    scale: tuple[float, float]
    params: TissueParams
    used: str

    @property
    def status(self) -> str:
        """`ok` or `empty_tissue`."""
        return "ok" if self.mask.any() else "empty_tissue"

    @property
    def share(self) -> float:
        """Tissue share of the mask."""
        return float(self.mask.mean())

    def describe(self) -> dict[str, Any]:
        """Return method and parameters as JSON-able values."""
        return {"used": self.used, **asdict(self.params)}


def tissue_params(tissue: TissueParams | Mapping[str, Any] | str) -> TissueParams:
    """Return parameters from a preset's name, or from a mapping with an optional key `preset`.

    Raises:
        RequestError: An unknown preset or key.
    """
    if isinstance(tissue, TissueParams):
        return tissue
    values = {"preset": tissue} if isinstance(tissue, str) else dict(tissue)
    name = values.pop("preset", "tcga")
    if name not in PRESETS:
        raise RequestError(f"tissue preset {name!r}; known: {', '.join(PRESETS)}")
    try:
        return replace(PRESETS[name], **values)
    except TypeError as err:
        known = ", ".join(asdict(PRESETS["tcga"]))
        raise RequestError(f"tissue: unknown key among {', '.join(sorted(values))}; known: preset, {known}") from err


def saturation_of(image: np.ndarray) -> np.ndarray:
    """Return saturation (..., ) uint8, 255 (max - min) / max, of (..., 3) uint8; black has none."""
    high = image.max(axis=-1).astype(np.int32)
    low = image.min(axis=-1).astype(np.int32)
    value: np.ndarray = (255 * (high - low) + high // 2) // np.maximum(high, 1)
    return value.astype(np.uint8)


def grey_of(image: np.ndarray) -> np.ndarray:
    """Return ITU-R BT.601 luma (...) uint8 of (..., 3) uint8."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    value: np.ndarray = np.rint(image.astype(np.float32) @ weights)
    return value.astype(np.uint8)


def find_tissue(slide: Slide, tissue: TissueParams | Mapping[str, Any] | str = "tcga") -> TissueMask:
    """Find tissue on a slide.

    Args:
        slide: The slide.
        tissue: Preset, mapping or parameters.
    """
    params = tissue_params(tissue)
    scale = slide.scale(params.mpp)
    if params.method == "none":
        width, height = slide.info.width, slide.info.height
        return TissueMask(np.ones((int(-(-height // scale[1])), int(-(-width // scale[0]))), dtype=bool), scale, params, "none")
    return tissue_of(slide.overview(params.mpp), scale, params)


def tissue_of(image: np.ndarray, scale: tuple[float, float], params: TissueParams) -> TissueMask:
    """Find tissue on a picture of a slide.

    Args:
        image: (H, W, 3) uint8.
        scale: Level-0 pixels per pixel of the picture, along x and y.
        params: What to do; `method` is `hsv` or `otsu`.
    """
    # AREA_TILE squares of level 0, in pixels of this picture.
    unit = AREA_TILE**2 / (scale[0] * scale[1])
    if params.method == "hsv":
        for used, threshold in (("hsv", params.saturation), ("hsv_lower", params.saturation / 2)):
            mask = keep_pieces(_by_saturation(image, threshold, params), unit, params)
            if mask.any():
                return TissueMask(mask, scale, params, used)
    mask = keep_pieces(_by_otsu(image, scale, params), unit, params)
    return TissueMask(mask, scale, params, "otsu" if mask.any() else "empty")


def _by_saturation(image: np.ndarray, threshold: float, params: TissueParams) -> np.ndarray:
    from scipy import ndimage

    smooth = ndimage.median_filter(saturation_of(image), size=params.median, mode="nearest")
    mask: np.ndarray = smooth > threshold
    if params.close > 1:
        # Padded by its edge, so that closing does not eat tissue at the border.
        padded = np.pad(mask, params.close, mode="edge")
        closed = ndimage.binary_closing(padded, structure=np.ones((params.close, params.close), dtype=bool))
        mask = mask | closed[params.close : -params.close, params.close : -params.close]
    return mask


def _by_otsu(image: np.ndarray, scale: tuple[float, float], params: TissueParams) -> np.ndarray:
    from scipy import ndimage

    grey = grey_of(image)
    threshold = otsu_with_border(grey)
    if threshold is None:
        return np.zeros(grey.shape, dtype=bool)
    mask: np.ndarray = grey <= threshold
    radius = round(params.close_um / params.mpp)
    if radius < 1:
        return mask
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(ndimage.binary_dilation(mask, structure=x**2 + y**2 <= radius**2))


def otsu_with_border(grey: np.ndarray) -> float | None:
    """Return Otsu's threshold of a picture with a white border, tissue being at or below it; None without two classes."""
    from skimage.filters import threshold_otsu

    edge = [max(1, round(BORDER * n)) for n in grey.shape]
    # White as the glass of this slide, which is not 255: the brightest hundredth, but never darker than a light grey.
    white = max(220, int(np.quantile(grey, 0.99)))
    values = np.pad(grey, [(n, n) for n in edge], constant_values=white)
    if values.min() == values.max():
        return None
    threshold = float(threshold_otsu(values))
    dark, light = values[values <= threshold], values[values > threshold]
    if not dark.size or not light.size or light.mean() - dark.mean() < MIN_CONTRAST:
        return None
    return threshold


def keep_pieces(mask: np.ndarray, unit: float, params: TissueParams) -> np.ndarray:
    """Drop small pieces and fill small holes.

    Args:
        mask: (H, W) bool.
        unit: Mask pixels of one `AREA_TILE` square of level 0.
        params: `min_area`, `min_hole` and `max_holes`.
    """
    from scipy import ndimage

    min_area = min(params.min_area * unit, SMALL_SHARE * mask.size)
    min_hole = min(params.min_hole * unit, SMALL_SHARE * mask.size)
    pieces, count = ndimage.label(mask, structure=np.ones((3, 3), dtype=int))
    out = np.zeros(mask.shape, dtype=bool)
    for index, window in enumerate(ndimage.find_objects(pieces, max_label=count), start=1):
        piece = pieces[window] == index
        if piece.sum() <= min_area:
            continue
        filled = ndimage.binary_fill_holes(piece)
        holes, n_holes = ndimage.label(filled & ~piece)
        sizes = np.bincount(holes.ravel(), minlength=n_holes + 1)[1:]
        large = [k for k in np.argsort(-sizes, kind="stable") if sizes[k] > min_hole][: params.max_holes]
        out[window] |= filled & ~np.isin(holes, [k + 1 for k in large])
    return out


# --- polygons ----------------------------------------------------------------------------------------------------------------


def polygons_of(tissue: TissueMask) -> list[list[np.ndarray]]:
    """Return one polygon per piece: rings of (x, y) in level-0 pixels, the outline first, then holes, each closed.

    Rings run through the corners of mask pixels' edges halfway between inside and outside, so that filling them gives the mask.
    """
    from scipy import ndimage
    from skimage.measure import find_contours

    pieces, count = ndimage.label(tissue.mask)  # joined by edges: a polygon that touches itself in a corner is not simple
    found = []
    for index, window in enumerate(ndimage.find_objects(pieces, max_label=count), start=1):
        padded = np.pad(pieces[window] == index, 1)
        rings = []
        for ring in find_contours(padded.astype(np.float32), 0.5, fully_connected="low"):
            # Row and column of pixel centres in the padded window -> x, y of level 0.
            x = (ring[:, 1] - 1 + window[1].start + 0.5) * tissue.scale[0]
            y = (ring[:, 0] - 1 + window[0].start + 0.5) * tissue.scale[1]
            rings.append(np.stack([x, y], axis=1))
        found.append(sorted(rings, key=lambda ring: -abs(_area(ring))))
    return found


def _area(ring: np.ndarray) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2)


def geojson_of(tissue: TissueMask) -> dict[str, Any]:
    """Return the polygons as a GeoJSON feature collection in level-0 pixels, which QuPath opens and edits."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [np.round(ring, 2).tolist() for ring in rings]},
            "properties": {"objectType": "annotation", "classification": {"name": "Tissue", "color": [0, 160, 0]}},
        }
        for rings in polygons_of(tissue)
    ]
    return {"type": "FeatureCollection", "features": features}


def mask_from_geojson(geojson: Mapping[str, Any], slide: Slide, mpp: float = MASK_MPP) -> TissueMask:
    """Return the mask of polygons, for instance edited in QuPath, in level-0 pixels of a slide.

    Args:
        geojson: Feature collection, feature or geometry with polygons; other geometries are an error.
        slide: The slide.
        mpp: Scale of the mask.

    Raises:
        RequestError: Not GeoJSON polygons.
    """
    scale = slide.scale(mpp)
    shape = (int(-(-slide.info.height // scale[1])), int(-(-slide.info.width // scale[0])))
    try:
        polygons = _polygons(geojson)
        mask = _fill(polygons, shape, scale)
    except (KeyError, TypeError, ValueError, IndexError) as err:
        raise RequestError(
            f"tissue GeoJSON: {type(err).__name__}; polygons and multipolygons in level-0 pixels are accepted"
        ) from err
    return TissueMask(mask, scale, TissueParams(mpp=mpp), "user")


def _polygons(geojson: Mapping[str, Any]) -> list[Sequence[Any]]:
    kind = geojson["type"]
    if kind == "FeatureCollection":
        return [polygon for feature in geojson["features"] for polygon in _polygons(feature)]
    if kind == "Feature":
        return _polygons(geojson["geometry"])
    if kind == "Polygon":
        return [geojson["coordinates"]]
    if kind == "MultiPolygon":
        return list(geojson["coordinates"])
    raise ValueError(kind)


def _fill(polygons: Sequence[Sequence[Any]], shape: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    from skimage.draw import polygon as inside

    mask = np.zeros(shape, dtype=bool)
    for rings in polygons:
        piece = np.zeros(shape, dtype=bool)
        for number, ring in enumerate(rings):
            points = np.asarray(ring, dtype=np.float64)[:, :2] / scale - 0.5
            piece[inside(points[:, 1], points[:, 0], shape)] = number == 0
        mask |= piece
    return mask


def overlay_of(image: np.ndarray, tissue: TissueMask) -> np.ndarray:
    """Return a picture of the mask's size with the outline of tissue in green."""
    from scipy import ndimage

    out = image.copy()
    out[tissue.mask & ~ndimage.binary_erosion(tissue.mask, border_value=1)] = (0, 200, 0)
    # Pieces that reach the border keep their outline there.
    for edge in (np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]):
        out[edge][tissue.mask[edge]] = (0, 200, 0)
    return out


def save_tissue(tissue: TissueMask, folder: Path, slide: Slide | None = None) -> list[Path]:
    """Write `tissue.geojson`, and with a slide the overlay `tissue.png` (an image of a patient: keep it private).

    Returns:
        The files.
    """
    from io import BytesIO

    from PIL import Image

    files = [folder / "tissue.geojson"]
    write_atomic(files[0], json.dumps(geojson_of(tissue)).encode())
    if slide is not None:
        picture = BytesIO()
        Image.fromarray(overlay_of(slide.overview(tissue.params.mpp), tissue)).save(picture, format="PNG")
        files.append(folder / "tissue.png")
        write_atomic(files[1], picture.getvalue())
    return files
