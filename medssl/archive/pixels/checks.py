"""Checks of pixels for `index --pixels`: hashes, near duplicates, intensity statistics, quality flags. Pure functions on arrays.

Hashes belong to `private/`: whoever has an image can look it up by them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # `types` imports torch, which a scan has no use for
    from medssl.types import Kind

HASH_BITS, MAX_DISTANCE = 64, 16
NEAR_DISTANCE = 4
"""Bits in which two perceptual hashes of one image may differ; see `perceptual_hash` for what that finds and misses."""
GRID_2D, GRID_3D = 32, 16
BLOCK_VALUES = 1 << 20
SAMPLE_VALUES = 1 << 17

QUALITY_FLAGS = ("constant_pixels", "blank", "saturated", "low_contrast")
"""What `quality_flags` may find; `reasons.FLAGS` says what each means."""
BLANK_SHARE, SATURATED_SHARE, LOW_CONTRAST_LEVELS, LOW_CONTRAST_SHARE = 0.999, 0.10, 8.0, 0.02


def content_hash(array: np.ndarray) -> str:
    """Return 32 hex digits over shape and values, equal for equal values in whatever type they are stored.

    A CT as DICOM (int16) and the same as NIfTI (float64) agree once both are canonical. Values are hashed in the narrowest of int16,
    int32, float32 and float64 that holds all of them exactly; all NaN are one value, and so are 0 and -0.

    Args:
        array: Canonical array, any axes.
    """
    array = np.asarray(array)
    dtype = _narrowest(array)
    digest = hashlib.blake2b(digest_size=16, person=b"medssl-pixels")
    digest.update(f"{array.shape}{dtype}".encode())
    for block in _blocks(array):
        values = block.astype(dtype)
        if values.dtype.kind == "f":
            values += values.dtype.type(0)  # -0.0 becomes 0.0
            values[np.isnan(values)] = np.nan
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _blocks(array: np.ndarray) -> list[np.ndarray]:
    """Return the array in C order in parts of bounded size; views of it."""
    if array.ndim == 0:
        return [array.reshape(1)]
    step = max(1, BLOCK_VALUES // max(1, int(np.prod(array.shape[1:], dtype=np.int64))))
    return [array[start : start + step] for start in range(0, array.shape[0], step)]


def _narrowest(array: np.ndarray) -> str:
    if array.dtype.kind == "b" or array.size == 0:
        return "<i2"
    whole, single, low, high = True, True, np.inf, -np.inf
    for block in _blocks(array):
        if array.dtype.kind in "iu":
            low, high = min(low, int(block.min())), max(high, int(block.max()))
            continue
        finite = np.isfinite(block)
        whole = whole and bool(finite.all()) and bool((np.rint(block) == block).all())
        if whole:
            low, high = min(low, float(block.min())), max(high, float(block.max()))
        if block.dtype != np.float32 and single:
            with np.errstate(over="ignore"):
                single = np.array_equal(block.astype(np.float32).astype(block.dtype), block, equal_nan=True)
    if not whole:
        return "<f4" if single else "<f8"
    return "<i2" if low >= -(1 << 15) and high < 1 << 15 else "<i4" if low >= -(1 << 31) and high < 1 << 31 else "<f8"


# --- perceptual hash


def perceptual_hash(image: np.ndarray, kind: Kind = "image") -> int:
    """Return a 64-bit hash that survives resampling, JPEG and changes of brightness and contrast, but not flips, crops or rotations.

    Channels are averaged, a clip becomes the mean of at most 16 of its frames. Values are clipped to their 0.5 and 99.5 percentiles, the
    picture is averaged down to 32 x 32 (a volume to 16 x 16 x 16), and each bit is the sign of one coefficient of its discrete cosine
    transform: the 64 lowest but the mean in two dimensions; in three, where the lowest ones of all heads and chests look alike, the 64
    that follow the 100 lowest. Signs do not move with scale or offset.

    On the real images of the tests a copy (half size by averaging, JPEG 60, 10 % brighter or darker, 2 % noise) differs by 4 bits at
    most; a volume halved without averaging is found in two of three cases. Of different images the closest chest radiographs differ by
    6 bits, the closest hippocampus crops by 5. Whole series of one protocol may come closer: a small distance is a suspicion.

    Args:
        image: As in `Sample`: image (C, H, W), volume (C, X, Y, Z), clip (T, C, H, W); without C where there is no channel axis.
        kind: Which of them.

    Returns:
        0 for a constant image, which is not comparable with anything.
    """
    from scipy.fft import dctn

    grey = _grey(np.asarray(image), kind)
    grid = GRID_3D if kind == "volume" else GRID_2D
    if grey.size == 0:
        return 0
    sample = _sample(grey)
    low, high = (float(value) for value in np.percentile(sample, [0.5, 99.5])) if sample.size else (0.0, 0.0)
    if not high > low:
        return 0
    small = _shrunk(grey, grid, low, high)
    values = dctn(small, norm="ortho").ravel()[_coefficients(small.ndim, grid)]
    # Coefficients of an exactly symmetric picture are zero but for rounding: their sign must not be noise.
    bits = values > 1e-9
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _grey(image: np.ndarray, kind: Kind) -> np.ndarray:
    axes = 3 if kind == "volume" else 2
    if kind == "clip":
        if image.ndim not in (3, 4):
            raise ValueError(f"clip with {image.ndim} axes; (T, C, H, W) or (T, H, W) is accepted")
        count = image.shape[0]
        image = image[np.unique(np.linspace(0, count - 1, min(16, count)).astype(int))].mean(axis=0, dtype=np.float64)
    if image.ndim == axes + 1:
        image = image[0] if image.shape[0] == 1 else image.mean(axis=0, dtype=np.float64)
    if image.ndim != axes:
        raise ValueError(f"{kind} with {image.ndim} axes; {axes}, or {axes + 1} with channels first, are accepted")
    return image


def _sample(array: np.ndarray) -> np.ndarray:
    """Return finite values, evenly spread: all of a small array, some ten thousands to a million of a large one."""
    step = max(1, int((array.size / SAMPLE_VALUES) ** (1 / array.ndim)))
    values = array[(slice(None, None, step),) * array.ndim].ravel()
    if values.dtype.kind != "f":
        return values
    finite: np.ndarray = values[np.isfinite(values)]
    return finite if finite.size else array[np.isfinite(array)]


def _shrunk(grey: np.ndarray, grid: int, low: float, high: float) -> np.ndarray:
    """Return the array clipped, scaled to 0 to 1 and averaged to `grid` values per axis, without a copy of all of it."""
    matrices = [_averaging(n, grid) for n in grey.shape]
    small = np.zeros((grid,) * grey.ndim)
    start = 0
    for block in _blocks(grey):
        values = np.clip(block.astype(np.float64), low, high)
        if block.dtype.kind == "f":
            values[np.isnan(values)] = low
        values = ((values - low) / (high - low)) @ matrices[-1].T
        if grey.ndim == 3:
            values = matrices[1] @ values
        stop = start + len(block)
        small += np.tensordot(matrices[0][:, start:stop], values, 1)
        start = stop
    return small


def _averaging(n: int, m: int) -> np.ndarray:
    """Return the (m, n) matrix that averages n values in m equal intervals, or interpolates where n < m."""
    if n < m:
        places = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        left = np.minimum(places.astype(int), max(n - 2, 0))
        matrix = np.zeros((m, n))
        matrix[np.arange(m), left] = 1 - (places - left)
        if n > 1:
            matrix[np.arange(m), left + 1] += places - left
        return matrix
    edges = np.linspace(0, n, m + 1)
    cells = np.arange(n)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    matrix = np.clip(overlap, 0, None)
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True))


def _coefficients(ndim: int, grid: int) -> np.ndarray:
    """Return flat indices of the coefficients in use, by growing frequency."""
    index = np.indices((grid,) * ndim).reshape(ndim, -1)
    size = (index**2).sum(axis=0) if ndim == 3 else index.sum(axis=0)
    order = np.lexsort((*index[::-1], size))
    skip = 100 if ndim == 3 else 1
    return np.asarray(order[skip : skip + HASH_BITS])


def near_pairs(one: np.ndarray, two: np.ndarray, distance: int = NEAR_DISTANCE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all pairs of two sets of hashes that differ in at most `distance` bits; exact.

    Two hashes within `distance` agree, in at least one of m bands, up to distance / m bits. m is chosen for the number of hashes so
    that few strangers share a band. 100,000 against 100,000 at 4 bits: 1 s for evenly spread hashes, 11 s for hashes as skewed as
    those of one body part.

    Args:
        one: (N,) uint64.
        two: (M,) uint64.
        distance: Bits, 0 to 16.

    Returns:
        Positions in `one`, positions in `two`, bits that differ: (K,) each, in order of the positions.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance}; 0 to {MAX_DISTANCE} bits are accepted")
    one, two = (np.asarray(values, dtype=np.uint64) for values in (one, two))
    bands = min(range(1, 17), key=lambda count: _band_cost(len(two), count, distance))
    edges = np.linspace(0, HASH_BITS, bands + 1).astype(int)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start, width in zip(edges[:-1].tolist(), np.diff(edges).tolist()):
        left, right = ((values >> np.uint64(start)) & np.uint64((1 << width) - 1) for values in (one, two))
        order = np.argsort(right, kind="stable")
        ordered = right[order]
        for change in _changes(width, distance // bands):
            wanted = left ^ np.uint64(change)
            first, last = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
            found.extend(_compare(one, two, order, first, last, distance))
    pairs = np.unique(np.concatenate(found), axis=0)  # one pair may agree in several bands
    return pairs[:, 0], pairs[:, 1], bit_count(one[pairs[:, 0]] ^ two[pairs[:, 1]])


def _band_cost(n: int, bands: int, distance: int) -> float:
    """Return the expected work per hash: look-ups, and strangers in each place looked up."""
    width, radius = HASH_BITS // bands, distance // bands
    return bands * sum(comb(width, ones) for ones in range(radius + 1)) * (4 + n / 2.0**width)


def _changes(width: int, radius: int) -> list[int]:
    """Return all numbers of `width` bits with at most `radius` ones."""
    return [sum(1 << bit for bit in bits) for ones in range(radius + 1) for bits in combinations(range(width), ones)]


def _compare(
    one: np.ndarray, two: np.ndarray, order: np.ndarray, first: np.ndarray, last: np.ndarray, distance: int
) -> Iterator[np.ndarray]:
    """Yield the near pairs (K, 2) of each hash and those at places first to last of `order`, about a million comparisons at a time."""
    counts = last - first
    bounds, start = np.cumsum(counts), 0
    while start < len(counts):
        before = int(bounds[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(bounds, before + BLOCK_VALUES, "right")))
        part = counts[start:stop]
        left = np.repeat(np.arange(start, stop), part)
        offsets = np.arange(len(left)) - np.repeat(np.cumsum(part) - part, part)
        right = order[np.repeat(first[start:stop], part) + offsets]
        near = bit_count(one[left] ^ two[right]) <= distance
        yield np.stack([left[near], right[near]], axis=1)
        start = stop


def near_duplicate_groups(hashes: Sequence[int], distance: int = NEAR_DISTANCE) -> list[list[int]]:
    """Return groups of positions whose hashes are linked by steps of at most `distance` bits; 0 is left out.

    Args:
        hashes: Of `perceptual_hash`.
        distance: Bits, 0 to 16.

    Returns:
        Ascending positions, groups of two or more, in order of their first position.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    every = np.array(hashes, dtype=np.uint64)
    unique, inverse = np.unique(every, return_inverse=True)
    left, right, _ = near_pairs(unique, unique, distance)
    links = coo_matrix((np.ones(len(left), bool), (left, right)), (len(unique), len(unique)))
    _, label = connected_components(links, directed=False)
    groups: dict[int, list[int]] = defaultdict(list)
    for position in np.flatnonzero(every).tolist():
        groups[int(label[inverse[position]])].append(position)
    return [group for group in groups.values() if len(group) > 1]


