"""A feature pyramid over the maps of any encoder of images or volumes: maps of one width at chosen strides.

An encoder with several scales (ResNet, ConvNeXt, SegResNet, Swin, residual-encoder U-Net) gets MONAI's top-down pyramid over its own maps.
Maps that are sums of residuals without a norm (SegResNet, ConvNeXt) get one on the way in, as every block of these networks does first.
An encoder with one scale (ViT) gets its last map up- and downsampled by itself, as in ViTDet.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssl.errors import RequestError
from medssl.layers.tokens import unflatten_tokens
from medssl.types import EncoderOutput

GROUPS = 8  # of the norms, as in the heads of MONAI's RetinaNet


def norm_of(channels: int) -> nn.GroupNorm:
    """Return the norm over a map: two channels a group at least, or a single cell could not be normalised."""
    groups = gcd(GROUPS, channels)
    return nn.GroupNorm(max(1, groups // 2) if groups == channels else groups, channels)


class FeaturePyramid(nn.Module):
    """An encoder and a pyramid on it.

    Args:
        encoder: Any encoder of images (B, C, H, W) or volumes (B, C, X, Y, Z).
        image_size: A size that the encoder takes; others that its divisor divides run as well, as far as the encoder allows.
        strides: Pixels per cell of the levels, from fine to coarse, each twice the one before. Where an encoder's strides differ
            between axes, the largest counts. None takes those of all maps of the encoder, and of one scale its own and up to three finer.
        width: Channels of every level, a multiple of 8.

    Attributes:
        out_channels: `width`, under the name by which MONAI's RetinaNet asks.
        cells: Per level the pixels per cell along each axis.

    Raises:
        RequestError: The encoder has no maps, or none at such a stride.

    Reference:
        Lin et al. 2017, "Feature Pyramid Networks for Object Detection", as in MONAI `FeaturePyramidNetwork`; levels above the coarsest map
        are subsampled (section 4.1 there). Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", section 3.
        A norm per map of a network that has none at the end of its stages: as the released detection code of ConvNeXt and Swin.
    """

    def __init__(self, encoder: nn.Module, *, image_size: Sequence[int], strides: Sequence[int] | None, width: int = 64) -> None:
        super().__init__()
        if width % GROUPS or width < GROUPS:
            raise RequestError(f"feature pyramid: width {width}; accepted: multiples of {GROUPS}, for instance 64")
        if strides is not None:
            _check_strides(strides)
        name = getattr(encoder, "name", type(encoder).__name__)
        if getattr(encoder, "takes_clips", False) or getattr(encoder, "takes_stacks", False):
            raise RequestError(
                f"feature pyramid: encoder {name} sees clips or stacks; accepted are encoders of images (image2d) and volumes"
            )
        maps, steps = _look(encoder, image_size)
        own = [max(step) for step in steps]
        self.single = len(set(own)) == 1
        wanted = own_strides(own) if strides is None else [int(s) for s in strides]
        self.neck: nn.Module
        if self.single:
            self.picked: tuple[int, ...] = ()
            self.extra = 0
            self.neck = SimplePyramid(maps[-1], own[-1], wanted, width, len(image_size))
            base = steps[-1]
        else:
            self.picked, self.extra = _pick(name, own, wanted)
            channels = [maps[index] for index in self.picked]
            normalised = getattr(encoder, "normalised_maps", True)
            self.entries = nn.ModuleList(nn.Identity() if normalised else norm_of(count) for count in channels)
            self.neck = _top_down(channels, width, len(image_size))
            base = steps[self.picked[-1]]
        top = own[-1] if self.single else own[self.picked[-1]]
        self.cells = tuple(
            tuple(step * s / top for step in base) if self.single or s > top else tuple(float(v) for v in steps[own_last(own, s)])
            for s in wanted
        )
        self.encoder = encoder
        self.out_channels = width

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map (B, width, *size) per level, from fine to coarse."""
        maps = feature_maps(self.encoder(images))
        if self.single:
            return self.neck(maps[-1])  # type: ignore[no-any-return]
        found = self.neck({str(index): entry(maps[index]) for index, entry in zip(self.picked, self.entries)})
        levels = list(found.values())
        for _ in range(self.extra):
            levels.append(_halve(levels[-1]))
        return levels


