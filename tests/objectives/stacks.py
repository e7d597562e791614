"""A small encoder of stacks with the interface of `SliceVolumeEncoder`, and views to feed it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medssl.types import EncoderOutput, Part, Views, ViewsMeta, ViewSpec


class FakeAggregator(nn.Module):
    """One attention over the slices that also sees their position in mm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.enter = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, valid: Tensor | None = None, z_mm: Tensor | None = None) -> EncoderOutput:
        if valid is None:
            valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
        x = self.enter(tokens.masked_fill(~valid[..., None], 0.0))
        if z_mm is not None:
            half = x.shape[-1] // 2
            angle = z_mm.to(x.dtype)[..., None] * 50.0 ** (-torch.arange(half, dtype=x.dtype) / half)
            x = x + torch.cat([angle.sin(), angle.cos()], dim=-1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / x.shape[-1] ** 0.5
        weights = scores.masked_fill(~valid[:, None, :], -1e9).softmax(dim=-1)
        x = (x + self.out(weights @ v)).masked_fill(~valid[..., None], 0.0)
        return EncoderOutput(x, (x.shape[1],), x.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1))


class FakeStackEncoder(nn.Module):
    takes_stacks = True

    def __init__(self, dim: int = 16, channels: int = 1) -> None:
        super().__init__()
        self.embed_dim, self.in_channels, self.patch_size = dim, channels, (1, 1, 1)
        self.slice_encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 32), nn.GELU())
        self.projection = nn.Linear(32, dim)
        self.aggregator = FakeAggregator(dim)

    def embed_slices(self, stacks: Tensor, valid: Tensor | None = None) -> Tensor:
        rows = self.projection(self.slice_encoder(stacks.flatten(0, 1))).reshape(*stacks.shape[:2], -1)
        return rows if valid is None else rows.masked_fill(~valid[..., None], 0.0)

    def parts(self) -> dict[str, Part]:
        return {"joint": Part(self, {}, prefix="")}


SPECS = {
    "image": ViewSpec("image", (8, 8), None, 2),
    "stack": ViewSpec("clip", (6, 8, 8), None, 2),
    "volume": ViewSpec("volume", (8, 8, 5), None, 2),
    "image_local": ViewSpec("image", (4, 4), None, 3),
}


def make_views(
    kind: str = "stack",
    batch: int = 4,
    *,
    seed: int = 0,
    first: int = 0,
    local: bool = False,
    dtype: torch.dtype = torch.float32,
    noise: float = 0.1,
    **meta: Any,
) -> Views:
    """Two views of smooth random pictures or stacks; item i of seed s is the same in any batch. Odd items have four valid slices."""
    data: dict[str, Tensor] = {}
    valid: dict[str, Tensor] = {}
    spacing: dict[str, Tensor] = {}

    def item(number: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        slices = torch.randn(shape[-3:], generator=generator).cumsum(dim=0)
        return slices + noise * torch.randn(shape, generator=generator)

    ids = torch.arange(first, first + batch)
    if kind == "image":
        data["image"] = torch.stack([item(int(i), 2, 1, 8, 8) for i in ids])
        valid["image"] = torch.ones(batch, 2, 8, 8, dtype=torch.bool)
        if local:
            data["image_local"] = torch.stack([item(int(i), 3, 1, 8, 8) for i in ids])[..., 2:6, 2:6]
            valid["image_local"] = torch.ones(batch, 3, 4, 4, dtype=torch.bool)
    elif kind == "stack":
        data["stack"] = torch.stack([item(int(i), 2, 6, 8, 8) for i in ids])[:, :, :, None]
        valid["stack"] = torch.ones(batch, 2, 6, 8, 8, dtype=torch.bool)
        valid["stack"][ids % 2 == 1, :, 4:] = False
        data["stack"][ids % 2 == 1, :, 4:] = 0
        data["stack_depth"] = (2.5 * torch.arange(6.0)).expand(batch, 2, 6).clone()
        data["stack_share"] = torch.linspace(0, 1, 6).expand(batch, 2, 6).clone()
    else:
        data["volume"] = torch.stack([item(int(i), 2, 5, 8, 8) for i in ids])[:, :, :, None].movedim(2, -1)
        valid["volume"] = torch.ones(batch, 2, 8, 8, 5, dtype=torch.bool)
        spacing["volume"] = torch.tensor([1.0, 1.0, 2.5], dtype=torch.float64).expand(batch, 2, 3)
    data = {key: value.to(dtype) for key, value in data.items()}
    return Views(data, ViewsMeta(kind, "mri", ids, spacing, {}, valid, ()))
