"""MONAI's FlexibleUNet around a timm ResNet: the same names in both, so the weights of a slice encoder go in as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from medssl.errors import RequestError
from medssl.networks.segmentation import FITS

STRIDE = 32
WIDTHS = {2: (64, 128), 3: (128, 256), 4: (256, 512)}  # of the stages that start with a shortcut in a network of basic blocks
PLAIN = (
    "drop_rate",
    "drop_path_rate",
    "drop_block_rate",
    "zero_init_last",
)  # of timm's arguments, those that leave the graph alone
LAYERS = {  # MONAI's block and blocks per stage of the timm networks that its ResNet can be
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
    "resnet200": ("bottleneck", (3, 24, 36, 3)),
}


def build_stock(model: str, channels: int, classes: int, dims: int) -> Any:
    """Build MONAI's FlexibleUNet over a ResNet, with the shortcuts of timm's weights."""
    from monai.networks.nets import FlexibleUNet

    network = FlexibleUNet(in_channels=channels, out_channels=classes, backbone=model, spatial_dims=dims)
    if LAYERS[model][0] == "basic":
        project_shortcuts(network.encoder, dims)
    return network


def project_shortcuts(encoder: Any, dims: int) -> None:
    """Put a convolution and batch norm where FlexibleUNet's resnet18 and resnet34 subsample and pad with zero channels.

    That shortcut (type A) has no weights, so it cannot do what a trained projection does; MONAI's also passes no gradient (`out.data`).
    """
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    for stage, (narrow, wide) in WIDTHS.items():
        first = getattr(encoder, f"layer{stage}")[0]
        first.downsample = nn.Sequential(conv(narrow, wide, 1, stride=2, bias=False), norm(wide))


def build_flexible_unet(*, encoder: Mapping[str, Any], out_channels: int, image_size: Sequence[int] | None = None) -> nn.Module:
    """Build MONAI's 2D FlexibleUNet over the ResNet that an encoder manifest describes.

    Args:
        encoder: `{"name": "image2d", "args": {...}}`: resnet18 to resnet200 as timm has them.
        out_channels: Classes including background.
        image_size: Crop (H, W), multiples of 32 and not 32 x 32; None skips the check.

    Raises:
        RequestError: The encoder is another one, or the crop does not divide.

    Reference:
        MONAI 1.6 `networks/nets/flexible_unet.py`, after segmentation_models.pytorch.
    """
    name = encoder.get("name")
    if name != "image2d":
        raise RequestError(
            f'network flexible_unet: the encoder is "{name}"; it is built around a ResNet of image2d; '
            f'choose network "{FITS.get(str(name), "pyramid")}"'
        )
    args = dict(encoder.get("args", {}))
    model = str(args.get("model", "resnet18")).partition(".")[0]
    other = sorted(set(args.get("model_args") or {}) - set(PLAIN))
    if model not in LAYERS or other or args.get("norm", "batch") != "batch":
        what = f" with model_args {', '.join(other)}" if other else " with norm frozen" if model in LAYERS else ""
        raise RequestError(
            f"network flexible_unet: the encoder is {model}{what}; MONAI's FlexibleUNet takes the plain {', '.join(LAYERS)}; "
            "choose network pyramid, which takes any"
        )
    if image_size is not None:
        _check_crop(image_size)
    network: nn.Module = build_stock(model, int(args.get("in_channels", 1)), out_channels, 2)
    return network


def _check_crop(image_size: Sequence[int]) -> None:
    size = [int(n) for n in image_size]
    if len(size) != 2:
        raise RequestError(f"network flexible_unet: the crop {size} has {len(size)} axes; it segments images: give [H, W]")
    if any(n < STRIDE or n % STRIDE for n in size) or max(size) == STRIDE:
        nearest = "x".join(str(max(2 * STRIDE, -(-n // STRIDE) * STRIDE)) for n in size)
        raise RequestError(
            f"network flexible_unet: crop {'x'.join(map(str, size))} pixels; every axis must be a multiple of {STRIDE}, and one of them "
            f"{2 * STRIDE} or more, so that batch norm has cells to learn from; use {nearest}"
        )
