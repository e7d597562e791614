"""A segmentation network over any encoder of images or volumes: a feature pyramid, and the levels brought together at the finest one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError
from medssl.networks.feature_pyramid import FeaturePyramid, norm_of
from medssl.registry import lookup


class PyramidSegmenter(nn.Module):
    """A feature pyramid over an encoder; each level climbs to the finest, the levels are summed, and a 1x1 convolution gives the classes.

    Args:
        encoder: Any encoder of images (B, C, H, W) or volumes (B, C, X, Y, Z). Parts of it that no path uses (a decoder) are frozen.
        out_channels: K, classes including background.
        image_size: Crop that it will see in training, as `FeaturePyramid`.
        strides: Pixels per cell of the levels; None takes all of the encoder's, see `FeaturePyramid`.
        width: Channels of pyramid and levels, a multiple of 8.

    Reference:
        Kirillov et al. 2019, "Panoptic Feature Pyramid Networks", section 3 (semantic segmentation branch). There levels climb from
        strides 4 to 32 with 128 channels over a pyramid of 256; here strides are those of the encoder, which may differ between axes, and
        the width is one.
    """

    library = "medssl.PyramidSegmenter"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        out_channels: int,
        image_size: Sequence[int],
        strides: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(encoder, image_size=image_size, strides=strides, width=width)
        dims = len(image_size)
        self.levels = nn.ModuleList(Climb(width, steps, dims) for steps in range(len(self.pyramid.cells)))
        convolution: Any = nn.Conv2d if dims == 2 else nn.Conv3d
        self.head = convolution(width, out_channels, 1)

    @property
    def encoder(self) -> nn.Module:
        """The encoder, which lies in the pyramid."""
        return self.pyramid.encoder

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, *size) of images (B, C, *size)."""
        maps = self.pyramid(images)
        sizes = [tuple(found.shape[2:]) for found in maps]
        finest = self.levels[0](maps[0], [])
        for steps in range(1, len(maps)):
            finest = finest + self.levels[steps](maps[steps], sizes[:steps][::-1])
        logits: Tensor = self.head(finest)
        return enlarged(logits, tuple(images.shape[2:]))


class Climb(nn.Module):
    """Convolution, group norm and ReLU for every step to the finest level, each followed by an enlargement to the next finer level.

    Args:
        width: Channels.
        steps: Levels below the finest; the finest itself has one convolution and no enlargement.
        dims: 2 or 3.
    """

    def __init__(self, width: int, steps: int, dims: int) -> None:
        super().__init__()
        convolution: Any = nn.Conv2d if dims == 2 else nn.Conv3d
        self.blocks = nn.ModuleList(
            nn.Sequential(convolution(width, width, 3, padding=1, bias=False), norm_of(width), nn.ReLU(inplace=True))
            for _ in range(max(1, steps))
        )

    def forward(self, x: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
        """Return a level (B, width, *size) at the size of the finest.

        Args:
            x: The level.
            sizes: Of the finer levels, the next one first; empty for the finest.
        """
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number < len(sizes):
                x = enlarged(x, sizes[number])
        return x


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (B, C, *any) at another size, interpolated linearly."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return functional.interpolate(x, size=tuple(size), mode=mode, align_corners=False)


def build_pyramid(
    *,
    encoder: Mapping[str, Any],
    out_channels: int,
    image_size: Sequence[int],
    width: int = 64,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """Build a pyramid segmenter over the encoder that a manifest describes.

    Args:
        encoder: `{"name": ..., "args": {...}}`: `image2d`, or any encoder of volumes.
        out_channels: Classes including background.
        image_size: Crop (H, W) or (X, Y, Z), which the strides of the encoder divide.
        width: Channels of the pyramid, a multiple of 8.
        strides: Of the levels, each twice the one before; None takes all of the encoder's, and of one scale its own and up to three finer.

    Raises:
        RequestError: The encoder sees clips or stacks, or other images than those of the crop, or crop or strides do not fit it.
    """
    name = str(encoder.get("name"))
    kind = lookup("encoder", name)
    if getattr(kind, "takes_stacks", False):
        raise RequestError(
            f"network pyramid: encoder {name} gives one embedding per slice, not maps; give the weights of its slice encoder "
            "(slice_encoder.safetensors in the weights folder of the run)"
        )
    args = dict(encoder.get("args", {}))
    axes = 2 if getattr(kind, "takes_images", False) else 3
    if len(image_size) != axes and not getattr(kind, "takes_clips", False):
        raise RequestError(
            f"network pyramid: encoder {name} sees {'images' if axes == 2 else 'volumes'}, the crop {list(image_size)} has "
            f"{len(image_size)} axes; give {'[H, W]' if axes == 2 else '[X, Y, Z]'}, or another encoder"
        )
    network = PyramidSegmenter(kind(**args), out_channels=out_channels, image_size=image_size, strides=strides, width=width)
    freeze_unused(network.encoder)
    return network


def freeze_unused(encoder: Any) -> None:
    """Freeze what is in an encoder's network and not in the encoder proper: a decoder, which no map passes."""
    own = tuple(encoder.key_groups["encoder"])
    for name, parameter in encoder.net.named_parameters():
        if not name.startswith(own):
            parameter.requires_grad_(False)
