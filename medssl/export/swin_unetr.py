"""Weights for MONAI's SwinUNETR, under its own names and in the layout that `SwinUNETR.load_from` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.export.adapt import adapted
from medssl.export.manifest import Weights, exported_manifest, require_library
from medssl.export.slices import Adaptation
from medssl.export.verify import ExportReport, compare, load_stock, random_image, read_pt, require_equal, source_encoder, write_pt
from medssl.weights import load_part, save_part

NAME = "swin_unetr"
ENCODER = "swinViT."
DECODER = ("encoder", "decoder")
HEAD = ("out.",)  # depends on the classes of the task: never exported
RENAMED = {".mlp.linear1.": ".mlp.fc1.", ".mlp.linear2.": ".mlp.fc2."}


def write(folder: Path, weights: Weights, asked: Adaptation) -> ExportReport:
    """Write the weights in both layouts, reload each into a stock SwinUNETR and compare features.

    `swin_unetr.safetensors`, `.json` and `.pt` have the names of the model; `swin_unetr_load_from.pt` is what `SwinUNETR.load_from` takes
    (`torch.load` it first); it holds `swinViT` only. The comparison covers the five hidden states that the decoder sees, and the
    decoder's output where it is exported.

    Args:
        folder: Existing, empty.
        weights: Of encoder `swin3d`.
        asked: Input channels.

    Raises:
        WeightsError: Another encoder, or the reloaded features differ.
    """
    require_library(weights.manifest, "monai.SwinUNETR", "swin-unetr")
    weights, changes = adapted(weights, asked, "swin-unetr")
    args = weights.args
    source = source_encoder(weights)
    facts = {"load_into": "SwinUNETR", "decoder": bool(weights.decoder), "adaptations": changes}
    tensors = {**weights.state, **weights.decoder}
    # the names are the encoder's own, so that medssl takes the file as well
    path = save_part(folder, NAME, tensors, exported_manifest(weights.manifest, to="swin-unetr", **facts), part="encoder")
    state, _ = load_part(path)
    write_pt(path.with_suffix(".pt"), state)
    old = folder / f"{NAME}_load_from.pt"
    torch.save({"state_dict": load_from_layout(weights.state)}, old)

    network = stock_network(args)
    missing = load_stock(network, state, allowed_missing=HEAD if weights.decoder else DECODER + HEAD)
    require_equal(read_pt(path.with_suffix(".pt")), state, f"{NAME}.pt")
    other = stock_network(args)
    other.load_from(torch.load(old, map_location="cpu", weights_only=True))
    loaded = {key: value for key, value in other.state_dict().items() if key.startswith(ENCODER)}
    require_equal(loaded, weights.state, old.name)
    network, other = network.eval().double(), other.eval().double()
    # other sizes on each axis, so that a permuted kernel shows
    image = random_image(args["in_channels"], [n * p for n, p in zip((2, 3, 1), source.patch_size, strict=True)])
    with torch.no_grad():
        pyramid = source.forward_features(image).pyramid
        pairs = [*zip(network.swinViT(image, network.normalize), pyramid, strict=True)]
        pairs += [*zip(other.swinViT(image, other.normalize), pyramid, strict=True)]
        if weights.decoder:
            network.out = torch.nn.Identity()
            pairs.append((network(image), source.forward_decoder(pyramid, image)))
    suffixes = (".safetensors", ".json", ".pt")
    return ExportReport(
        files=(*(path.with_suffix(suffix) for suffix in suffixes), old),
        matched=tuple(sorted(state)),
        missing=missing,
        unexpected=(),
        max_feature_difference=compare(pairs, "swin-unetr"),
        notes=(
            *changes,
            f"{old.name}: SwinUNETR.load_from(torch.load(...)); the other files: load_state_dict(..., strict=False)",
            f"SwinUNETR(feature_size={args['feature_size']}, in_channels={args['in_channels']}); neither layout adapts either",
        ),
    )


def load_from_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors named as `SwinUNETR.load_from` asks for them: prefix `module.` for `swinViT.`, `fc1` and `fc2` for the linear layers.

    Args:
        state: Tensors under the model's own names, `swinViT.*`.
    """
    renamed = {}
    for key, value in state.items():
        name = "module." + key.removeprefix(ENCODER)
        for own, asked in RENAMED.items():
            name = name.replace(own, asked)
        renamed[name] = value.detach().cpu().contiguous().clone()
    return renamed


def stock_network(args: dict[str, Any], out_channels: int = 2) -> Any:
    """Build MONAI's SwinUNETR for a `swin3d` encoder's arguments."""
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(
        in_channels=args["in_channels"],
        out_channels=out_channels,
        feature_size=args["feature_size"],
        depths=tuple(args["depths"]),
        num_heads=tuple(args["num_heads"]),
        window_size=tuple(args["window_size"]),
        spatial_dims=3,
    )
