"""Labelled volumes in memory: reading them through their domain, cutting training crops, and preparing whole volumes.

Training crops are made by `VolumeViews`, so fine-tuning sees intensities, padding and augmentation exactly as
pretraining did.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.errors import GeometryError, ImageError, RequestError, near
from medssl.evaluation.cohort import Case
from medssl.registry import lookup
from medssl.seeding import counter_rng
from medssl.types import Box, DrawKey
from medssl.views.intensity import normalization, normalize_
from medssl.views.pipeline import Crop, VolumeViews

VIEW = "finetune"
NOT_AUGMENTATION = ("name", "size", "spacing_mm", "count", "normalize", "mask")
POINTS = 4096  # voxels kept per structure to centre crops on


@dataclass(frozen=True)
class Volume:
    """A labelled volume.

    Args:
        image: (1, X, Y, Z), stored dtype, RAS+.
        valid: (X, Y, Z) bool, True = real content.
        label: (X, Y, Z) int16; None when the case has none.
        spacing_mm: Voxel size.
        affine: (4, 4) voxel centre index to RAS+ mm.
        stats: Intensity statistics of the domain.
        points: Structure to (K, 3) voxel indices inside it, at most `POINTS`, evenly taken.
    """

    image: np.ndarray
    valid: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    stats: Mapping[str, float]
    points: Mapping[int, np.ndarray] = field(default_factory=dict)


class CaseReader:
    """Reads cases through their domain and keeps them in memory up to a budget.

    Args:
        domain: Registered domain name.
        budget_bytes: Volumes beyond this are read again at each use.
    """

    def __init__(self, domain: str, budget_bytes: int = 8 << 30) -> None:
        self.domain = lookup("domain", domain)()
        self.left = budget_bytes
        self.kept: dict[str, Volume] = {}

    def __call__(self, case: Case) -> Volume:
        """Return a case.

        Raises:
            ImageError: The image cannot be used.
            GeometryError: The label map lies on another grid than the image.
        """
        if case.id in self.kept:
            return self.kept[case.id]
        volume = self._read(case)
        size = volume.image.nbytes + volume.valid.nbytes + (0 if volume.label is None else volume.label.nbytes)
        if size <= self.left:
            self.left -= size
            self.kept[case.id] = volume
        return volume

    def _read(self, case: Case) -> Volume:
        from medssl.domains.volume_files import read_label

        folder = case.image.is_dir()
        files = sorted(p for p in case.image.rglob("*") if p.is_file()) if folder else [case.image]
        sample = self.domain.read(files, series_id=case.id)
        shape = sample.image.shape[1:]
        try:
            label = None if case.label is None else read_label(case.label, like=sample).astype(np.int16)
        except ImageError as err:  # its text holds the file's name, which may be a patient's
            assert case.label is not None
            text = f"case {case.id}: {str(err).replace(case.label.name, 'map')}"
            raise (GeometryError(text) if isinstance(err, GeometryError) else ImageError(err.reason, text)) from None
        return Volume(
            image=sample.image,
            valid=np.ones(shape, dtype=bool) if sample.valid is None else sample.valid,
            label=label,
            spacing_mm=sample.spacing_mm,
            affine=sample.affine,
            stats=sample.meta.stats,
            points={} if label is None else structure_points(label),
        )


def structure_points(label: np.ndarray) -> dict[int, np.ndarray]:
    """Return label value to (K, 3) voxel indices, K at most `POINTS`, taken evenly in scan order."""
    points = {}
    for value in np.unique(label):
        if value > 0:
            inside = np.flatnonzero(label == value)
            if len(inside) > POINTS:
                inside = inside[np.linspace(0, len(inside) - 1, POINTS).astype(np.int64)]
            points[int(value)] = np.stack(np.unravel_index(inside, label.shape), axis=1)
    return points


class TrainingCrops:
    """Random crops of labelled volumes, a function of (seed, step, position) alone.

    Args:
        size: Crop in voxels.
        spacing_mm: Voxel size of the crops; None keeps each volume's own.
        normalize: As in `VolumeViews`.
        augment: Geometric and intensity operations of `VolumeViews`.
        foreground: Share of crops centred on a voxel of a structure.
        seed: Seed.
        device: Where crops are made.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        spacing_mm: Sequence[float] | None,
        normalize: str | Mapping[str, Any],
        augment: Mapping[str, Any],
        foreground: float,
        seed: int,
        device: torch.device,
    ) -> None:
        known = [name for name in inspect.signature(VolumeViews).parameters if name not in NOT_AUGMENTATION]
        unknown = [f"{name}{near(name, known)}" for name in augment if name not in known]
        if unknown:
            raise RequestError(f"augment: unknown key {', '.join(unknown)}; accepted are {', '.join(known)}; correct it")
        self.views = VolumeViews(VIEW, size=size, spacing_mm=spacing_mm, normalize=normalize, **augment)
        self.foreground = foreground
        self.seed = seed
        self.device = device

    def batch(self, volumes: Sequence[Volume], step: int) -> tuple[Tensor, Tensor]:
        """Cut one crop from each volume.

        Returns:
            Images (B, 1, *size) float32 and labels (B, 1, *size) int64.
        """
        crops, labels = [], []
        for position, volume in enumerate(volumes):
            crop, label = self.cut(volume, DrawKey(self.seed, step, position))
            crops.append(crop)
            labels.append(label)
        params = [[self.views.draw(crop.key, 0)] for crop in crops]
        out = self.views.apply(crops, params, self.device, labels=labels)
        return out[VIEW][:, 0], out["labels"]

    def cut(self, volume: Volume, key: DrawKey) -> tuple[Crop, np.ndarray]:
        """Draw a box and cut it out with the margin that the views need, zero-padded outside the volume."""
        assert volume.label is not None
        box = self.draw_box(volume, key)
        spacing = np.asarray(volume.spacing_mm)
        margin = np.asarray(self.views.margin_mm(volume.spacing_mm))
        low = np.floor((np.asarray(box.start_mm) - margin) / spacing + 1e-6).astype(int)
        high = np.ceil((np.asarray(box.start_mm) + np.asarray(box.size_mm) + margin) / spacing - 1e-6).astype(int)
        crop = Crop(
            image=cut(volume.image, low, high),
            valid=cut(volume.valid, low, high),
            spacing_mm=volume.spacing_mm,
            origin_mm=tuple(float(v) for v in low * spacing),
            box=box,
            stats=volume.stats,
            key=key,
            id=key.position,
        )
        return crop, cut(volume.label, low, high)

    def draw_box(self, volume: Volume, key: DrawKey) -> Box:
        """Draw where to cut: on a structure, each as often as the others, or anywhere.

        The box lies inside the volume along axes where it fits; along shorter axes it holds the whole volume, shifted
        at random. Its corner is on a voxel corner, so that without geometric augmentation voxels are copied.
        """
        rng = counter_rng(key.seed, key.step, key.position, VIEW, "box")
        spacing = np.asarray(volume.spacing_mm)
        size = np.asarray(self.views.box_size_mm(volume.spacing_mm))
        room = np.asarray(volume.label.shape if volume.label is not None else volume.valid.shape) * spacing - size
        low, high = np.minimum(room, 0.0), np.maximum(room, 0.0)
        u = rng.random(3)
        if volume.points and rng.random() < self.foreground:
            points = volume.points[sorted(volume.points)[int(rng.integers(len(volume.points)))]]
            centre = (points[int(rng.integers(len(points)))] + 0.5) * spacing
            start = np.clip(centre - size / 2, low, high)
            short = room < 0  # a fixed place would repeat the same crop: along short axes the shift stays free
            start = np.where(short, low + u * (high - low), start)
        else:
            start = low + u * (high - low)
        start = np.rint(start / spacing) * spacing
        return Box((float(start[0]), float(start[1]), float(start[2])), (float(size[0]), float(size[1]), float(size[2])))