_ONES = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


def bit_count(values: np.ndarray) -> np.ndarray:
    """Return the number of ones of each unsigned 64-bit value (NumPy has it from 2.0 on)."""
    parts = np.ascontiguousarray(values, dtype=np.uint64).view(np.uint16).reshape(-1, 4)
    return np.asarray(_ONES[parts].sum(axis=1, dtype=np.int64))


# --- statistics and flags


def intensity_statistics(array: np.ndarray) -> dict[str, float]:
    """Return `min`, `max`, `mean`, `std`, `p01`, `p50`, `p99` of the finite values and `finite_fraction`; percentiles of a sample.

    An array without finite values gives only `finite_fraction`.
    """
    array = np.asarray(array)
    sample = _sample(array)
    if sample.size == 0:
        return {"finite_fraction": 0.0}
    shift = float(sample[0])  # sums around a value of the array: the variance of large offsets does not drown
    count, total, square, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    for block in _blocks(array):
        values = block[np.isfinite(block)] if block.dtype.kind == "f" else block.ravel()
        if values.size:
            centred = values.astype(np.float64) - shift
            count += values.size
            total, square = total + float(centred.sum()), square + float((centred**2).sum())
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    mean = total / count
    p01, p50, p99 = (float(value) for value in np.percentile(sample, [1, 50, 99]))
    return {
        "min": low, "max": high, "mean": mean + shift, "std": float(np.sqrt(max(square / count - mean**2, 0.0))), "p01": p01,
        "p50": p50, "p99": p99, "finite_fraction": count / array.size,
    }  # fmt: skip


