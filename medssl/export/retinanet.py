"""Weights for MONAI's RetinaNet: the ResNet below its feature pyramid, inflated for volumes; pyramid and heads start at random."""

from __future__ import annotations

from typing import Any

from medssl.export.resnet_trunk import Target, monai_arguments, monai_resnet
from medssl.networks.flexible_unet import LAYERS

RETURNED = (1, 2, 3, 4)  # all stages; with fewer the network has none above the last, and their tensors find no place


def build(model: str, channels: int, dims: int) -> tuple[Any, str]:
    """Build MONAI's RetinaNet with all four stages."""
    from medssl._compat import torchvision_ops

    module = torchvision_ops.monai_retinanet()
    extractor = module.resnet_fpn_feature_extractor(monai_resnet(model, channels, dims), dims, returned_layers=RETURNED)
    network = module.RetinaNet(dims, num_classes=2, num_anchors=1, feature_extractor=extractor, size_divisible=32)
    inner = f"resnet_fpn_feature_extractor({monai_arguments(model, channels, dims)}, {dims}, returned_layers=[1, 2, 3, 4])"
    return network, f"monai.apps.detection RetinaNet(feature_extractor={inner}, ...), strict=False"


def note(model: str) -> list[str]:
    """Say what fewer stages do."""
    return ["with fewer returned_layers the stages above the last are unexpected and are left out: nothing else may be"]


TARGET = Target(
    to="retinanet",
    models=tuple(LAYERS),
    build=build,
    prefix="feature_extractor.body.",
    random=("feature_extractor.fpn.", "classification_head.", "regression_head."),
    dims=(3, 2),
    zero_bias=True,
    note=note,
)