def cut(array: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the last three axes from `low` to `high`, zero-padded outside."""
    shape = np.asarray(array.shape[-3:])
    inner_low, inner_high = np.clip(low, 0, shape), np.clip(high, 0, shape)
    out = np.zeros((*array.shape[:-3], *(high - low)), dtype=array.dtype)
    if (inner_high > inner_low).all():
        tx, ty, tz = (slice(a, b) for a, b in zip(inner_low - low, inner_high - low))
        sx, sy, sz = (slice(a, b) for a, b in zip(inner_low, inner_high))
        out[..., tx, ty, tz] = array[..., sx, sy, sz]
    return out


def whole_image(
    volume: Volume,
    normalize: str | Mapping[str, Any],
    spacing_mm: Sequence[float] | None,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Return a whole volume as the network sees it.

    Args:
        volume: The volume.
        normalize: As in `VolumeViews`.
        spacing_mm: Voxel size wanted; None keeps the volume's own.
        device: Where it goes.

    Returns:
        (1, C, X, Y, Z) float32, and the value that stands for padding.
    """
    name, window = (normalize, None) if isinstance(normalize, str) else ("window", tuple(normalize["window"]))
    how = normalization(name, window, volume.stats, 0)
    image = torch.from_numpy(volume.image.astype(np.float32)).to(device)
    valid = torch.from_numpy(volume.valid).to(device)
    image = normalize_(image, how).masked_fill_(~valid, how.padding)[None]
    if spacing_mm is not None and not np.allclose(spacing_mm, volume.spacing_mm, rtol=1e-6):
        shape = [max(1, round(n * own / new)) for n, own, new in zip(image.shape[2:], volume.spacing_mm, spacing_mm)]
        image = nn.functional.interpolate(image, size=shape, mode="trilinear", align_corners=False)
    return image, how.padding
