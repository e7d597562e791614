"""Pure functions from arrays to PNG bytes: three-plane panels and curves.

Volumes come as (X, Y, Z) in RAS+ index order and are shown the radiological way: the patient's right on the left of the
picture, anterior up in axial slices, superior up in coronal and sagittal ones, anterior to the left in sagittal ones.
Nothing is interpolated: one voxel is one rectangle, with the aspect of its spacing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Spacing = Sequence[float]

# Plane -> (axis across, axis down, axis of the slices).
PLANES: dict[str, tuple[int, int, int]] = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}
PICTURE = "picture"  # in the place of the planes where a case is a picture: rows and columns are shown as they are
_EDGES = {0: ("R", "L"), 1: ("A", "P"), 2: ("S", "I")}  # (left or top, right or bottom) of a shown axis

# Okabe and Ito (2008): told apart with every common kind of colour blindness.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2", "#FFFFFF")
DPI = 144  # 1.5 pixels of the file for one of the page: sharp on laptops, small enough to mail
HIDDEN = (0.20, 0.27, 0.42)


@dataclass(frozen=True)
class Theme:
    """Colours of a chart on a light or a dark page."""

    text: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("#3c4350", "#dfe3e8", ("#0b62a8", "#c2540a", "#0a7d5c", "#8a3f8f", "#7a6a00", "#444444"))
DARK = Theme("#c5ccd6", "#39414d", ("#6cb8f5", "#f5a25d", "#4fd1a5", "#dd9ae0", "#e3d26b", "#bbbbbb"))


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are not finite leave a gap.

    Args:
        label: Legend text; empty for none.
        x: (N,) abscissa.
        y: (N,) ordinate.
        low: (N,) lower end of an interval, or None.
        high: (N,) upper end.
        colour: Place in the theme's colours.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """One small chart.

    Args:
        title: Text above.
        lines: What it shows.
        x_label: Text below.
        log_x: Logarithmic abscissa with a tick at each x (label curves).
        smooth: Draw a running mean over the faint raw values when there are many.
    """

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    log_x: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Cut:
    """The same slice of an image and of several label maps.

    Args:
        image: (A, B), the two remaining axes in X, Y, Z order; of a picture its rows and columns.
        maps: Heading -> (A, B) integer map; 0 = none, k = the k-th structure.
        spacing_mm: (2,) voxel size along A and B.
    """

    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    spacing_mm: tuple[float, float]


def upright(cut: np.ndarray) -> np.ndarray:
    """Return a slice as rows from top to bottom and columns from left to right, radiological view.

    Args:
        cut: (A, B, ...) where A and B are the remaining axes in X, Y, Z order; both shown axes run against RAS.
    """
    return np.asarray(np.swapaxes(cut, 0, 1)[::-1, ::-1])


def shown(plane: str, cut: np.ndarray) -> np.ndarray:
    """Return a slice as rows from top to bottom: upright, and a picture as it is."""
    return np.asarray(cut) if plane == PICTURE else upright(cut)


def cut_volume(image: np.ndarray, maps: Mapping[str, np.ndarray], spacing_mm: Spacing, slices: Mapping[str, int]) -> dict[str, Cut]:
    """Return the slice of each plane of an image and its label maps.

    Args:
        image: (X, Y, Z) in RAS+ order.
        maps: Heading -> (X, Y, Z).
        spacing_mm: (3,) voxel size.
        slices: Plane -> slice number.
    """
    cuts = {}
    for plane, (across, down, through) in PLANES.items():
        cuts[plane] = Cut(
            image=np.take(image, slices[plane], axis=through),
            maps={heading: np.take(labels, slices[plane], axis=through) for heading, labels in maps.items()},
            spacing_mm=(float(spacing_mm[across]), float(spacing_mm[down])),
        )
    return cuts


def busiest_slices(weight: np.ndarray) -> dict[str, int]:
    """Return for each plane the slice where a non-negative (X, Y, Z) weight sums highest; the middle if all are 0."""
    chosen = {}
    for plane, (_, _, through) in PLANES.items():
        total = weight.sum(axis=tuple(axis for axis in range(3) if axis != through), dtype=np.float64)
        chosen[plane] = int(total.argmax()) if total.max() > 0 else weight.shape[through] // 2
    return chosen


def structure_weight(labels: np.ndarray) -> np.ndarray:
    """Return a weight for `busiest_slices` under which every structure of a label map counts alike, however small."""
    values = np.clip(labels, 0, None).astype(np.int64)
    sizes = np.bincount(values.ravel()).astype(np.float64)
    share = np.divide(1.0, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    share[0] = 0
    return np.asarray(share[values])


def grey(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Return (..., 3) float32 in 0 to 1 of an image shown between two values; what is not finite is black."""
    low, high = window
    finite = np.nan_to_num(image.astype(np.float32), nan=low, posinf=high, neginf=low)
    scaled = np.clip((finite - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat(scaled[..., None], 3, axis=-1)


def window_of(image: np.ndarray) -> tuple[float, float]:
    """Return the 1st and 99.5th percentile of the finite voxels, (0, 1) when there are none."""
    finite = image[np.isfinite(image)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(finite, [1, 99.5])
    return float(low), float(high)


def reconstruction_png(image: np.ndarray, hidden: np.ndarray, output: np.ndarray, spacing_mm: Spacing) -> bytes:
    """Draw input, what the encoder saw, the completed image and its error in three planes.

    Args:
        image: (X, Y, Z) input.
        hidden: (X, Y, Z) bool, True = hidden from the encoder.
        output: (X, Y, Z) prediction; shown at hidden voxels alone: a masked-only loss leaves the rest untrained.
        spacing_mm: (3,) voxel size.
    """
    window = window_of(image)
    seen = grey(image, window)
    error = np.where(hidden, output.astype(np.float32) - image.astype(np.float32), 0)
    volumes = {
        "input": seen,
        "seen by the encoder": np.where(hidden[..., None], np.asarray(HIDDEN, np.float32), seen),
        "completed": np.where(hidden[..., None], grey(output, window), seen),
        "error where hidden": _signed(error, limit=(window[1] - window[0]) / 2),
    }
    slices = busiest_slices(seen[..., 0])
    pictures = {
        heading: {plane: upright(np.take(volume, slices[plane], axis=PLANES[plane][2])) for plane in PLANES}
        for heading, volume in volumes.items()
    }
    spacings = {plane: (float(spacing_mm[a]), float(spacing_mm[b])) for plane, (a, b, _) in PLANES.items()}
    return _panels(pictures, spacings)


def segmentation_png(cuts: Mapping[str, Cut], structures: Sequence[str]) -> bytes:
    """Draw an image and label maps over it in three planes.

    Args:
        cuts: Plane -> the slice to show; `PICTURE` -> a picture.
        structures: Names for the legend.
    """
    window = window_of(np.concatenate([cut.image.ravel() for cut in cuts.values()]))
    pictures: dict[str, dict[str, np.ndarray]] = {"image": {}}
    outlines: dict[str, dict[str, np.ndarray]] = {}
    for plane, cut in cuts.items():
        base = grey(cut.image, window)
        pictures["image"][plane] = shown(plane, base)
        for heading, labels in cut.maps.items():
            painted = base.copy()
            for k in range(1, len(structures) + 1):
                colour = np.asarray(_rgb(COLOURS[(k - 1) % len(COLOURS)]), np.float32)
                painted[labels == k] = 0.6 * base[labels == k] + 0.4 * colour
            pictures.setdefault(heading, {})[plane] = shown(plane, painted)
            outlines.setdefault(heading, {})[plane] = shown(plane, labels)
    spacings = {
        plane: cut.spacing_mm if plane != PICTURE else (cut.spacing_mm[1], cut.spacing_mm[0]) for plane, cut in cuts.items()
    }
    return _panels(pictures, spacings, outlines=outlines, legend=structures)


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _signed(error: np.ndarray, limit: float) -> np.ndarray:
    """Return (..., 3): black at 0, blue where the output is too dark, orange where it is too bright."""
    scaled = np.clip(np.nan_to_num(error / max(limit, 1e-6)), -1, 1).astype(np.float32)
    below, above = np.asarray(_rgb("#56B4E9"), np.float32), np.asarray(_rgb("#E69F00"), np.float32)
    return np.abs(scaled[..., None]) * np.where(scaled[..., None] < 0, below, above)


def _panels(
    pictures: Mapping[str, Mapping[str, np.ndarray]],
    spacings: Mapping[str, tuple[float, float]],
    *,
    outlines: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    legend: Sequence[str] = (),
) -> bytes:
    """Draw columns of upright (H, W, 3) pictures, one row per plane, on black and to scale.

    Args:
        pictures: Heading -> plane -> picture.
        spacings: Plane -> mm per pixel across and down.
        outlines: Heading -> plane -> (H, W) label map.
        legend: Structure names.
    """
    from matplotlib.figure import Figure

    first = next(iter(pictures.values()))
    planes = [plane for plane in (*PLANES, PICTURE) if plane in first]
    sizes = {p: (first[p].shape[1] * spacings[p][0], first[p].shape[0] * spacings[p][1]) for p in planes}
    column, gap, head, foot = 2.2, 0.07, 0.28, 0.30 if legend else 0.07  # inches
    scale = column / max(width for width, _ in sizes.values())  # inches per mm
    width = len(pictures) * (column + gap) + gap
    height = head + sum(h * scale + gap for _, h in sizes.values()) + foot
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="black")
    for c, heading in enumerate(pictures):
        middle = gap + c * (column + gap) + column / 2
        style: dict[str, Any] = {"color": "#e8e8e8", "size": 9, "ha": "center", "va": "center"}
        figure.text(middle / width, 1 - head / 2 / height, _plain(heading), **style)
        top = height - head
        for plane in planes:
            wide, high = (mm * scale for mm in sizes[plane])
            axes = figure.add_axes(((middle - wide / 2) / width, (top - high) / height, wide / width, high / height))
            axes.imshow(pictures[heading][plane], aspect="auto", interpolation="nearest")
            axes.axis("off")
            if outlines and heading in outlines:
                _outline(axes, outlines[heading][plane], len(legend))
            if c == 0 and plane != PICTURE:
                _orientation(axes, plane)
            top -= high + gap
    for k, name in enumerate(legend):
        style = {"color": COLOURS[k % len(COLOURS)], "size": 9, "ha": "center", "va": "center"}
        figure.text((k + 0.5) / len(legend), 0.14 / height, f"\N{BLACK SQUARE} {_plain(name)}", **style)
    return to_png(figure)


def _outline(axes: Any, labels: np.ndarray, count: int) -> None:
    for k in range(1, count + 1):
        inside = labels == k
        if inside.any() and not inside.all() and min(inside.shape) > 1:
            axes.contour(inside.astype(float), levels=[0.5], colors=[COLOURS[(k - 1) % len(COLOURS)]], linewidths=1.1)


def _orientation(axes: Any, plane: str) -> None:
    """Write R, L, A, P, S, I at the edges: a mirrored picture is the classic mistake."""
    from matplotlib.patheffects import withStroke

    across, down, _ = PLANES[plane]
    edge = [withStroke(linewidth=1.6, foreground="black")]  # readable on bright fat as well
    style = {"color": "#ffe08a", "size": 7, "transform": axes.transAxes, "path_effects": edge}
    axes.text(0.01, 0.5, _EDGES[across][0], ha="left", va="center", **style)
    axes.text(0.99, 0.5, _EDGES[across][1], ha="right", va="center", **style)
    axes.text(0.5, 0.99, _EDGES[down][0], ha="center", va="top", **style)
    axes.text(0.5, 0.01, _EDGES[down][1], ha="center", va="bottom", **style)


def charts_png(charts: Sequence[Chart], theme: Theme, *, columns: int = 3, panel: tuple[float, float] = (3.3, 2.3)) -> bytes:
    """Draw small charts in a grid on a transparent page.

    Args:
        charts: At least one.
        theme: `LIGHT` or `DARK`.
        columns: Charts in a row at most.
        panel: Width and height of a chart in inches.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(columns * panel[0], rows * panel[1]), dpi=DPI, facecolor="none")
    width, height = figure.get_size_inches()
    left, right, top, bottom = 0.48, 0.12, 0.26, 0.42  # inches; a layout engine would double the time
    for k, chart in enumerate(charts):
        x, y = (k % columns) * panel[0] + left, (rows - 1 - k // columns) * panel[1] + bottom
        box = (x / width, y / height, (panel[0] - left - right) / width, (panel[1] - top - bottom) / height)
        _draw_chart(figure.add_axes(box), chart, theme)
    return to_png(figure)


def _draw_chart(axes: Any, chart: Chart, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.set_title(_plain(chart.title), color=theme.text, size=9, loc="left")
    axes.set_xlabel(_plain(chart.x_label), color=theme.text, size=8)
    axes.tick_params(colors=theme.text, labelsize=7.5, length=2)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    for line in chart.lines:
        colour = theme.lines[line.colour % len(theme.lines)]
        x, y = _drawable(line.x), _drawable(line.y)
        if line.low is not None and line.high is not None:
            low, high = _drawable(line.low), _drawable(line.high)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        many = chart.smooth and np.isfinite(y).sum() > 60
        if many:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
            x, y = running_mean(x, y, window=max(5, len(x) // 40))
        marker = "o" if np.isfinite(y).sum() <= 12 else None
        axes.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=4, label=_plain(line.label))
    if chart.log_x:
        from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({float(v) for line in chart.lines for v in line.x})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if any(line.label for line in chart.lines):
        axes.legend(fontsize=7.5, frameon=False, labelcolor=theme.text)


def running_mean(x: np.ndarray, y: np.ndarray, *, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over a centred window of the finite points, narrower at both ends.

    Args:
        x: (N,) abscissa.
        y: (N,) ordinate, may hold NaN.
        window: Points in the window.
    """
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    total = np.concatenate([[0.0], np.cumsum(y)])
    centre = np.arange(len(y))
    low, high = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(y))
    return x, (total[high] - total[low]) / (high - low)


def _drawable(values: np.ndarray) -> np.ndarray:
    """Return float64 with infinities and values too large for the drawing transforms as NaN (a gap)."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(values) & (np.abs(values) < 1e30), values, np.nan)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics, or a legend entry as private; underscores are for files."""
    return str(text).replace("$", r"\$").replace("_", " ").strip()


def to_png(figure: Any) -> bytes:
    """Return a figure as PNG bytes that depend on what is drawn alone."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor=figure.get_facecolor())
    return buffer.getvalue()
