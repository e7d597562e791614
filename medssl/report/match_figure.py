"""Corresponding points of two volumes, drawn: both images through a point, and what else in the target looks like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medssl.report.figures import COLOURS, DPI, PLANES, _orientation, _png, grey, upright, window_of

MOST = 24
"""Points drawn; more cannot be told apart."""
COLUMN, GAP, HEAD = 2.4, 0.07, 0.3  # inches


def matches_png(
    images: tuple[np.ndarray, np.ndarray],
    spacings: tuple[Sequence[float], Sequence[float]],
    points: tuple[np.ndarray, np.ndarray],
    *,
    similarity: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> bytes:
    """Draw two volumes in three planes through the first point, all points by number, and a map of similarity over the second.

    Args:
        images: Two volumes (X, Y, Z) in RAS+ order.
        spacings: Their voxel sizes, mm.
        points: (N, 3) fractional voxel indices in each; NaN rows of the second are points without a match.
        similarity: (X, Y, Z) on the grid of the second volume, NaN where unknown; None leaves the third column out.
        scores: (N,) of the matches.
    """
    from matplotlib.figure import Figure

    shown = [k for k in range(len(points[0])) if np.isfinite(points[1][k]).all()][:MOST] or [0]
    first = shown[0]
    columns = [
        "A",
        f"B, score {scores[first]:.2f}" if scores is not None else "B",
        *(["similarity in B"] if similarity is not None else []),
    ]
    size_mm = [np.asarray(image.shape) * np.asarray(spacing) for image, spacing in zip(images, spacings)]
    widest = max(size[across] for size in size_mm for across, _, _ in PLANES.values())
    scale = COLUMN / widest
    heights = {plane: max(size[down] for size in size_mm) * scale for plane, (_, down, _) in PLANES.items()}
    width, height = len(columns) * (COLUMN + GAP) + GAP, HEAD + sum(heights.values()) + GAP * (len(PLANES) + 1)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="black")
    for c, heading in enumerate(columns):
        which = min(c, 1)
        image, spacing, places = images[which], spacings[which], points[which]
        middle = GAP + c * (COLUMN + GAP) + COLUMN / 2
        figure.text(middle / width, 1 - HEAD / 2 / height, heading, color="#e8e8e8", size=9, ha="center", va="center")
        window, top = window_of(image), height - HEAD
        centre = places[first] if np.isfinite(places[first]).all() else np.asarray(image.shape) / 2
        for plane, (across, down, through) in PLANES.items():
            k = int(np.clip(round(float(centre[through])), 0, image.shape[through] - 1))
            wide, high = image.shape[across] * spacing[across] * scale, image.shape[down] * spacing[down] * scale
            axes = figure.add_axes(((middle - wide / 2) / width, (top - high) / height, wide / width, high / height))
            axes.imshow(upright(grey(np.take(image, k, axis=through), window)), aspect="auto", interpolation="nearest")
            if c == 2 and similarity is not None:
                layer = upright(np.take(similarity, k, axis=through))
                axes.imshow(np.ma.masked_invalid(layer), aspect="auto", cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            axes.set_xlim(-0.5, image.shape[across] - 0.5)
            axes.set_ylim(image.shape[down] - 0.5, -0.5)
            near = max(2.0, 4.0 / spacing[through])
            for number in shown if c < 2 else shown[:1]:
                if np.isfinite(places[number]).all() and (number == first or abs(places[number][through] - k) <= near):
                    _mark(
                        axes, image.shape[across] - 1 - places[number][across], image.shape[down] - 1 - places[number][down], number
                    )
            axes.axis("off")
            if c == 0:
                _orientation(axes, plane)
            top -= heights[plane] + GAP
    return _png(figure)


def _mark(axes: Any, x: float, y: float, number: int) -> None:
    colour = COLOURS[number % len(COLOURS)]
    axes.plot([x], [y], marker="+", markersize=9, markeredgewidth=1.4, color=colour)
    axes.annotate(str(number + 1), (x, y), xytext=(4, 4), textcoords="offset points", color=colour, size=7)
