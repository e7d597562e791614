"""Foreground, intensity statistics and foreground points of a volume.

All of them work on slabs and on a histogram, never on a floating-point copy of the volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from medssl.seeding import counter_rng

QUANTILES: dict[str, float] = {"p00_5": 0.005, "p05": 0.05, "p50": 0.5, "p95": 0.95, "p99_5": 0.995}
SLAB_VOXELS = 4 << 20
OTSU_BINS = 256
AIR_SHARE = 0.25
"""Share of the brighter class's median up to which the darker class counts as air.

Measured: whole-body and head MR 0.00 to 0.06, crops inside the head or the breast 0.39 to 0.55 (Decathlon hippocampus,
studyforrest, niivue, TotalSegmentator, pyradiomics).
"""
SAMPLE_VOXELS = 2_000_000


def slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices along the first axis that hold about `SLAB_VOXELS` voxels each."""
    step = max(1, SLAB_VOXELS // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def memory_order(array: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return views with the axes of the first array from the widest to the narrowest stride, all permuted alike.

    A canonical volume is often a transposed view; slabs of it along its first axis would touch every cache line several times.
    """
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return tuple(part.transpose(axes) for part in (array, *others))


def sample(array: np.ndarray, n: int = SAMPLE_VOXELS) -> tuple[slice, ...]:
    """Return a strided grid of at most about n voxels, every voxel when there are fewer: deterministic, no copy."""
    stride = 1
    while np.prod([-(-size // stride) for size in array.shape]) > n:
        stride += 1
    return tuple(slice(None, None, stride) for _ in array.shape)


def otsu_threshold(values: np.ndarray) -> float:
    """Return the threshold that separates two classes with the largest between-class variance.

    Reference: Otsu, IEEE Trans. SMC 1979, eq. 18, on a histogram of 256 bins between the 0.5th and the 99.5th
    percentile, so that a few bright vessels or metal do not squeeze everything else into one bin.

    Args:
        values: Any shape, finite.
    """
    low, high = np.quantile(values, [0.005, 0.995])
    if high <= low:
        low, high = float(values.min()), float(values.max())
    counts, edges = np.histogram(np.clip(values, low, high), bins=OTSU_BINS, range=(float(low), float(high)))
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)
    total = np.cumsum(counts * centres)
    below, above = weight[:-1].astype(np.float64), (weight[-1] - weight[:-1]).astype(np.float64)
    usable = (below > 0) & (above > 0)
    gap = np.where(usable, total[:-1] / np.maximum(below, 1) - (total[-1] - total[:-1]) / np.maximum(above, 1), 0.0)
    score = below * above * gap**2
    # Empty bins between the classes leave a plateau: its middle is the safest threshold.
    best = edges[1:-1][score >= score.max() * (1 - 1e-12)]
    return float((best[0] + best[-1]) / 2)


def body_threshold(values: np.ndarray) -> float:
    """Return the intensity above which voxels are body in an image without units; minus infinity when there is no air.

    The Otsu threshold parts air from bright tissue; the body threshold lies halfway from there down to the median of
    the darker class, so that dark tissue (fluid, cortical bone) stays in. A crop without air, told by a darker class
    that is brighter than `AIR_SHARE` of the brighter one, is all body.

    Args:
        values: Any shape, finite, two different values at least.
    """
    threshold = otsu_threshold(values)
    dark, bright = values[values <= threshold], values[values > threshold]
    if dark.size == 0 or bright.size == 0:
        return -np.inf
    low, high = float(np.median(dark)), float(np.median(bright))
    floor = min(0.0, float(np.quantile(values, 0.005)))
    if low - floor > AIR_SHARE * (high - floor):
        return -np.inf
    return (low + threshold) / 2


def foreground(array: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Return the body in an image of arbitrary intensity units (see `body_threshold`).

    Enough for where statistics and crops should look; it is not a segmentation.

    Args:
        array: (X, Y, Z) with two values at least among its valid voxels.
        valid: (X, Y, Z) bool, False is never foreground; None when everything is valid.

    Returns:
        (X, Y, Z) bool with at least one True.
    """
    grid = sample(array)
    values = array[grid]
    if valid is not None:
        values = values[valid[grid]]
    if values.size < 1000 or values.min() == values.max():
        values = array if valid is None else array[valid]
    threshold = body_threshold(values.ravel())
    mask = above(array, threshold, valid) if np.isfinite(threshold) else np.zeros(array.shape, dtype=bool)
    if not mask.any():
        mask = np.ones(array.shape, dtype=bool) if valid is None else valid.copy()
    return mask


def above(array: np.ndarray, threshold: float, valid: np.ndarray | None = None) -> np.ndarray:
    """Return valid voxels above a threshold as (X, Y, Z) bool."""
    # A Python number keeps the comparison in the array's own dtype; for integers the floor gives the same answer.
    mask: np.ndarray = np.greater(array, float(threshold) if array.dtype == np.float32 else int(np.floor(threshold)))
    if valid is not None:
        np.logical_and(mask, valid, out=mask)
    return mask


def intensity_stats(array: np.ndarray, mask: np.ndarray, valid: np.ndarray | None = None) -> dict[str, float]:
    """Return statistics of the foreground; nothing is applied to the image.

    Integers are counted value by value, so that quantiles are exact. Float images take mean and standard deviation
    from all foreground voxels and quantiles from a strided sample of at most two million of them.

    Args:
        array: (X, Y, Z) uint8, int16, uint16 or float32; images and clips in their own axes.
        mask: Bool foreground of the same shape, with at least one voxel.
        valid: Bool of the same shape, or None; the denominator of the fraction.

    Returns:
        `mean`, `std`, `p00_5`, `p05`, `p50`, `p95`, `p99_5`, `min`, `max` of the foreground and `foreground_fraction`
        of valid voxels.
    """
    count = int(np.count_nonzero(mask))
    total = array.size if valid is None else int(np.count_nonzero(valid))
    array, mask = memory_order(array, mask)
    if array.dtype == np.float32:
        stats = _float_stats(array, mask, count)
    else:
        stats = _counted_stats(array, mask)
    stats["foreground_fraction"] = count / max(1, total)
    return stats


def _counted_stats(array: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    offset = 32768 if array.dtype == np.int16 else 0
    counts = np.zeros(256 if array.dtype == np.uint8 else 65536, dtype=np.int64)
    for part in slabs(array.shape):
        values = array[part][mask[part]]
        counts += np.bincount(values.astype(np.int32) + offset, minlength=counts.size)
    levels = np.flatnonzero(counts)
    weights = counts[levels].astype(np.float64)
    values = (levels - offset).astype(np.float64)
    n = weights.sum()
    mean = float(weights @ values / n)
    std = float(np.sqrt(weights @ (values - mean) ** 2 / n))
    ends = np.cumsum(counts[levels])
    stats = {"mean": mean, "std": std, "min": float(values[0]), "max": float(values[-1])}
    for name, q in QUANTILES.items():
        # numpy's linear rule: rank q * (n - 1), interpolated between the two neighbours.
        rank = q * (int(n) - 1)
        below = values[np.searchsorted(ends, int(np.floor(rank)), side="right")]
        upper = values[np.searchsorted(ends, int(np.ceil(rank)), side="right")]
        stats[name] = float(below + (upper - below) * (rank - np.floor(rank)))
    return stats


def _float_stats(array: np.ndarray, mask: np.ndarray, count: int) -> dict[str, float]:
    total, low, high = 0.0, np.inf, -np.inf
    for part in slabs(array.shape):
        values = array[part][mask[part]]
        if values.size:
            total += float(values.sum(dtype=np.float64))
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    mean = total / count
    squares = sum(float(np.square(array[part][mask[part]] - mean, dtype=np.float64).sum()) for part in slabs(array.shape))
    grid = sample(array)
    kept = array[grid][mask[grid]]
    if kept.size < min(count, 100_000):
        kept = array[mask]
    stats = {"mean": mean, "std": float(np.sqrt(squares / count)), "min": low, "max": high}
    quantiles = np.quantile(kept, list(QUANTILES.values()))
    return {**stats, **{name: float(value) for name, value in zip(QUANTILES, quantiles)}}


def foreground_points(mask: np.ndarray, n: int = 512) -> np.ndarray:
    """Return up to n foreground voxels, spread evenly at random over the foreground, the same on every run.

    Args:
        mask: (X, Y, Z), or (H, W) of an image or clip, bool, every axis shorter than 65536.
        n: Number wanted.

    Returns:
        (K, 3) or (K, 2) uint16 indices in C order; all foreground voxels when there are at most n.
    """
    if mask.ndim == 2:
        return foreground_points(mask[None], n)[:, 1:]
    per_row = np.count_nonzero(mask, axis=2)  # (X, Y)
    ends = np.cumsum(per_row.ravel())
    total = int(ends[-1])
    if total <= n:
        return np.argwhere(mask).astype(np.uint16)
    # One point per equal share of the foreground, at a random place within it.
    edges = np.linspace(0, total, n + 1)
    ranks = np.minimum((edges[:-1] + counter_rng("foreground", total).random(n) * np.diff(edges)).astype(np.int64), total - 1)
    rows = np.searchsorted(ends, ranks, side="right")
    points = np.empty((n, 3), dtype=np.uint16)
    for i, (row, rank) in enumerate(zip(rows, ranks)):
        x, y = divmod(int(row), mask.shape[1])
        before = int(ends[row]) - int(per_row[x, y])
        points[i] = x, y, np.flatnonzero(mask[x, y])[rank - before]
    return points


def rounded(stats: Mapping[str, float]) -> dict[str, float]:
    """Return statistics as plain floats with 9 significant digits, so that their JSON text is the same everywhere."""
    return {name: float(f"{value:.9g}") for name, value in stats.items()}
