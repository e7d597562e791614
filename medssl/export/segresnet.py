"""Weights for MONAI's SegResNet: its encoder, and its decoder where that was pretrained and asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medssl.export.adapt import adapted
from medssl.export.manifest import Weights, exported_manifest, require_library
from medssl.export.slices import Adaptation
from medssl.export.verify import ExportReport, compare, load_stock, random_image, read_pt, require_equal, source_encoder, write_pt
from medssl.weights import load_part, save_part

NAME = "segresnet"
DECODER = ("up_samples.", "up_layers.")
HEAD = ("conv_final.",)  # depends on the classes of the task: never exported


def write(folder: Path, weights: Weights, asked: Adaptation) -> ExportReport:
    """Write `segresnet.safetensors`, `.json` and `.pt`, reload them into a stock SegResNet and compare features.

    The comparison covers the outputs of all scales, and the decoder's output where it is exported.

    Args:
        folder: Existing, empty.
        weights: Of encoder `segresnet3d`.
        asked: Input channels.

    Raises:
        WeightsError: Another encoder, or the reloaded features differ.
    """
    require_library(weights.manifest, "monai.SegResNet", "segresnet")
    weights, changes = adapted(weights, asked, "segresnet")
    args = weights.args
    source = source_encoder(weights)
    facts = {"load_into": "SegResNet", "decoder": bool(weights.decoder), "adaptations": changes}
    tensors = {**weights.state, **weights.decoder}
    # the names are the encoder's own, so that medssl takes the file as well
    path = save_part(folder, NAME, tensors, exported_manifest(weights.manifest, to="segresnet", **facts), part="encoder")
    state, _ = load_part(path)
    write_pt(path.with_suffix(".pt"), state)

    network = stock_network(args)
    missing = load_stock(network, state, allowed_missing=HEAD if weights.decoder else DECODER + HEAD)
    require_equal(read_pt(path.with_suffix(".pt")), state, f"{NAME}.pt")
    network = network.eval().double()
    # other sizes on each axis, so that a permuted kernel shows
    image = random_image(args["in_channels"], [n * p for n, p in zip((2, 3, 1), source.patch_size, strict=True)])
    with torch.no_grad():
        bottleneck, scales = network.encode(image)
        pyramid = source.forward_features(image).pyramid
        pairs = [*zip(scales, pyramid, strict=True)]
        if weights.decoder:
            network.use_conv_final = False
            pairs.append((network.decode(bottleneck, scales[::-1]), source.forward_decoder(pyramid)))
    return ExportReport(
        files=tuple(path.with_suffix(suffix) for suffix in (".safetensors", ".json", ".pt")),
        matched=tuple(sorted(state)),
        missing=missing,
        unexpected=(),
        max_feature_difference=compare(pairs, "segresnet"),
        notes=tuple(changes),
    )


def stock_network(args: dict[str, Any], out_channels: int = 2) -> Any:
    """Build MONAI's SegResNet for a `segresnet3d` encoder's arguments."""
    from monai.networks.nets import SegResNet

    return SegResNet(
        spatial_dims=3,
        init_filters=args["init_filters"],
        in_channels=args["in_channels"],
        out_channels=out_channels,
        blocks_down=tuple(args["blocks_down"]),
        blocks_up=tuple(args["blocks_up"]),
    )
