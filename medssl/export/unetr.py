"""Weights for the ViT inside MONAI's UNETR: `UNETR.vit.load_state_dict(torch.load(...), strict=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medssl.errors import WeightsError
from medssl.export.adapt import adapted
from medssl.export.manifest import Weights, exported_manifest, require_library
from medssl.export.slices import Adaptation
from medssl.export.verify import ExportReport, compare, load_stock, random_image, read_pt, require_equal, source_encoder, write_pt
from medssl.layers.tokens import flatten_tokens
from medssl.weights import load_part, save_part

PATCH, LAYERS, TAPS = 16, 12, (3, 6, 9)  # fixed inside monai/networks/nets/unetr.py
NAME = "unetr_vit"


def write(folder: Path, weights: Weights, asked: Adaptation) -> ExportReport:
    """Write `unetr_vit.safetensors`, `.json` and `.pt`, reload them into a stock UNETR and compare features.

    The comparison covers the final tokens and the hidden states that UNETR's decoder taps.

    Args:
        folder: Existing, empty.
        weights: Of encoder `vit3d`.
        asked: Input channels, and of a ViT the image size.

    Raises:
        WeightsError: Another encoder, another patch size or depth than UNETR's, or the reloaded features differ.
    """
    require_library(weights.manifest, "monai.ViT", "unetr")
    weights, changes = adapted(weights, asked, "unetr")
    args = weights.args
    patch = args["patch_size"]
    patch = [patch] * 3 if isinstance(patch, int) else list(patch)
    if patch != [PATCH] * 3 or args["num_layers"] != LAYERS:
        raise WeightsError(
            f"export to unetr: the encoder has patch size {patch} and {args['num_layers']} layers; MONAI's UNETR has patch size "
            f"{PATCH} and {LAYERS} layers; export to safetensors or monai-bundle instead"
        )
    source = source_encoder(weights)
    manifest = exported_manifest(weights.manifest, to="unetr", load_into="UNETR.vit", adaptations=changes)
    path = save_part(
        folder, NAME, weights.state, manifest, part="encoder"
    )  # its names are ViT's, so that medssl takes the file as well
    write_pt(path.with_suffix(".pt"), weights.state)

    network = stock_network(args)
    state, _ = load_part(path)
    load_stock(network.vit, state)
    require_equal(read_pt(path.with_suffix(".pt")), state, f"{NAME}.pt")
    network = network.eval().double()
    image = random_image(args["in_channels"], args["image_size"])
    with torch.no_grad():
        tokens, hidden = network.vit(image)
        output = source.forward_features(image)
    pairs = [(tokens, output.tokens), *((hidden[i], flatten_tokens(output.pyramid[i])) for i in TAPS)]
    matched = tuple(f"vit.{key}" for key in sorted(state))
    return ExportReport(
        files=tuple(path.with_suffix(suffix) for suffix in (".safetensors", ".json", ".pt")),
        matched=matched,
        missing=tuple(sorted(set(network.state_dict()) - set(matched))),
        unexpected=(),
        max_feature_difference=compare(pairs, "unetr"),
        notes=tuple(changes),
    )


def stock_network(args: dict[str, Any], out_channels: int = 2) -> Any:
    """Build MONAI's UNETR for a `vit3d` encoder's arguments."""
    from monai.networks.nets import UNETR

    return UNETR(
        in_channels=args["in_channels"],
        out_channels=out_channels,
        img_size=tuple(args["image_size"]),
        hidden_size=args["hidden_size"],
        mlp_dim=args["mlp_dim"],
        num_heads=args["num_heads"],
        proj_type="conv",
        spatial_dims=3,
    )
