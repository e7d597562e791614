"""Weights for the encoder of MONAI's FlexibleUNet, 2D or (inflated) 3D; decoder and head start at random."""

from __future__ import annotations

from typing import Any

from torch import nn

from medssl.export.resnet_trunk import LAYERS, Target

WIDTHS = {2: (64, 128), 3: (128, 256), 4: (256, 512)}  # of the stages that start with a shortcut in a network of basic blocks


def build(model: str, channels: int, dims: int) -> tuple[Any, str]:
    """Build MONAI's FlexibleUNet, with the shortcuts of the weights."""
    from monai.networks.nets import FlexibleUNet

    network = FlexibleUNet(in_channels=channels, out_channels=2, backbone=model, spatial_dims=dims)
    expression = (
        f'monai.networks.nets.FlexibleUNet(in_channels={channels}, out_channels=..., backbone="{model}", spatial_dims={dims})'
    )
    if LAYERS[model][0] != "basic":
        return network, f"{expression}, strict=False"
    project_shortcuts(network.encoder, dims)
    return network, f"{expression} with projections in its shortcuts (see the note), strict=False"


def project_shortcuts(encoder: Any, dims: int) -> None:
    """Put a convolution and batch norm where FlexibleUNet's resnet18 and resnet34 subsample and pad with zero channels.

    That shortcut (type A) has no weights, so it cannot do what a trained projection does; MONAI's also passes no gradient (`out.data`).
    """
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    for stage, (narrow, wide) in WIDTHS.items():
        first = getattr(encoder, f"layer{stage}")[0]
        first.downsample = nn.Sequential(conv(narrow, wide, 1, stride=2, bias=False), norm(wide))


def note(model: str) -> list[str]:
    """Say what FlexibleUNet lacks for networks of basic blocks."""
    if LAYERS[model][0] != "basic":
        return []
    return [
        f"FlexibleUNet(backbone={model}) has shortcuts without weights; put projections there before loading (three lines in "
        "docs/export.md, or medssl.export.flexible_unet.project_shortcuts): without them 18 tensors are unexpected and features differ"
    ]


TARGET = Target(
    to="flexible-unet",
    models=tuple(LAYERS),
    build=build,
    prefix="encoder.",
    random=("decoder.", "segmentation_head."),
    dims=(2, 3),
    note=note,
)
