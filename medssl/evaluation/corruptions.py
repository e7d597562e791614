"""What scanners and hands do to images, at five levels each, for asking how much a score falls.

Images are (B, C, *spatial) float32 as an encoder sees them, or stacks of planes, or clips;
strengths are relative to the standard deviation of each image, so that they
mean the same for every normalisation. Level 0 leaves an image as it is. What is drawn for an image hangs on the seed and its own number, not on
the batch it comes in; it is one pattern at all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from medssl.errors import RequestError, near
from medssl.seeding import derive_seed
from medssl.types import ClipBatch, Stack

LEVELS = 5
SHIFT = 3.0
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.05, 0.1, 0.2, 0.35, 0.5),
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),
    "contrast": (0.85, 0.7, 0.55, 0.4, 0.25),
    "motion": (0.1, 0.2, 0.3, 0.45, 0.6),
    "anisotropy": (1.5, 2.0, 3.0, 4.0, 6.0),
}
"""noise: std of white noise, in stds of the image; blur: sigma in pixels; contrast: factor on the deviation from the mean; motion: share of
the k-space lines that are taken while the object is up to 3 pixels away; anisotropy: factor by which the last axis (planes of a stack, frames of
a clip) is thinned and filled in again."""

Seen = Tensor | Stack | ClipBatch
"""What an encoder sees of B items."""

KINDS = (*STRENGTHS, "stain")
"""All corruptions of the suite; `stain` needs colours, and is in `evaluation.stain`."""


def corrupt_seen(seen: Seen, kind: str, level: int, keys: Sequence[int], *, seed: int = 0) -> Seen:
    """Corrupt images, the planes of stacks, or the frames of clips, each item as one image.

    Nothing is blurred from plane to plane; noise is drawn for each plane, the lines of motion once for all. Padding, frames that are filled
    in, and pixels outside the sector stay as they are: nobody scanned them.

    Args:
        seen: B items.
        kind: As in `corrupt`.
        level: 0 to 5.
        keys: (B,) number of each item.
        seed: Of noise and motion.

    Returns:
        The same of its kind; what is given is left alone.

    Raises:
        RequestError: There is no such kind or level.
    """
    if isinstance(seen, Tensor):
        return corrupt(seen, kind, level, keys, seed=seed)
    planes = seen.planes if isinstance(seen, Stack) else seen.video.transpose(1, 2)  # (B, N, C, H, W)
    found = planes.clone()
    for row, (own, valid, key) in enumerate(zip(planes, seen.valid, keys, strict=True)):
        image = own[valid].permute(1, 2, 3, 0)[None]  # (1, C, H, W, planes)
        found[row, valid] = corrupt(image, kind, level, [key], seed=seed, planes=True)[0].permute(3, 0, 1, 2)
    if isinstance(seen, Stack):
        return replace(seen, planes=found)
    video = found.transpose(1, 2)
    return replace(seen, video=torch.where(seen.sector[:, :, None], video, seen.video))


def corrupt(images: Tensor, kind: str, level: int, keys: Sequence[int], *, seed: int = 0, planes: bool = False) -> Tensor:
    """Corrupt images.

    Args:
        images: (B, C, *spatial), two or three spatial axes.
        kind: Of `STRENGTHS`.
        level: 0 to 5.
        keys: (B,) number of each image, for noise and motion.
        seed: Of noise and motion.
        planes: Whether the last of three axes counts planes, over which nothing is blurred.

    Returns:
        (B, C, *spatial) of the same dtype, on the same device.

    Raises:
        RequestError: There is no such kind or level.

    Reference:
        Five levels of severity: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
        Perturbations", section 4. The strengths are ours.
    """
    if kind not in STRENGTHS:
        raise RequestError(f'corruption "{kind}"{near(kind, STRENGTHS)}; accepted: {", ".join(STRENGTHS)}')
    if not 0 <= level <= LEVELS:
        raise RequestError(f"level {level}; accepted: 0 to {LEVELS}")
    if level == 0:
        return images
    strength = STRENGTHS[kind][level - 1]
    x = images.float()
    draws = [torch.Generator().manual_seed(derive_seed(seed, "corruption", kind, int(key))) for key in keys]
    if kind == "noise":
        axes = tuple(range(1, x.dim()))
        noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws]).to(x.device)
        found = x + strength * x.std(dim=axes, keepdim=True) * noise
    elif kind == "blur":
        found = _blurred(x, strength, axes=2 if planes else x.dim() - 2)
    elif kind == "contrast":
        mean = x.mean(dim=tuple(range(1, x.dim())), keepdim=True)
        found = mean + strength * (x - mean)
    elif kind == "motion":
        found = torch.cat([_moved(row[None], strength, draw) for row, draw in zip(x, draws, strict=True)])
    else:
        found = _thinned(x, strength)
    return found.to(images.dtype)


def _blurred(x: Tensor, sigma: float, axes: int) -> Tensor:
    radius = max(1, math.ceil(3 * sigma))
    place = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(2, 2 + axes):
        moved = x.movedim(axis, -1)
        rows = moved.reshape(-1, 1, moved.shape[-1])
        padded = functional.pad(rows, (radius, radius), mode="replicate")
        x = functional.conv1d(padded, kernel[None, None]).reshape(moved.shape).movedim(-1, axis)
    return x


def _moved(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Shift the object along the first spatial axis while a share of the lines of k-space along the second are taken: ghosts and blur.

    A shift by s pixels multiplies a line by exp(-2 pi i k s / n). The middle tenth of the lines, which holds the contrast, stays.
    """
    height, width = x.shape[2:4]
    spectrum = torch.fft.fftn(x, dim=(2, 3))
    order = torch.randperm(width, generator=generator)
    away = SHIFT * (2 * torch.rand(width, generator=generator) - 1)
    outer = order[(torch.fft.fftfreq(width)[order]).abs() > 0.05]
    moved = outer[: max(1, round(share * len(outer)))]
    shift = torch.zeros(width)
    shift[moved] = away[moved]
    k = torch.fft.fftfreq(height)
    phase = torch.exp(-2j * math.pi * k[:, None] * shift[None, :]).to(x.device)
    phase = phase.reshape(1, 1, height, width, *(1,) * (x.dim() - 4))
    found: Tensor = torch.fft.ifftn(spectrum * phase, dim=(2, 3)).real
    return found


def _thinned(x: Tensor, factor: float) -> Tensor:
    """Average the last axis to fewer slices and fill it in again, linearly."""
    length = x.shape[-1]
    rows = x.reshape(-1, 1, length)
    few = functional.adaptive_avg_pool1d(rows, max(1, round(length / factor)))
    return functional.interpolate(few, size=length, mode="linear", align_corners=False).reshape(x.shape)


def relative_robustness(clean: float, corrupted: Sequence[float], chance: float = 0.0) -> float:
    """Return what is left of a score above chance, mean over corruptions: 1 is all, 0 none; NaN when the clean score is at chance."""
    if clean <= chance or not len(corrupted):
        return float("nan")
    return sum((value - chance) / (clean - chance) for value in corrupted) / len(corrupted)
