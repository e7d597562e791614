"""Encoders of volumes for other images: channels are shared out or summed wherever a tensor meets the image, positions of a ViT are resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from medssl.encoders.stem import adapt_stem
from medssl.errors import WeightsError
from medssl.export.manifest import Weights
from medssl.export.slices import Adaptation, grey_or_random
from medssl.export.verify import compare, random_image, source_encoder
from medssl.layers.pos_embed import resize_positions

INPUTS = {
    "monai.ViT": ("patch_embedding.patch_embeddings.weight",),
    "monai.SegResNet": ("convInit.conv.weight",),
    # the first two are of the decoder, which sees the image as well
    "monai.SwinUNETR": ("swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight"),
}
"""Library: convolutions of the image."""


POSITIONS = "patch_embedding.position_embeddings"


def adapted(weights: Weights, asked: Adaptation, to: str) -> tuple[Weights, list[str]]:
    """Return weights for the channels and the image size that were asked for, and a sentence for each tensor that changed; see below."""
    weights, resized = with_image_size(weights, asked.image_size, to)
    weights, spread = with_channels(weights, asked.channels, to)
    return weights, [*resized, *spread]


def with_image_size(weights: Weights, size: Sequence[int] | None, to: str) -> tuple[Weights, list[str]]:
    """Return weights of a ViT for images of another size: the table of positions is resized, as the encoder itself does with such an image.

    Args:
        weights: Of an encoder of `INPUTS`.
        size: (X, Y, Z) in voxels; None keeps it.
        to: Name of the export, for errors.

    Raises:
        WeightsError: The encoder takes any size, or patches do not divide this one, or features differ.
    """
    known = weights.args.get("image_size")
    if size is None or (known is not None and list(known) == list(size)):
        return weights, []
    if known is None:
        raise WeightsError(
            f"export to {to}: {weights.manifest['encoder']['name']} has no table of positions and takes images of any size; leave image_size out"
        )
    before = source_encoder(weights)
    patch = before.patch_size
    if len(size) != len(patch) or any(n % p for n, p in zip(size, patch)):
        raise WeightsError(
            f"export to {to}: image_size {_by(size)}; {len(patch)} numbers are needed, multiples of the patch of {_by(patch)}; choose others"
        )
    old, new = ([n // p for n, p in zip(shape, patch)] for shape in (known, size))
    state = {**weights.state, POSITIONS: resize_positions(weights.state[POSITIONS], old, new)}
    changed = _described(replace(weights, state=state), {"image_size": list(size)}, {"image_size": list(size)})
    image = random_image(before.in_channels, size)
    with torch.no_grad():
        pairs = [(source_encoder(changed).forward_features(image).tokens, before.forward_features(image).tokens)]
    compare(pairs, to)
    note = f"{POSITIONS}: from images of {_by(known)} to {_by(size)} voxels, {_by(old)} tokens resized to {_by(new)} (trilinear)"
    return changed, [note]


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
                state, said = adapt_stem(tensors, key, channels)
                tensors.update(state)
                notes += said
    changed = _described(replace(weights, **parts), {"in_channels": channels}, {"channels": channels})
    before, after = source_encoder(weights), source_encoder(changed)
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
    return changed, notes


def _described(weights: Weights, args: dict[str, Any], facts: dict[str, Any]) -> Weights:
    """Return weights whose manifest has other arguments of the encoder, and other facts."""
    encoder = weights.manifest["encoder"]
    return replace(weights, manifest={**weights.manifest, **facts, "encoder": {**encoder, "args": {**encoder["args"], **args}}})


def _by(values: Sequence[int]) -> str:
    return " x ".join(map(str, values))
