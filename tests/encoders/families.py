"""One small network of every timm family that the slice encoder is promised for: arguments of `Image2D` and an image size."""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "resnet": ({"model": "resnet18"}, (64, 96)),
    "resnet, group norm": ({"model": "resnet18", "model_args": {"norm_layer": "groupnorm"}}, (64, 96)),
    "vit": ({"model": "vit_tiny_patch16_224", "image_size": (32, 48), "model_args": {"depth": 3}}, (32, 48)),
    "convnext": ({"model": "convnext_atto"}, (64, 96)),
    "volo": ({"model": "volo_d1_224", "image_size": (32, 48)}, (32, 48)),
    "convit": ({"model": "convit_tiny", "image_size": 32, "model_args": {"depth": 3, "local_up_to_layer": 2}}, (32, 32)),
    # its own blocks of 8 cells need images of 256 pixels
    "halonet": ({"model": "halonet26t", "model_args": {"self_attn_kwargs": {"block_size": 2, "halo_size": 1}}}, (64, 128)),
    "swin": (
        {"model": "swin_tiny_patch4_window7_224", "image_size": (64, 96), "model_args": {"depths": (2, 1, 1, 1), "embed_dim": 48}},
        (64, 96),
    ),
}
