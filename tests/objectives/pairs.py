"""Pairs of crops and small encoders for the tests of alice."""

from __future__ import annotations

from typing import Any

import torch

from medssl.encoders.segresnet3d import SegResNet3D
from medssl.encoders.swin3d import Swin3D
from medssl.encoders.vit3d import ViT3D
from medssl.objectives.alice import Alice
from medssl.types import Views, ViewsMeta

SIZES = {"segresnet3d": (16, 24, 8), "vit3d": (16, 24, 8), "swin3d": (64, 32, 32)}
CELLS = {"segresnet3d": 4, "vit3d": 8, "swin3d": 16}
SMALL = {
    "prototypes": 16,
    "casa_heads": 2,
    "casa_hidden": 24,
    "head_hidden": 24,
    "bottleneck": 12,
    "decoder_dim": 24,
    "decoder_heads": 2,
}


def make_encoder(name: str) -> Any:
    if name == "segresnet3d":
        return SegResNet3D(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1))
    if name == "vit3d":
        return ViT3D(image_size=SIZES[name], patch_size=8, hidden_size=24, num_layers=1, num_heads=2)
    return Swin3D(feature_size=12, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), window_size=4)


def make_alice(name: str = "segresnet3d", seed: int = 0, **changes: Any) -> Alice:
    torch.manual_seed(seed)
    return Alice(make_encoder(name), **{"image_size": SIZES[name], **SMALL, **changes})


def make_pairs(
    name: str = "segresnet3d",
    batch: int = 2,
    seed: int = 0,
    weights: list[float] | None = None,
    first: int = 0,
    size: tuple[int, ...] | None = None,
) -> Views:
    """Random pairs, every crop with a mask of its own; one half of every other pair is padding."""
    size, cell = size or SIZES[name], CELLS[name]
    images, masks, valids = [], [], []
    for item in range(first, first + batch):
        generator = torch.Generator().manual_seed(1000 * seed + item)
        images.append(torch.randn(2, 1, *size, generator=generator) + torch.linspace(0, item % 3, size[0])[:, None, None])
        grid = [n // cell for n in size]
        cells = grid[0] * grid[1] * grid[2]
        order = torch.rand(2, cells, generator=generator).argsort(dim=1)
        masks.append((order < cells // 2).reshape(2, *grid))
        valid = torch.ones(2, *size, dtype=torch.bool)
        valid[:, : size[0] // 2 * (item % 2)] = False
        valids.append(valid)
    data = {"volume": torch.stack(images), "volume_mask": torch.stack(masks)}
    if weights is not None:
        data["volume_pair_weight"] = torch.tensor(weights)
    meta = ViewsMeta("pairs", "mri", torch.arange(first, first + batch), {}, {}, {"volume": torch.stack(valids)}, ())
    return Views(data, meta)


def take(views: Views, rows: list[int]) -> Views:
    """Some pairs of a batch."""
    valid = {key: value[rows] for key, value in views.meta.valid.items()}
    meta = ViewsMeta("pairs", "mri", views.meta.ids[rows], {}, {}, valid, ())
    return Views({key: value[rows] for key, value in views.data.items()}, meta)


def to_double(views: Views) -> Views:
    data = {key: value.double() if value.is_floating_point() else value for key, value in views.data.items()}
    return Views(data, views.meta)
