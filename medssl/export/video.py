"""Single frames of a video ViT, as a 2D ViT in timm's layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIBRARY = "medssl.VideoTransformer"
STEM = "patch_embed.proj.weight"
ARCHITECTURE = "vit_base_patch16_224"  # its sizes are all given as arguments


def frame_state(source: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of timm's `VisionTransformer` that does to a picture what the encoder does to a clip that stands still.

    Args:
        source: A `VideoViT`, float64.

    Returns:
        Tensors, and a sentence for everything that was changed.
    """
    dtype = torch.float32
    state = {key: value.to(dtype) for key, value in source.net.state_dict().items()}
    kernel = source.net.patch_embed.proj.weight.detach()
    state[STEM] = kernel.sum(dim=2).to(dtype)
    _, height, width = source.config()["args"]["image_size"]
    grid = (1, height // source.patch_size[1], width // source.patch_size[2])
    table = source.positions(grid, kernel)
    state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1).to(dtype)
    notes = ["pos_embed: the computed positions of one frame, written out; none for the class token"]
    if kernel.shape[2] > 1:
        notes.append(
            f"{STEM}: summed over the {kernel.shape[2]} frames of a tubelet; a picture gives the features of a clip that stands still"
        )
    return state, notes


def frame_config(source: Any, channels: int) -> dict[str, Any]:
    """Return timm's `config.json`; see `timm.config_of`."""
    args = source.config()["args"]
    size = list(args["image_size"][1:])
    pool = {"global_pool": "avg", "fc_norm": False} if source.pool == "mean" else {"global_pool": "token"}
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": source.embed_dim,
        "global_pool": pool["global_pool"],
        "model_args": {
            "in_chans": channels,
            "img_size": size,
            "patch_size": args["patch_size"],
            "embed_dim": args["hidden_size"],
            "depth": args["num_layers"],
            "num_heads": args["num_heads"],
            "mlp_ratio": args["mlp_dim"] / args["hidden_size"],
            **pool,
        },
        "pretrained_cfg": {
            "tag": "medssl",
            "num_classes": 0,
            "input_size": [channels, *size],
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
            "first_conv": "patch_embed.proj" if channels == 3 else None,
            "classifier": "head",
        },
    }
