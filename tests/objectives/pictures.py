"""A small 2D encoder with the interface of `Image2D`, and views of pictures with their place in the picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.layers.tokens import flatten_tokens
from medssl.types import EncoderOutput, Part, Views, ViewsMeta, ViewSpec

SPECS = {"image": ViewSpec("image", (16, 24), None, 2)}


class FakeImageEncoder(nn.Module):
    """Two convolutions and a norm; cells of 4 x 4 pixels."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.embed_dim, self.in_channels, self.patch_size = dim, 1, (4, 4)
        self.net = nn.Sequential(nn.Conv2d(1, 16, 4, stride=4), nn.GELU(), nn.Conv2d(16, dim, 1))

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> EncoderOutput:
        maps = self.net(x)
        tokens = flatten_tokens(maps)
        return EncoderOutput(tokens, tuple(maps.shape[2:]), tokens.mean(dim=1), (maps,))

    def part(self, group: str) -> Part:
        return Part(self, {})


def place(centre: tuple[float, float] = (0.5, 0.5), size: float = 1.0, flip: tuple[bool, bool] = (False, False)) -> Tensor:
    """The map of a view: for (x, y, 1) its row and column in the picture, 0 to 1."""
    up, left = (-1.0 if mirrored else 1.0 for mirrored in flip)
    return torch.tensor([[0.0, up * size / 2, centre[0]], [left * size / 2, 0.0, centre[1]]])


def make_pictures(batch: int = 8, *, seed: int = 0, noise: float = 0.1) -> Views:
    """Smooth random pictures, seen twice with noise; the second view is mirrored from left to right."""
    generator = torch.Generator().manual_seed(seed)
    smooth = functional.interpolate(torch.randn(batch, 1, 4, 6, generator=generator), size=(16, 24), mode="bilinear")
    x = torch.stack([smooth, smooth.flip(-1)], dim=1)
    x = x + noise * torch.randn(x.shape, generator=generator)
    maps = torch.stack([place(), place(flip=(False, True))]).expand(batch, 2, 2, 3).clone()
    valid = torch.ones(batch, 2, 16, 24, dtype=torch.bool)
    return Views({"image": x, "image_map": maps}, ViewsMeta("toy", "xray", torch.arange(batch), {}, {}, {"image": valid}, ()))
