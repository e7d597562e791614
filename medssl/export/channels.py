"""Encoders of volumes with another number of input channels: every tensor that meets the image is shared out, or summed."""

from __future__ import annotations

from dataclasses import replace

import torch

from medssl.encoders.stem import adapt_stem
from medssl.export.manifest import Weights
from medssl.export.slices import grey_or_random
from medssl.export.verify import compare, source_encoder

INPUTS = {
    "monai.ViT": ("patch_embedding.patch_embeddings.weight",),
    "monai.SegResNet": ("convInit.conv.weight",),
    # the first two are of the decoder, which sees the image as well
    "monai.SwinUNETR": ("swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight"),
}
"""Library: convolutions of the image."""


def with_channels(weights: Weights, channels: int | None, to: str) -> tuple[Weights, list[str]]:
    """Return weights that take so many channels, and a sentence for each tensor that changed.

    A grey image in all channels gives the features (and, where there is a decoder, its output) that it gave before; this is checked.

    Args:
        weights: Of an encoder of `INPUTS`; its decoder is changed with it.
        channels: Wanted; None keeps them.
        to: Name of the export, for errors.

    Raises:
        WeightsError: From several channels to other several there is no rule, or features differ.
    """
    if channels is None or channels == weights.args["in_channels"]:
        return weights, []
    notes: list[str] = []
    parts = {"state": dict(weights.state), "decoder": dict(weights.decoder)}
    for tensors in parts.values():
        for key in INPUTS[weights.manifest["library"]]:
            if key in tensors:
                changed, said = adapt_stem(tensors, key, channels)
                tensors.update(changed)
                notes += said
    encoder = weights.manifest["encoder"]
    described = {**encoder, "args": {**encoder["args"], "in_channels": channels}}
    adapted = replace(weights, **parts, manifest={**weights.manifest, "encoder": described, "channels": channels})
    before, after = source_encoder(weights), source_encoder(adapted)
    size = weights.args.get("image_size") or [n * p for n, p in zip((2, 3, 1), before.patch_size, strict=True)]
    with torch.no_grad():
        shown = grey_or_random(weights.args["in_channels"], channels, tuple(size))
        outputs = [one.forward_features(image) for one, image in zip((before, after), shown, strict=True)]
        pairs = [(outputs[1].tokens, outputs[0].tokens), *zip(outputs[1].pyramid, outputs[0].pyramid, strict=True)]
        if weights.decoder:
            sees = [(image,) if weights.manifest["library"] == "monai.SwinUNETR" else () for image in shown]
            maps = [one.forward_decoder(out.pyramid, *more) for one, out, more in zip((before, after), outputs, sees, strict=True)]
            pairs.append((maps[1], maps[0]))
    compare(pairs, to)
    return adapted, notes
