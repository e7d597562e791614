"""A supervised baseline that configures itself: spacing, crop, stages, strides, kernels and normalisation from a fingerprint of training cases.

The rules are those that nnU-Net has published, written from the text. What a rule does not say is decided here. The training itself (steps,
batch, loss, learning rates, scoring) is not planned: it is that of the arms that the baseline stands beside.

Differences from the published method: the budget is a number of voxels per crop instead of graphics memory, so that all arms see as many voxels
per step; images are not cropped to their nonzero part, and interpolated linearly along all axes; there is one network at full resolution, without
deep supervision, cascade, ensemble or postprocessing, and it is the residual-encoder one of "nnU-Net Revisited" instead of the plain one.

Reference:
    Isensee et al. 2021, "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature Methods 18, Methods,
    "Inferred parameters", and supplementary note 2; Isensee et al. 2024, "nnU-Net Revisited" (arXiv 2404.09556) for blocks per stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation.cohort import Case
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.volumes import CaseReader, Volume

ARM = "self-configuring"
NETWORK, ENCODER = "resenc_unet", "resenc3d"
ANISOTROPIC = 3.0
"""Coarsest over finest median spacing above which the coarsest axis is resampled to its 10th percentile instead of its median."""
WITHIN = 2.0
"""Axes are halved, and convolved over, together while their spacings are within this factor."""
SMALLEST_MAP = 4
"""Voxels along an axis below which no feature map goes."""
FIRST_WIDTH, MOST_WIDTH = 32, 320
BLOCKS = (1, 3, 4, 6)
"""Residual blocks of the first stages; further ones have as many as the last."""
SAMPLE = 10_000
"""Foreground voxels of a case that enter percentiles, evenly taken in scan order."""
PLANNED = ("network", "network_args", "encoder", "spacing_mm", "crop", "normalize")
"""Fields of the settings that a plan decides."""

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Fingerprint:
    """What is known of training cases before anything is trained.

    Args:
        spacings_mm: Voxel size of each case.
        shapes: (X, Y, Z) voxels of each case.
        window: Percentiles 0.5 and 99.5 of the voxels of all structures in raw units; None where images are normalised one by one.
    """

    spacings_mm: tuple[Spacing, ...]
    shapes: tuple[Shape, ...]
    window: tuple[float, float] | None = None

    @property
    def spacing_mm(self) -> Spacing:
        """The voxel size that all cases are brought to: the median along each axis.

        Where the coarsest median is more than 3 times the finest, the coarsest axis has the 10th percentile: little of what
        thin slices show is lost then.
        """
        table = np.array(self.spacings_mm, dtype=np.float64)
        found = np.median(table, axis=0)
        if found.max() > ANISOTROPIC * found.min() * (1 + 1e-6):
            axis = int(found.argmax())
            found[axis] = np.percentile(table[:, axis], 10)
        return float(found[0]), float(found[1]), float(found[2])

    @property
    def shape(self) -> Shape:
        """The median number of voxels along each axis at that voxel size."""
        sizes = np.array(self.shapes) * np.array(self.spacings_mm) / np.array(self.spacing_mm)
        found = np.maximum(1, np.rint(np.median(np.rint(sizes), axis=0)).astype(int))
        return int(found[0]), int(found[1]), int(found[2])

    def facts(self) -> dict[str, Any]:
        """Return what a result says of it: no number of a single case."""
        window = None if self.window is None else list(self.window)
        return {"n": len(self.shapes), "spacing_mm": list(self.spacing_mm), "shape": list(self.shape), "foreground": window}


@dataclass(frozen=True)
class Plan:
    """A fingerprint, and the fields of `FinetuneSettings` that follow from it."""

    fingerprint: Fingerprint
    settings: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """Return it for a result."""
        return {"fingerprint": self.fingerprint.facts(), "settings": dict(self.settings)}


def fingerprint(volumes: Iterable[Volume], *, ct: bool = False) -> Fingerprint:
    """Return the fingerprint of labelled training cases.

    Args:
        volumes: Training cases alone; one is held at a time.
        ct: Whether intensities mean the same in all images (HU), so that percentiles over all cases are taken. All structures are foreground.

    Raises:
        RequestError: There is no labelled volume, a case is a picture, or with `ct` no label has a voxel.
    """
    spacings, shapes, values = list[Spacing](), list[Shape](), list[np.ndarray]()
    for volume in volumes:
        if volume.picture:
            raise RequestError(_pictures("a case is a picture"))
        if volume.label is None:
            raise RequestError(f"{ARM} network: a training case has no label map; give labelled cases alone")
        x, y, z = volume.label.shape
        spacings.append(volume.spacing_mm)
        shapes.append((x, y, z))
        if ct:
            inside = np.flatnonzero(volume.label > 0)
            if len(inside) > SAMPLE:
                inside = inside[np.linspace(0, len(inside) - 1, SAMPLE).astype(np.int64)]
            values.append(volume.image[0].reshape(-1)[inside].astype(np.float64))
    if not shapes:
        raise RequestError(f"{ARM} network: no labelled training case to take a fingerprint of; mark labelled cases as train")
    if not ct:
        return Fingerprint(tuple(spacings), tuple(shapes))
    pooled = np.concatenate(values)
    if not len(pooled):
        raise RequestError(
            f"{ARM} network: the {len(shapes)} training label maps hold background only; correct them, or give others"
        )
    low, high = (float(value) for value in np.percentile(pooled, (0.5, 99.5)))
    return Fingerprint(tuple(spacings), tuple(shapes), (low, max(high, low + 1)))  # of one grey value, a window of one unit


def plan(found: Fingerprint, budget: int, channels: int = 1) -> dict[str, Any]:
    """Return the fields of `FinetuneSettings` that a fingerprint asks for.

    Args:
        found: Of training cases.
        budget: Most voxels of a crop.
        channels: Of the volumes.

    Raises:
        RequestError: No axis of the crop can be halved: the volumes are too small, or the budget is.
    """
    spacing, shape = found.spacing_mm, found.shape
    crop = crop_size(shape, budget)
    strides, kernels = topology(crop, spacing)
    if len(strides) == 1:
        raise RequestError(
            f"{ARM} network: of volumes of {_by(shape)} voxels at {_by(spacing)} mm (median of the training cases) a crop of {_by(crop)} is left "
            f"under a budget of {budget} voxels, and no axis of it has the {2 * SMALLEST_MAP} voxels that halving takes; give larger volumes "
            "or a larger crop"
        )
    stages = len(strides)
    arguments = {
        "in_channels": channels,
        "features_per_stage": [min(FIRST_WIDTH * 2**k, MOST_WIDTH) for k in range(stages)],
        "n_blocks_per_stage": [BLOCKS[min(k, len(BLOCKS) - 1)] for k in range(stages)],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "strides": [list(stride) for stride in strides],
    }
    return {
        "network": NETWORK,
        "network_args": {},
        "encoder": {"name": ENCODER, "args": arguments},
        "spacing_mm": spacing,
        "crop": crop,
        "normalize": "zscore" if found.window is None else {"window": list(found.window)},
    }


def crop_size(shape: Sequence[int], budget: int) -> Shape:
    """Return the crop: the median shape, made smaller until it has no more voxels than the budget, each axis a multiple of what it is halved by.

    The axis that is largest relative to the median shape is made smaller first, of equal ones that with more voxels, then the first. None goes
    below 4.
    """
    crop = [_divisible(n) for n in shape]
    while prod(crop) > budget:
        larger = [axis for axis in range(3) if crop[axis] > SMALLEST_MAP]
        if not larger:
            break
        axis = max(larger, key=lambda a: (crop[a] / shape[a], crop[a], -a))
        crop[axis] -= 2 ** halvings(crop[axis])
    return crop[0], crop[1], crop[2]


def halvings(size: int) -> int:
    """Return how often an axis is halved before a map would have fewer than 4 voxels along it."""
    return max(0, (size // SMALLEST_MAP).bit_length() - 1)


def _divisible(size: int) -> int:
    """Return the next size that can be halved as often as it is to be."""
    step: int = 2 ** halvings(size)
    return -(-size // step) * step


def topology(crop: Sequence[int], spacing_mm: Sequence[float]) -> tuple[list[Shape], list[Shape]]:
    """Return strides and kernels of each stage, the first at full resolution.

    From stage to stage those axes are halved whose spacing is no more than 2 times the finest among the axes that still can be: fine axes catch
    up first, then all go together. An axis has kernel 1 until its spacing is for the first time no more than 2 times the finest of all, and 3 from
    there on.

    Args:
        crop: Voxels along each axis, multiples of what `halvings` says.
        spacing_mm: Voxel size.
    """
    sizes, spacing = list(crop), list(spacing_mm)
    strides: list[Shape] = [(1, 1, 1)]
    kernels: list[Shape] = []
    joined = [False] * 3
    while True:
        joined = [was or _within(own, min(spacing)) for was, own in zip(joined, spacing)]
        kernels.append(_triple(3 if one else 1 for one in joined))
        free = [n >= 2 * SMALLEST_MAP for n in sizes]
        if not any(free):
            return strides, kernels
        finest = min(own for own, can in zip(spacing, free) if can)
        stride = _triple(2 if can and _within(own, finest) else 1 for own, can in zip(spacing, free))
        sizes = [n // by for n, by in zip(sizes, stride)]
        spacing = [own * by for own, by in zip(spacing, stride)]
        strides.append(stride)


def _within(spacing: float, finest: float) -> bool:
    return spacing <= WITHIN * finest * (1 + 1e-6)  # headers round


def _triple(values: Iterable[int]) -> Shape:
    x, y, z = values
    return x, y, z


def starting_point(settings: FinetuneSettings) -> FinetuneSettings:
    """Return the settings of the other arms as the baseline starts from them: its network, and nothing that belongs to another one.

    Raises:
        RequestError: They are for pictures.
    """
    if settings.pictures:
        raise RequestError(_pictures(f"crop {list(settings.crop)} is of pictures"))
    return replace(settings, network=NETWORK, network_args={}, encoder={"name": ENCODER, "args": {}}, transfer="encoder")


def configure(cases: Sequence[Case], reader: CaseReader, settings: FinetuneSettings) -> Plan:
    """Return the plan for a run on these training cases, whose crop has no more voxels than that of the other arms.

    Args:
        cases: The training cases of the run and no others.
        reader: Of images and label maps.
        settings: Result of `starting_point` for the channels of the cases; domain, channels and crop are used. Percentiles over all cases are of
            CT in one channel; several channels are normalised by image and channel.

    Raises:
        RequestError: See `fingerprint` and `plan`.
        ImageError: An image or label map cannot be used.
    """
    found = fingerprint((reader(case) for case in cases), ct=settings.domain == "ct" and settings.in_channels == 1)
    return Plan(found, plan(found, prod(settings.crop), settings.in_channels))


def said(labels: int, settings: Mapping[str, Any]) -> str:
    """Return a plan as a sentence.

    Args:
        labels: Number of training cases.
        settings: Result of `plan`, or as JSON gave it back.
    """
    args = settings["encoder"]["args"]
    factors = [prod(stride[axis] for stride in args["strides"]) for axis in range(3)]
    flat = [k for k in args["kernel_sizes"] if min(k) == 1]
    kernels = "kernels 3 throughout"
    if flat:
        kernels = f"kernels {', '.join(_by(k) for k in flat)} in the first {len(flat)} stage{'s' * (len(flat) > 1)}, then 3"
    window = settings["normalize"]
    intensities = "z-score of each image"
    if isinstance(window, Mapping):
        low, high = window["window"]
        intensities = f"{low:g} to {high:g} (percentiles 0.5 and 99.5 of the structures) to 0 to 1"
    return (
        f"The {ARM} network chose from its {labels} training cases: voxels of {_by(settings['spacing_mm'])} mm, crop {_by(settings['crop'])}, "
        f"{len(args['strides'])} stages, the last one {_by(factors)} times smaller, {kernels}, {intensities}."
    )


def _by(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _pictures(found: str) -> str:
    return (
        f"{ARM} network: {found}; its rules are those of volumes here; take it out (segmentation.self_configuring: false), the scratch twin stands "
        "beside the weights"
    )