def quality_flags(array: np.ndarray, statistics: Mapping[str, float], bits: int | None = None) -> tuple[str, ...]:
    """Return what of `QUALITY_FLAGS` holds.

    Args:
        array: Any axes.
        statistics: Its `intensity_statistics`.
        bits: Bits stored, where the values are stored ones: what "the range" means. None for calibrated values such as HU.
    """
    if "min" not in statistics or statistics["min"] == statistics["max"]:
        return ("constant_pixels",)
    flags = []
    values = _sample(np.asarray(array))
    if float(np.mean(values == np.median(values))) >= BLANK_SHARE:
        flags.append("blank")
    # More at the very top than just below it: a detector's or a window's end, not a bright object.
    top, just_below = statistics["max"], statistics["max"] - 0.01 * (statistics["max"] - statistics["min"])
    share, below = float(np.mean(values == top)), float(np.mean((values < top) & (values >= just_below)))
    if share >= SATURATED_SHARE and share > 2 * below:
        flags.append("saturated")
    span = statistics["p99"] - statistics["p01"]
    whole = values.dtype.kind in "iu"
    if (whole and span < LOW_CONTRAST_LEVELS) or (bits is not None and span < LOW_CONTRAST_SHARE * ((1 << bits) - 1)):
        flags.append("low_contrast")
    return tuple(flags)