class SimplePyramid(nn.Module):
    """Levels made of one map: transposed convolutions below its stride, pooling above it, then 1x1 and 3x3 convolutions with norms.

    Args:
        channels: Of the map.
        stride: Of the map.
        strides: Of the levels, powers of two times `stride` or parts of it.
        width: Of the levels.
        dims: 2 or 3.

    Reference:
        Li et al. 2022, section 3 ("simple feature pyramid"); group norm in the place of layer norm over channels.
    """

    def __init__(self, channels: int, stride: int, strides: Sequence[int], width: int, dims: int) -> None:
        super().__init__()
        convolution: Any = nn.Conv2d if dims == 2 else nn.Conv3d
        transposed: Any = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        branches = []
        for wanted in strides:
            steps = log2(wanted / stride)
            if steps != int(steps):
                raise RequestError(
                    f"feature pyramid: stride {wanted} over a map of stride {stride}; accepted: {stride} times or divided by 2, 4, 8 ..."
                )
            layers: list[nn.Module] = []
            inside = channels
            for _ in range(max(0, -int(steps))):
                out = max(width, inside // 2)
                out += -out % GROUPS
                layers += [transposed(inside, out, 2, stride=2), norm_of(out), nn.GELU()]
                inside = out
            layers += [Halve() for _ in range(max(0, int(steps)))]
            layers += [convolution(inside, width, 1, bias=False), norm_of(width)]
            layers += [convolution(width, width, 3, padding=1, bias=False), norm_of(width)]
            branches.append(nn.Sequential(*layers))
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the levels of a map (B, C, *size)."""
        return [branch(x) for branch in self.branches]


class Halve(nn.Module):
    """Max pooling by 2."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, *size / 2), rounded up."""
        pool: Any = functional.max_pool2d if x.ndim == 4 else functional.max_pool3d
        return pool(x, 2, ceil_mode=True)  # type: ignore[no-any-return]


def _halve(x: Tensor) -> Tensor:
    """Every second cell, as MONAI's `LastLevelMaxPool`."""
    pool: Any = functional.max_pool2d if x.ndim == 4 else functional.max_pool3d
    return pool(x, 1, stride=2)  # type: ignore[no-any-return]


def feature_maps(output: EncoderOutput) -> list[Tensor]:
    """Return the maps of an encoder from fine to coarse; the last one of a single scale is that of the tokens, after the final norm."""
    maps = list(output.pyramid)
    if not maps or all(m.shape[2:] == maps[0].shape[2:] for m in maps):
        return [unflatten_tokens(output.tokens, output.grid)]
    return maps


def own_strides(own: Sequence[int]) -> list[int]:
    """Return the strides of an encoder's maps from fine to coarse, each twice the one before; of one scale its own and up to three finer."""
    strides = [max(own)]
    while len(set(own)) == 1 and len(strides) < 4 and strides[0] % 2 == 0:
        strides.insert(0, strides[0] // 2)
    while strides[0] % 2 == 0 and strides[0] // 2 in own:
        strides.insert(0, strides[0] // 2)
    return strides


def own_last(strides: Sequence[int], wanted: int) -> int:
    """Return the place of the last map of a stride: the deepest one."""
    return max(index for index, stride in enumerate(strides) if stride == wanted)


def _check_strides(strides: Sequence[int]) -> None:
    wanted = [int(s) for s in strides]
    if not wanted or min(wanted) < 1 or any(b != 2 * a for a, b in zip(wanted, wanted[1:])):
        raise RequestError(f"feature pyramid: strides {wanted}; each must be twice the one before, for instance [4, 8, 16]")


def _look(encoder: Any, image_size: Sequence[int]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return channels and pixels per cell of every map, from one look at an empty image."""
    size = tuple(int(n) for n in image_size)
    training = encoder.training
    reference = next(encoder.parameters())
    blank = torch.zeros(1, encoder.in_channels, *size, device=reference.device, dtype=reference.dtype)
    encoder.eval()
    try:
        with torch.no_grad():
            maps = feature_maps(encoder(blank))
    except ValueError as err:  # an encoder says which sizes it takes
        raise RequestError(f"feature pyramid: {err}") from err
    finally:
        encoder.train(training)
    steps = [tuple(n // m for n, m in zip(size, found.shape[2:])) for found in maps]
    if any(n % m for found in maps for n, m in zip(size, found.shape[2:])):
        raise RequestError(
            f"feature pyramid: image size {'x'.join(map(str, size))} is not divided by the strides of the encoder; "
            f"choose multiples of {'x'.join(str(max(s[axis] for s in steps)) for axis in range(len(size)))}"
        )
    return [int(found.shape[1]) for found in maps], steps


def _pick(name: str, own: Sequence[int], wanted: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return which maps the levels are made of, and how many levels lie above the coarsest."""
    above = [s for s in wanted if s > max(own)]
    there = [s for s in wanted if s <= max(own)]
    missing = [s for s in there if s not in own]
    if missing or not there:
        raise RequestError(
            f"feature pyramid: encoder {name} has maps at strides {', '.join(map(str, sorted(set(own))))}; asked for "
            f"{', '.join(map(str, wanted))}; choose among these, with coarser ones on top where needed"
        )
    return tuple(own_last(own, s) for s in there), len(above)


def _top_down(channels: list[int], width: int, dims: int) -> nn.Module:
    from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork

    network: nn.Module = FeaturePyramidNetwork(dims, channels, width)
    return network
