"""Corresponding points of two volumes, drawn: both images through a point, and what else in the target looks like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medssl.report.figures import COLOURS, DPI, PLANES, _orientation, grey, to_png, upright, window_of

MOST = 24
"""Points drawn; more cannot be told apart."""
MARKS = tuple(colour for colour in COLOURS if colour not in ("#0072B2", "#FFFFFF"))
"""Of the other points: dark blue is lost on black, white is that of the point in focus."""
COLUMN, GAP, HEAD = 2.4, 0.07, 0.45  # inches


def matches_png(
    images: tuple[np.ndarray, np.ndarray],
    spacings: tuple[Sequence[float], Sequence[float]],
    points: tuple[np.ndarray, np.ndarray],
    *,
    focus: int = 0,
    similarity: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> bytes:
    """Draw two volumes in three planes through one point, the points near these planes by number, and a map of similarity over the second.

    Args:
        images: Two volumes (X, Y, Z) in RAS+ order.
        spacings: Their voxel sizes, mm.
        points: (N, 3) fractional voxel indices in each; NaN rows of the second are points without a match.
        focus: Number of the point that the planes go through.
        similarity: (X, Y, Z) on the grid of the second volume, NaN where unknown; None leaves the third column out.
        scores: (N,) of the matches.
    """
    from matplotlib.figure import Figure

    matched = bool(np.isfinite(points[1][focus]).all())
    score = f", score {scores[focus]:.2f}" if scores is not None and matched else ""
    columns = [("A", f"point {focus + 1}"), ("B", f"its match{score}" if matched else f"no match of point {focus + 1}")]
    low, high = 0.0, 1.0
    if similarity is not None and np.isfinite(similarity).any():
        low, high = (float(v) for v in np.nanpercentile(similarity, [50, 100]))
        columns.append((f"B, how like point {focus + 1}", f"dark {low:.2f} or less, bright {high:.2f}"))
    drawn = drawn_points(points, spacings, focus)
    size_mm = [np.asarray(image.shape) * np.asarray(spacing) for image, spacing in zip(images, spacings)]
    widest = max(size[across] for size in size_mm for across, _, _ in PLANES.values())
    scale = COLUMN / widest
    heights = {plane: max(size[down] for size in size_mm) * scale for plane, (_, down, _) in PLANES.items()}
    width, height = len(columns) * (COLUMN + GAP) + GAP, HEAD + sum(heights.values()) + GAP * (len(PLANES) + 1)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="black")
    for c, (heading, below) in enumerate(columns):
        which = min(c, 1)
        image, spacing, places = images[which], spacings[which], points[which]
        middle = GAP + c * (COLUMN + GAP) + COLUMN / 2
        for text, line, size in ((heading, 0.3, 9), (below, 0.7, 7)):
            figure.text(middle / width, 1 - line * HEAD / height, text, color="#e8e8e8", size=size, ha="center", va="center")
        window, top = window_of(image), height - HEAD
        centre = places[focus] if np.isfinite(places[focus]).all() else np.asarray(image.shape) / 2
        for plane, (across, down, through) in PLANES.items():
            k = int(np.clip(round(float(centre[through])), 0, image.shape[through] - 1))
            wide, high_in = image.shape[across] * spacing[across] * scale, image.shape[down] * spacing[down] * scale
            axes = figure.add_axes(((middle - wide / 2) / width, (top - high_in) / height, wide / width, high_in / height))
            axes.imshow(upright(grey(np.take(image, k, axis=through), window)), aspect="auto", interpolation="nearest")
            if c == 2 and similarity is not None:
                layer = upright(np.take(similarity, k, axis=through))
                axes.imshow(np.ma.masked_invalid(layer), aspect="auto", cmap="inferno", alpha=0.65, vmin=low, vmax=high)
            axes.set_xlim(-0.5, image.shape[across] - 0.5)
            axes.set_ylim(image.shape[down] - 0.5, -0.5)
            for number in drawn if c < 2 else [focus]:
                if np.isfinite(places[number]).all() and (number == focus or _beside(places[number][through], k, spacing[through])):
                    x, y = (image.shape[axis] - 1 - places[number][axis] for axis in (across, down))
                    _mark(axes, x, y, number, strong=number == focus)
            axes.axis("off")
            _orientation(axes, plane)
            if c == 0:
                axes.text(
                    0.02, 0.98, plane, ha="left", va="top", color="#e8e8e8", size=6, transform=axes.transAxes, path_effects=_edge()
                )
            top -= heights[plane] + GAP
    return to_png(figure)


def _beside(place: float, plane: float, spacing: float) -> bool:
    """Whether a point is drawn on a plane: within two voxels or 4 mm of it."""
    return abs(float(place) - plane) <= max(2.0, 4.0 / spacing)


def drawn_points(points: tuple[np.ndarray, np.ndarray], spacings: tuple[Sequence[float], Sequence[float]], focus: int) -> list[int]:
    """Return which points are drawn: the focus, and of the matched points beside its planes in A those nearest to it, `MOST` in all."""
    centre = points[0][focus]
    beside = [
        k
        for k in range(len(points[0]))
        if k != focus
        and np.isfinite(points[1][k]).all()
        and any(_beside(points[0][k][axis], centre[axis], spacings[0][axis]) for axis in range(3))
    ]
    away = [float(np.linalg.norm((points[0][k] - centre) * np.asarray(spacings[0]))) for k in beside]
    return [focus, *(beside[i] for i in np.argsort(away, kind="stable")[: MOST - 1])]


def middle_point(points: np.ndarray, matched: np.ndarray) -> int:
    """Return the number of the matched point nearest to the middle of all points; the first where none is matched.

    Args:
        points: (N, 3) mm.
        matched: (N,) bool.
    """
    if not matched.any():
        return 0
    away = np.linalg.norm(points - points.mean(axis=0), axis=1)
    return int(np.where(matched, away, np.inf).argmin())


def _edge() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.8, foreground="black")]  # readable on bright tissue as well


def _mark(axes: Any, x: float, y: float, number: int, *, strong: bool) -> None:
    from matplotlib.patheffects import withStroke

    colour, size = "#FFFFFF" if strong else MARKS[number % len(MARKS)], 12 if strong else 7
    line = 1.8 if strong else 1.1
    edge = [withStroke(linewidth=line + 1.4, foreground="black")]
    axes.plot([x], [y], marker="+", markersize=size, markeredgewidth=line, color=colour, path_effects=edge, clip_on=True)
    axes.annotate(
        str(number + 1),
        (x, y),
        xytext=(3, 3),
        textcoords="offset points",
        color=colour,
        size=8 if strong else 6,
        path_effects=_edge(),
    )
