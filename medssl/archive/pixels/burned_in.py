"""Suspicion of text drawn into the pixels: where it may be, never what it says.

Classical: strokes stand out of their surroundings (top-hat of two sizes, bright and dark), connected pieces of the size of characters
are measured, neighbours of like height on one base line are joined, and a logistic regression judges each line. Its weights were fitted
on rendered text over real images, and precision and recall measured on other images, by `benchmarks/burned_in.py`. A suspicion is a
reason for somebody to look: much of what is faint, hand-written, vertical or under twelve pixels is missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # `types` imports torch, which a scan has no use for
    from medssl.types import Kind

MAX_EDGE = 1024
"""Larger images are averaged down to this: text made for people to read survives it."""
STROKE_SIZES = (7, 15)
"""Edge of the squares that strokes must be thinner than, in pixels after averaging."""
STAND_OUT = 0.15
"""Least height of a stroke over its surroundings, as a share of the image's range."""
HEIGHT_PIXELS = (6, 80)
MAX_PIECES = 1500
MIN_CHARACTERS = 3
CLIP_FRAMES = 16
STEADY = 0.04
"""Text does not change over a clip: pixels that vary more (standard deviation, share of the range) are left out."""
THRESHOLD = 0.5
"""Score from which text is suspected; what it means is in `BIAS`."""

FEATURES = (
    "characters", "base_line", "height_spread", "colour_spread", "contrast", "stroke_spread", "stroke_share", "fill", "colour_within",
    "gap_spread", "width_share", "edge_distance",
)  # fmt: skip
WEIGHTS: dict[str, float] = {
    "characters": 1.712, "base_line": -7.479, "height_spread": -4.294, "colour_spread": -5.689, "contrast": 7.206,
    "stroke_spread": -0.5931, "stroke_share": 0.937, "fill": 8.184, "colour_within": -12.77, "gap_spread": -0.4236,
    "width_share": -0.8369, "edge_distance": -0.2189,
}  # fmt: skip
BIAS = -8.05
"""Printed by `python -m benchmarks.burned_in --fit`, which is deterministic. The bias puts `THRESHOLD` just above the highest score of a
real image without text in the fitting half."""


@dataclass(frozen=True)
class Line:
    """Pieces in a row that may be characters.

    Args:
        box: First row, first column, last row + 1, last column + 1, in pixels of the image as given.
        score: 0 to 1.
        characters: Number of pieces.
        features: Values of `FEATURES`.
    """

    box: tuple[int, int, int, int]
    score: float
    characters: int
    features: tuple[float, ...]


@dataclass(frozen=True)
class Finding:
    """What `find_text` found.

    Args:
        score: That of the best line, 0 without lines.
        suspected: Score at or above `THRESHOLD`.
        marker: One or two letters alone, as the side markers of radiographs; never a reason to reject.
        boxes: Lines that are suspected.
        marker_boxes: Places of markers.
    """

    score: float
    suspected: bool
    marker: bool
    boxes: tuple[tuple[int, int, int, int], ...]
    marker_boxes: tuple[tuple[int, int, int, int], ...]


def find_text(image: np.ndarray, kind: Kind = "image") -> Finding:
    """Look for text in an image or clip.

    Args:
        image: Image (C, H, W) or (H, W); clip (T, C, H, W) or (T, H, W), of which only what stays the same over time counts.
        kind: `image` or `clip`.

    Raises:
        ValueError: Another kind, or axes that do not fit.
    """
    lines, markers = _search(image, kind)
    best = max((line.score for line in lines), default=0.0)
    sure = tuple(line.box for line in lines if line.score >= THRESHOLD)
    return Finding(best, bool(sure), bool(markers), sure, tuple(markers))


def text_lines(image: np.ndarray, kind: Kind = "image") -> list[Line]:
    """Return all candidate lines with their features, best first: what the benchmark fits and measures."""
    return sorted(_search(image, kind)[0], key=lambda line: -line.score)


def _search(image: np.ndarray, kind: Kind) -> tuple[list[Line], list[tuple[int, int, int, int]]]:
    grey, steady = _prepared(np.asarray(image), kind)
    if grey is None or min(grey.shape) < 16:
        return [], []
    small, factor = _smaller(grey, steady)
    lines: list[Line] = []
    markers: list[tuple[int, int, int, int]] = []
    for tone in (small, 1 - small):
        for size in STROKE_SIZES:
            pieces = _pieces(tone, size)
            groups = _rows(pieces)
            for members in groups:
                if len(members) >= MIN_CHARACTERS:
                    lines.append(_line(pieces[members], small.shape, factor))
                elif tone is small:
                    markers.extend(_marker(pieces[members], small.shape, factor))
    markers = [box for box in markers if not any(_overlap(box, line.box) for line in lines if line.score >= THRESHOLD)]
    return lines, _distinct(markers)


