"""Intensities: normalisation from an item's own statistics, and random changes on the device.

Every function works in place on (C, *size) float32 and returns its argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medssl.errors import RequestError

NORMALIZATIONS = ("zscore", "percentile", "window", "none")


@dataclass(frozen=True)
class Normalization:
    """How the raw intensities of one item become those of a view: (x - offset) / divisor, clipped to [0, 1] or not.

    Args:
        offset: Subtracted, raw units.
        divisor: Divided by, raw units, positive.
        clip: Whether to clip to [0, 1].
        padding_raw: Raw value that stands for padding before interpolation.
        padding: Normalised value of padding.
        pivot: Normalised mean of the item, the fixed point of a contrast change.
    """

    offset: float
    divisor: float
    clip: bool
    padding_raw: float
    padding: float
    pivot: float


def normalization(name: str, window: tuple[float, float] | None, stats: Mapping[str, float], item: int) -> Normalization:
    """Return the normalisation of one item.

    `zscore`: (x - mean) / std. `percentile`: p00_5..p99_5 to [0, 1], clipped. `window`: lo..hi to [0, 1], clipped.
    `none`: unchanged.

    Padding becomes 0 where the result is clipped to [0, 1]. For `zscore` and `none` it becomes the item's minimum,
    but no less than its 0.5 percentile: air, or the darkest tissue, and never an outlier that one broken voxel
    decides (0 raw when `none` has no statistics).

    Args:
        name: One of `NORMALIZATIONS`.
        window: (lo, hi) for `window`.
        stats: Statistics of the item: `mean`, `std`, `p00_5`, `p99_5`, `min`.
        item: Id of the item, for messages.
    """
    needed = {"zscore": ("mean", "std", "min", "p00_5"), "percentile": ("p00_5", "p99_5")}.get(name, ())
    missing = [key for key in needed if key not in stats]
    if missing:
        raise RequestError(
            f"item {item}: no statistics {', '.join(missing)} (found: {', '.join(sorted(stats)) or 'none'}); "
            f"normalize={name!r} needs {', '.join(needed)}; write the store again, or use normalize='none' or a window"
        )
    mean = stats.get("mean")
    low = max(stats.get("min", 0.0), stats.get("p00_5", stats.get("min", 0.0)))
    if name in ("none", "zscore"):
        offset, divisor = (stats["mean"], _positive(stats["std"])) if name == "zscore" else (0.0, 1.0)
        pivot = 0.0 if mean is None else (mean - offset) / divisor
        return Normalization(offset, divisor, False, low, (low - offset) / divisor, pivot)
    start, stop = (stats["p00_5"], stats["p99_5"]) if window is None else window
    divisor = _positive(stop - start)
    pivot = 0.5 if mean is None else min(max((mean - start) / divisor, 0.0), 1.0)
    return Normalization(start, divisor, True, start, 0.0, pivot)


def _positive(width: float) -> float:
    """Return the width, or 1 for an item without contrast: it then becomes constant instead of infinite."""
    return width if width > 0 else 1.0


def by_channel(x: Tensor, how: Sequence[Normalization]) -> Iterator[tuple[Tensor, Normalization]]:
    """Yield the parts of (C, *size) that are normalised alike, as views: all of it for one normalisation, each channel for C of them."""
    if len(how) == 1:
        yield x, how[0]
    else:
        for k, own in enumerate(how):
            yield x[k : k + 1], own


def normalize_(x: Tensor, how: Normalization) -> Tensor:
    """Apply a normalisation."""
    if how.offset != 0:
        x.sub_(how.offset)
    if how.divisor != 1:
        x.div_(how.divisor)
    return x.clamp_(0, 1) if how.clip else x


def contrast_(x: Tensor, factor: float, pivot: float) -> Tensor:
    """Stretch intensities about a pivot: (x - pivot) * factor + pivot."""
    return x.sub_(pivot).mul_(factor).add_(pivot)


def gamma_(x: Tensor, gamma: float) -> Tensor:
    """Raise intensities to a power, with the view's own range mapped to [0, 1] and back."""
    low, high = torch.aminmax(x)
    width = (high - low).clamp_min(1e-7)
    return x.sub_(low).div_(width).clamp_(0, 1).pow_(gamma).mul_(width).add_(low)


def noise_(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add white Gaussian noise of one standard deviation."""
    return x.add_(torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype), alpha=std)


def bias_(x: Tensor, log_gain: Tensor) -> Tensor:
    """Multiply by exp(log_gain), as the receive field of an MR coil does.

    Args:
        x: (C, *size) raw intensities.
        log_gain: (1, *size).
    """
    return x.mul_(log_gain.exp())
