"""Boxes over pictures and slices: on the left what is there, on the right what was found, both coloured by whether they agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.report.figures import COLOURS, DPI, PLANES, _orientation, _plain, to_png, upright

RIGHT, WRONG, NEITHER = COLOURS[2], COLOURS[4], COLOURS[7]  # bluish green, vermillion, white
LEGEND = (("found, and rightly", RIGHT), ("missed, or found for nothing", WRONG), ("counts neither way", NEITHER))
COLUMN = 3.0  # inches


@dataclass(frozen=True)
class BoxCut:
    """A picture, or a slice of a volume, with its boxes.

    Args:
        image: (A, B) or (A, B, 3), 0 to 1; of a slice A and B are the remaining axes in X, Y, Z order, of a picture its rows and columns.
        spacing: (2,) pixel size along A and B, in any unit.
        real: (N, 4) boxes in pixels: low A, low B, high A, high B.
        real_kind: (N,) 1 found, 0 missed, -1 counts neither way.
        found: (M, 4).
        found_kind: (M,) 1 right, 0 wrong, -1 neither.
        found_score: (M,).
    """

    image: np.ndarray
    spacing: np.ndarray
    real: np.ndarray
    real_kind: np.ndarray
    found: np.ndarray
    found_kind: np.ndarray
    found_score: np.ndarray


def read_worst(path: Path) -> dict[str, dict[str, BoxCut]]:
    """Return the pictures in a `figures/worst.npz` of a detection, by name of the case and plane; none where the file cannot be read."""
    fields = tuple(BoxCut.__dataclass_fields__)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        planes = [str(plane) for plane in arrays["planes"]]
        return {
            str(case): {plane: BoxCut(**{name: arrays[f"{place}_{plane}_{name}"] for name in fields}) for plane in planes}
            for place, case in enumerate(arrays["case"])
        }
    except Exception:  # zip, npy header, a missing array: a page without these pictures is still a page
        return {}


def boxes_png(cuts: dict[str, BoxCut]) -> bytes:
    """Draw real and found boxes of one case side by side, one row per plane, to scale."""
    from matplotlib.figure import Figure

    shown = {plane: _upright(cut) if plane in PLANES else cut for plane, cut in cuts.items()}
    sizes = {plane: np.array(cut.image.shape[:2]) * cut.spacing for plane, cut in shown.items()}
    scale = COLUMN / max(float(size[1]) for size in sizes.values())
    gap, head, foot = 0.07, 0.28, 0.30
    width = 2 * (COLUMN + gap) + gap
    height = head + foot + sum(float(size[0]) * scale + gap for size in sizes.values())
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="black")
    for column, heading in enumerate(("there", "found")):
        left, top = gap + column * (COLUMN + gap), height - head
        style: dict[str, Any] = {"color": "#e8e8e8", "size": 9, "ha": "center", "va": "center"}
        figure.text((left + COLUMN / 2) / width, 1 - head / 2 / height, heading, **style)
        for plane, cut in shown.items():
            high, wide = (float(v) * scale for v in sizes[plane])
            box = ((left + (COLUMN - wide) / 2) / width, (top - high) / height, wide / width, high / height)
            axes = figure.add_axes(box)
            _draw(axes, cut, found=heading == "found")
            if plane in PLANES and not column:
                _orientation(axes, plane)
            top -= high + gap
    for k, (words, colour) in enumerate(LEGEND):
        style = {"color": colour, "size": 8, "ha": "center", "va": "center"}
        figure.text((k + 0.5) / len(LEGEND), 0.14 / height, f"\N{BLACK SQUARE} {_plain(words)}", **style)
    return to_png(figure)


def _draw(axes: Any, cut: BoxCut, *, found: bool) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2.6, foreground="black")]  # seen on stained cells and bright fat as well
    rows, columns = cut.image.shape[:2]
    how = {} if cut.image.ndim == 3 else {"cmap": "gray", "vmin": 0, "vmax": 1}
    axes.imshow(cut.image, aspect="auto", interpolation="nearest", extent=(0, columns, rows, 0), **how)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    boxes, kinds = (cut.found, cut.found_kind) if found else (cut.real, cut.real_kind)
    for (low, left, high, right), kind in zip(boxes, kinds):
        colour = {1: RIGHT, 0: WRONG}.get(int(kind), NEITHER)
        dashes = "--" if kind == 0 else "-"  # told apart in grey print too
        style: dict[str, Any] = {"edgecolor": colour, "linewidth": 1.5, "linestyle": dashes, "path_effects": edge}
        patch = Rectangle((left, low), right - left, high - low, fill=False, **style)
        axes.add_patch(patch)


def _upright(cut: BoxCut) -> BoxCut:
    """Return a slice with rows from top to bottom, as `figures.upright` turns it, and its boxes turned with it."""
    wide, high = cut.image.shape[:2]

    def turned(boxes: np.ndarray) -> np.ndarray:
        return np.stack([high - boxes[:, 3], wide - boxes[:, 2], high - boxes[:, 1], wide - boxes[:, 0]], axis=1)

    return BoxCut(
        upright(cut.image), cut.spacing[::-1], turned(cut.real), cut.real_kind, turned(cut.found), cut.found_kind, cut.found_score
    )