def _prepared(image: np.ndarray, kind: Kind) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the picture as (H, W) float32 from 0 to 1, and for clips where it stays the same."""
    if kind not in ("image", "clip"):
        raise ValueError(f"kind {kind!r}; image and clip are accepted")
    axes = 2 if kind == "image" else 3
    if kind == "clip" and image.ndim >= axes:
        image = image[np.unique(np.linspace(0, len(image) - 1, min(CLIP_FRAMES, len(image))).astype(int))]
    if image.ndim == axes + 1:
        image = image.mean(axis=axes - 2, dtype=np.float32) if image.shape[axes - 2] > 1 else image.squeeze(axes - 2)
    if image.ndim != axes or image.size == 0:
        raise ValueError(f"{kind} with {image.ndim} axes; {axes}, or {axes + 1} with channels, are accepted")
    values = np.nan_to_num(image.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = (float(value) for value in np.percentile(values[..., :: max(1, values.size >> 18)], [0.02, 99.98]))
    if not high > low:
        return None, None
    values = np.clip((values - low) / (high - low), 0, 1)
    if kind == "image":
        return values, None
    return np.median(values, axis=0), values.std(axis=0) <= STEADY


def _smaller(grey: np.ndarray, steady: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Average blocks so that no edge exceeds `MAX_EDGE`; unsteady pixels become their surroundings and show no stroke."""
    from scipy.ndimage import grey_opening, median_filter

    factor = max(1, -(-max(grey.shape) // MAX_EDGE))
    if steady is not None and not steady.all():
        grey = np.where(steady, grey, median_filter(grey_opening(grey, size=(9, 9)), size=5))
    if factor > 1:
        rows, columns = (n // factor * factor for n in grey.shape)
        grey = grey[:rows, :columns].reshape(rows // factor, factor, columns // factor, factor).mean(axis=(1, 3))
    return grey, factor


_PIECE = np.dtype(
    [(name, np.float32) for name in ("top", "left", "bottom", "right", "area", "contrast", "colour", "within", "stroke")]
)


def _pieces(tone: np.ndarray, size: int) -> np.ndarray:
    """Return connected strokes that have the size of characters, as records of `_PIECE`."""
    from scipy import ndimage

    hat = tone - ndimage.grey_opening(tone, size=(size, size))
    mask = hat > STAND_OUT
    # Where a stroke ends, half of its height is left: a fixed level alone would take in the blur around large bright letters.
    mask &= hat > 0.5 * ndimage.maximum_filter(hat, size=size)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3), bool))
    if count == 0:
        return np.zeros(0, _PIECE)
    boxes = ndimage.find_objects(labels)
    table = np.array([(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in boxes], np.float32)
    height, width = table[:, 2] - table[:, 0], table[:, 3] - table[:, 1]
    low, high = HEIGHT_PIXELS
    ids = np.flatnonzero((height >= low) & (height <= high) & (width >= 1) & (width <= 4 * height)) + 1
    if len(ids) == 0:
        return np.zeros(0, _PIECE)
    # Sums over labels by `bincount`: one pass each over the few pixels in strokes.
    places = np.flatnonzero(mask)
    owner = labels.ravel()[places]

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=values, minlength=count + 1)[ids]

    area = total(np.ones(len(places)))
    inside, colour = hat.ravel()[places], tone.ravel()[places]
    mean = total(colour) / area
    spread = np.sqrt(np.maximum(total(colour.astype(np.float64) ** 2) / area - mean**2, 0))
    depth = ndimage.distance_transform_cdt(mask, metric="chessboard").ravel()[places]
    pieces = np.zeros(len(ids), _PIECE)
    for name, column in zip(("top", "left", "bottom", "right"), table[ids - 1].T):
        pieces[name] = column
    pieces["area"], pieces["contrast"], pieces["colour"] = area, total(inside) / area, mean
    pieces["within"] = spread / np.maximum(pieces["contrast"], 1e-3)
    # A straight stroke of width w has a mean distance to its edge of about (w + 2) / 4.
    pieces["stroke"] = np.maximum(4 * total(depth) / area - 2, 1)
    box = (pieces["bottom"] - pieces["top"]) * (pieces["right"] - pieces["left"])
    pieces = pieces[(pieces["area"] >= 0.1 * box) & (pieces["stroke"] <= 0.5 * (pieces["bottom"] - pieces["top"]))]
    if len(pieces) > MAX_PIECES:
        pieces = pieces[np.argsort(-pieces["contrast"], kind="stable")[:MAX_PIECES]]
    return np.asarray(pieces)


def _rows(pieces: np.ndarray) -> list[np.ndarray]:
    """Return groups of pieces that stand beside each other: overlapping in height, alike in size and colour, with small gaps."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(pieces)
    if n == 0:
        return []
    top, bottom, left, right = (pieces[name] for name in ("top", "bottom", "left", "right"))
    height = bottom - top
    small, large = np.minimum.outer(height, height), np.maximum.outer(height, height)
    shared = np.minimum.outer(bottom, bottom) - np.maximum.outer(top, top)
    gap = np.maximum.outer(left, left) - np.minimum.outer(right, right)
    colour = np.abs(np.subtract.outer(pieces["colour"], pieces["colour"]))
    near = (shared >= 0.6 * small) & (large <= 2 * small) & (gap <= 1.0 * large) & (colour <= 0.2)
    rows, columns = np.nonzero(near)
    _, label = connected_components(coo_matrix((np.ones(len(rows), bool), (rows, columns)), (n, n)), directed=False)
    order = np.argsort(label, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(label[order])) + 1)


def _line(pieces: np.ndarray, shape: tuple[int, ...], factor: int) -> Line:
    features = _features(pieces, shape)
    power = BIAS + sum(WEIGHTS[name] * value for name, value in zip(FEATURES, features))
    score = float(1 / (1 + np.exp(-np.clip(power, -50, 50))))
    return Line(_box(pieces, factor), score, len(pieces), features)


def _features(pieces: np.ndarray, shape: tuple[int, ...]) -> tuple[float, ...]:
    pieces = pieces[np.argsort(pieces["left"], kind="stable")]
    height = pieces["bottom"] - pieces["top"]
    width = pieces["right"] - pieces["left"]
    typical = float(np.median(height))
    gaps = (pieces["left"][1:] - pieces["right"][:-1]) / typical
    middle = float(np.median(pieces["bottom"]))
    distances = (pieces["top"].min(), pieces["left"].min(), shape[0] - pieces["bottom"].max(), shape[1] - pieces["right"].max())
    contrast = float(pieces["contrast"].mean())
    return (
        float(np.log2(len(pieces))),
        float(np.median(np.abs(pieces["bottom"] - middle))) / typical,
        float(np.median(np.abs(height - typical))) / typical,
        float(pieces["colour"].std()) / contrast,
        contrast,
        float(pieces["stroke"].std() / pieces["stroke"].mean()),
        float(np.median(pieces["stroke"])) / typical,
        float(np.median(pieces["area"] / (height * width))),
        float(np.median(pieces["within"])),
        float(gaps.std()),
        float(np.median(width)) / typical,
        min(1.0, 4 * float(min(distances)) / min(shape)),
    )


def _marker(pieces: np.ndarray, shape: tuple[int, ...], factor: int) -> list[tuple[int, int, int, int]]:
    """Return the box of one or two pieces that look like lead letters: tall, bright, of one colour, with room around."""
    height, width = pieces["bottom"] - pieces["top"], pieces["right"] - pieces["left"]
    fill = pieces["area"] / (height * width)
    fits = (
        (height >= max(12, 0.015 * shape[0]))
        & (width >= 0.35 * height)
        & (width <= 1.2 * height)
        & (fill >= 0.2)
        & (fill <= 0.75)
        & (pieces["colour"] >= 0.7)
        & (pieces["contrast"] >= 0.3)
        & (pieces["within"] <= 0.25)
        & (pieces["stroke"] <= 0.35 * height)
    )
    return [_box(pieces, factor)] if bool(fits.any()) else []


def _box(pieces: np.ndarray, factor: int) -> tuple[int, int, int, int]:
    corners = (pieces["top"].min(), pieces["left"].min(), pieces["bottom"].max(), pieces["right"].max())
    top, left, bottom, right = (int(value) * factor for value in corners)
    return top, left, bottom, right


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _distinct(boxes: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    kept: list[tuple[int, int, int, int]] = []
    for box in boxes:
        if not any(_overlap(box, other) for other in kept):
            kept.append(box)
    return kept
