"""What a probe must beat: an untrained encoder, the image itself made small, and a handful of intensity statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from medssl.errors import RequestError
from medssl.evaluation.features import Batch, Readout, embed, pooled
from medssl.seeding import derive_seed
from medssl.types import ClipBatch, Stack

PERCENTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def random_init(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build an untrained encoder whose weights depend on the seed alone; the global generators stay as they were.

    Args:
        build: Builds the encoder of the run, on the CPU, with its own initialisation.
        seed: Seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):  # constructors of torch and MONAI modules draw from the global generator only
        torch.manual_seed(derive_seed(seed, "random_init"))
        return build()


def as_images(shown: Tensor | Stack | ClipBatch) -> Tensor:
    """Return images as they are, planes of a stack as a volume (B, C, N, H, W), and frames of a clip as (B, C, T, H, W)."""
    if isinstance(shown, Stack):
        return shown.planes.transpose(1, 2)
    return shown.video if isinstance(shown, ClipBatch) else shown


def small_images(images: Tensor, size: int = 8) -> Tensor:
    """Return images averaged over a coarse grid, as rows.

    Args:
        images: (B, C, *spatial), 2 or 3 spatial axes.
        size: Cells per axis.

    Returns:
        (B, C * size ** axes).
    """
    pool = {2: nn.functional.adaptive_avg_pool2d, 3: nn.functional.adaptive_avg_pool3d}.get(images.ndim - 2)
    if pool is None:
        raise RequestError(f"small_images: a batch of shape {tuple(images.shape)}; it takes (B, C, H, W) or (B, C, X, Y, Z)")
    return pool(images.float(), size).flatten(1)


def intensity_statistics(images: Tensor) -> Tensor:
    """Return mean, standard deviation, minimum, maximum and percentiles of each channel: nothing about places.

    Args:
        images: (B, C, *spatial).

    Returns:
        (B, 11 * C): per statistic in the order above (percentiles 1, 5, 25, 50, 75, 95, 99), all channels.
    """
    voxels = images.double().flatten(2)  # (B, C, voxels)
    ordered = voxels.sort(dim=2).values
    # torch.quantile refuses inputs above 2 ** 24 elements: the nearest rank of the sorted voxels instead
    ranks = [round(p * (voxels.shape[2] - 1)) for p in PERCENTILES]
    moments = [voxels.mean(dim=2), voxels.std(dim=2, correction=0), ordered[..., 0], ordered[..., -1]]
    return torch.cat([*moments, *(ordered[..., rank] for rank in ranks)], dim=1)


def control_features(
    build: Callable[[], nn.Module],
    batches: Callable[[], Iterable[Batch]],
    *,
    seed: int = 0,
    size: int = 8,
    device: torch.device | str = "cpu",
    readout: Readout = pooled,
) -> dict[str, np.ndarray]:
    """Compute the features of all controls for `probe_table`.

    Args:
        build: Builds the encoder of the run (see `random_init`).
        batches: Called for each pass over the images; the same images in the same order as the encoder sees.
        seed: Seed of the untrained encoder.
        size: Cells per axis of the small image.
        device: Where the untrained encoder runs.
        readout: What is read off the untrained encoder, as off the trained one (`embed`).

    Returns:
        `random_init` (N, E), `raw_pixels` (N, C * size ** axes), `intensity_statistics` (N, 11 * C).
    """
    untrained, _ = embed(random_init(build, seed).to(device), batches(), readout)
    pixels, statistics = [], []
    for shown, _ in batches():
        images = as_images(shown)
        pixels.append(small_images(images, size).cpu().numpy())
        statistics.append(intensity_statistics(images).cpu().numpy())
    return {
        "random_init": untrained,
        "raw_pixels": np.concatenate(pixels),
        "intensity_statistics": np.concatenate(statistics),
    }
