"""Weights for the encoder of MONAI's FlexibleUNet, 2D or (inflated) 3D; decoder and head start at random."""

from __future__ import annotations

from typing import Any

from medssl.export.resnet_trunk import Target
from medssl.networks.flexible_unet import LAYERS, build_stock


def build(model: str, channels: int, dims: int) -> tuple[Any, str]:
    """Build MONAI's FlexibleUNet, with the shortcuts of the weights."""
    expression = (
        f'monai.networks.nets.FlexibleUNet(in_channels={channels}, out_channels=..., backbone="{model}", spatial_dims={dims})'
    )
    if LAYERS[model][0] == "basic":
        expression += " with projections in its shortcuts (see the note)"
    return build_stock(model, channels, 2, dims), f"{expression}, strict=False"


def note(model: str) -> list[str]:
    """Say what FlexibleUNet lacks for networks of basic blocks."""
    if LAYERS[model][0] != "basic":
        return []
    return [
        f"FlexibleUNet(backbone={model}) has shortcuts without weights; put projections there before loading (three lines in "
        "docs/export.md, or medssl.networks.flexible_unet.project_shortcuts): without them 18 tensors are unexpected and features differ"
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
