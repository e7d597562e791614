"""The slice encoder of any weights, and the change that moves its tensors to a third axis; to other channels see `encoders.stem`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medssl.encoders.stem import shares
from medssl.errors import RequestError, WeightsError
from medssl.export.manifest import Weights, require_library
from medssl.export.verify import random_image
from medssl.registry import lookup

Inflation = Literal["repeat", "centre"]
JOINT = "medssl.SliceVolumeEncoder"
PREFIX = "slice_encoder.net."


@dataclass(frozen=True)
class Adaptation:
    """What a user may ask of an export beside its name.

    Args:
        channels: Input channels of the export; None keeps those of the weights, and takes 3 for torchvision.
        dims: 2 or 3 spatial axes; None takes 2, and 3 for `retinanet`.
        inflation: How a kernel gets its depth: `repeat`, each slice its share, or `centre`, zero but for the middle.
        image_size: (X, Y, Z) of a ViT of volumes; None keeps it.
    """

    channels: int | None = None
    dims: int | None = None
    inflation: Inflation = "repeat"
    image_size: tuple[int, ...] | None = None

    def check(self) -> None:
        """Raise RequestError at a value outside its range."""
        if self.channels is not None and self.channels < 1:
            raise RequestError(f"export: channels is {self.channels}; accepted: 1 or more")
        if self.image_size is not None and min(self.image_size, default=0) < 1:
            raise RequestError(f"export: image_size is {list(self.image_size)}; accepted: numbers of voxels, 1 or more")
        if self.dims not in (None, 2, 3):
            raise RequestError(f"export: dims is {self.dims}; accepted: 2, 3")
        if self.inflation not in ("repeat", "centre"):
            raise RequestError(f'export: inflation is "{self.inflation}"; accepted: repeat, centre')


def slice_encoder_of(weights: Weights, to: str) -> Weights:
    """Return the slice encoder alone: the weights themselves when they are one, else that inside a joint encoder.

    Raises:
        WeightsError: The weights are of another encoder, or the aggregator alone.
    """
    manifest = weights.manifest
    if manifest["part"] == "aggregator":
        raise WeightsError(
            f"export to {to} needs the slice encoder, and this is the part aggregator; give the run folder, joint.safetensors "
            "or slice_encoder.safetensors"
        )
    if manifest["library"] != JOINT:
        require_library(manifest, "timm", to)
        return weights
    with torch.device("meta"):  # to describe it, without weights
        inside = lookup("encoder", "image2d")(in_channels=weights.args["in_channels"], **weights.args["slice_encoder"])
    part = inside.part("slice_encoder").manifest
    state = {key.removeprefix(PREFIX): value for key, value in weights.state.items() if key.startswith(PREFIX)}
    return Weights(state, {**manifest, **part, "part": "slice_encoder"})


def inflate(state: Mapping[str, Tensor], inflation: Inflation) -> tuple[dict[str, Tensor], list[str]]:
    """Give every 2D kernel a depth equal to its width, along the last axis (Z, across slices); all else is copied.

    Not in the paper of the joint encoder; the recipe is that of I3D for video.

    Args:
        state: Tensors of a 2D network; kernels (O, C, k, k).
        inflation: `repeat` shares a kernel out over the depth: an image that is constant along depth gives the features of its slice,
            up to what the zero padding at both ends does. `centre` puts it in the middle: so it does at the ends too.

    Returns:
        Tensors with kernels (O, C, k, k, k), and a sentence.

    Reference:
        Carreira and Zisserman 2017 (arXiv 1705.07750), section 2.4.
    """
    kernels = {key for key, value in state.items() if value.ndim == 4}
    result = dict(state)
    for key in kernels:
        weight = state[key]
        depth = weight.shape[-1]
        if inflation == "repeat":
            result[key] = shares(weight, -1, depth)
        else:
            result[key] = torch.zeros(*weight.shape, depth, dtype=weight.dtype)
            result[key][..., depth // 2] = weight
    how = (
        "repeated over their depth and divided by it"
        if inflation == "repeat"
        else "placed in the middle of their depth, zero elsewhere"
    )
    note = f"{len(kernels)} kernels inflated along Z, {how}; all else copied; not in the paper, a start for training only"
    turn = (
        "rows and columns stay those of an axial slice as pretraining shows it, from anterior to posterior and from the patient's right to "
        'left: give volumes with axes to P, L and S (MONAI Orientationd(axcodes="PLS"))'
    )
    return result, [note, turn]


def grey_or_random(found: int, channels: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the test image for an encoder of `found` channels and that of an export of `channels`; grey where these differ."""
    if found == channels:
        image = random_image(found, size)
        return image, image
    grey = random_image(1, size)
    return grey.expand(-1, found, *size), grey.expand(-1, channels, *size)
