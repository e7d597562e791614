"""Weights for torchvision's ResNets: `torchvision.models.resnet18().load_state_dict(load_file(...), strict=False)`, but for the classifier."""

from __future__ import annotations

from typing import Any

from medssl.export.resnet_trunk import Target


def build(model: str, channels: int, dims: int) -> tuple[Any, str]:
    """Build torchvision's network, which has three input channels."""
    from medssl._compat import torchvision_ops

    torchvision_ops.ensure()
    from torchvision import models

    return getattr(models, model)(), f"torchvision.models.{model}()"


TARGET = Target(
    to="torchvision",
    models=(
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    ),
    build=build,
    random=("fc.",),
    channels=3,
)
