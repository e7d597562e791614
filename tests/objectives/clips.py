"""Views of small random clips, and a small video encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medssl.encoders.video_vit import VideoViT
from medssl.types import DrawKey, Views, ViewsMeta, ViewSpec

SIZE = (6, 16, 24)
"""(T, H, W); with tubelets of 2 and patches of 8 the token grid is 3 x 2 x 3."""


def specs(count: int = 1) -> dict[str, ViewSpec]:
    return {"clip": ViewSpec("clip", SIZE, None, count)}


def encoder(**changes: Any) -> VideoViT:
    return VideoViT(**{"image_size": SIZE, "patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 2, **changes})


def clip_views(
    batch: int = 4,
    *,
    count: int = 1,
    first: int = 0,
    step: int = 0,
    sector: bool = False,
    short: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Views:
    """Item i is the same in any batch. `sector` leaves a column of patches out, `short` the last two frames of odd items."""
    rows, keys = [], []
    for number in range(first, first + batch):
        generator = torch.Generator().manual_seed(number)
        still = torch.randn(1, 1, 1, *SIZE[1:], generator=generator).cumsum(dim=-1) / 4
        rows.append(still + 0.5 * torch.randn(count, SIZE[0], 1, *SIZE[1:], generator=generator))
        keys.append(DrawKey(0, step, number))
    x = torch.stack(rows).to(dtype)
    valid = torch.ones(batch, count, *SIZE, dtype=torch.bool)
    if sector:
        valid[..., :8] = False
    if short:
        valid[[n for n in range(batch) if (first + n) % 2], :, 4:] = False
    meta = ViewsMeta("toy", "ultrasound", torch.arange(first, first + batch), {}, {}, {"clip": valid}, tuple(keys))
    return Views({"clip": x}, meta)


def coordinates(batch: int = 2) -> tuple[Views, Tensor]:
    """Clips whose pixels say where their token lies: value = 100 t + 10 h + w of the token grid; and these values (N,)."""
    t, h, w = torch.meshgrid(torch.arange(3.0), torch.arange(2.0), torch.arange(3.0), indexing="ij")
    cell = 100 * t + 10 * h + w
    pixels = cell.repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    views = clip_views(batch)
    views.data["clip"] = pixels[None, None, :, None].expand(batch, 1, -1, 1, -1, -1).clone()
    return views, cell.flatten()
