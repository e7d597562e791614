"""Crops cut out of whole volumes, the way the reader will do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl.types import Box, DrawKey
from medssl.views.pipeline import Crop, VolumeViews

NO_STATS: dict[str, float] = {}


def make_crop(
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    views: VolumeViews,
    *,
    centre_mm: Sequence[float] | None = None,
    key: DrawKey | None = None,
    stats: Mapping[str, float] | None = None,
    item: int = 0,
    tight: bool = False,
) -> Crop:
    """Fetch box and margin (`tight`: of this draw only) of a (C, X, Y, Z) volume.

    Rounded outwards to voxels and zero-padded, with valid False there, as the reader does it.
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    size = np.asarray(views.box_size_mm(spacing_mm))
    centre = np.asarray(volume.shape[1:]) * spacing / 2 if centre_mm is None else np.asarray(centre_mm, dtype=float)
    key = DrawKey(1, 2, 3) if key is None else key
    margin = np.asarray(views.margin_mm(spacing_mm, key if tight else None))
    low = np.floor((centre - size / 2 - margin) / spacing + 1e-6).astype(int)
    high = np.ceil((centre + size / 2 + margin) / spacing - 1e-6).astype(int)
    image = np.zeros((volume.shape[0], *(high - low)), dtype=volume.dtype)
    valid = np.zeros(tuple(high - low), dtype=bool)
    inner_low, inner_high = np.maximum(low, 0), np.minimum(high, volume.shape[1:])
    at = tuple(slice(a, b) for a, b in zip(inner_low, inner_high))
    into = tuple(slice(a - s, b - s) for a, b, s in zip(inner_low, inner_high, low))
    image[(slice(None), *into)] = volume[(slice(None), *at)]
    valid[into] = True
    return Crop(
        image=image,
        valid=valid,
        spacing_mm=tuple(spacing_mm),
        origin_mm=tuple(low * spacing),
        box=Box(tuple((centre - size / 2).tolist()), tuple(size.tolist())),
        stats=NO_STATS if stats is None else stats,
        key=key,
        id=item,
    )


def neutral(**changes: Any) -> dict[str, Any]:
    """Parameters of a view that does nothing, with some changed."""
    params: dict[str, Any] = {
        "flip": [False, False, False],
        "rotate_deg": [0.0, 0.0, 0.0],
        "scale": 1.0,
        "warp": None,
        "bias_field": None,
        "contrast": 1.0,
        "brightness": 0.0,
        "gamma": None,
        "noise": None,
        "mask": None,
    }
    assert set(changes) <= set(params)
    return {**params, **changes}
