"""Weights for MONAI's ResNet, 2D or (inflated) 3D, under the names and with the biases that its functions have by default."""

from __future__ import annotations

from typing import Any

from medssl.export.resnet_trunk import Target, monai_arguments, monai_resnet
from medssl.networks.flexible_unet import LAYERS


def build(model: str, channels: int, dims: int) -> tuple[Any, str]:
    """Build MONAI's ResNet without classifier."""
    return monai_resnet(model, channels, dims), f"monai.networks.nets.{monai_arguments(model, channels, dims)}"


def note(model: str) -> list[str]:
    """Name the argument whose default loads without complaint and gives other features."""
    return ["conv1_t_stride=2 must be given: MONAI's default of 1 takes the same tensors and gives other features"]


TARGET = Target(to="resnet", models=tuple(LAYERS), build=build, dims=(2, 3), zero_bias=True, note=note)
