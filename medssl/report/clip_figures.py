"""Figures of video runs: a strip of frames with what was hidden and which prototypes were assigned, and a scatter of predictions.

A run leaves `figures/clips.npz` and `figures/regression.npz`; see `read_clips` and `read_regression` for what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.report.figures import DPI, HIDDEN, Theme, grey, to_png, window_of

COLUMNS = 8
"""Frames of a strip, evenly spread."""
NONE = -1
"""No prototype: a token outside the sector."""
GOLDEN = 0.618034


@dataclass(frozen=True)
class ClipStrip:
    """One clip as a strip shows it.

    Args:
        frames: (T, H, W) any unit.
        sector: (H, W) bool, True = inside.
        time_s: (T,) seconds.
        hidden: (h, w) bool tube mask, True = hidden, or None.
        prototypes: Name of a branch -> (T, h, w) prototype of each token, `NONE` outside the sector.
    """

    frames: np.ndarray
    sector: np.ndarray
    time_s: np.ndarray
    hidden: np.ndarray | None
    prototypes: Mapping[str, np.ndarray]


def read_clips(arrays: Mapping[str, np.ndarray]) -> list[ClipStrip] | str:
    """Return the clips of a figures file, or what is wrong with it.

    Args:
        arrays: `frames` (N, T, H, W), `sector` (N, H, W), `time_s` (N, T); optional `hidden` (N, h, w), and `<branch>_prototypes`
            (N, T, h, w) for any number of branches.
    """
    missing = [name for name in ("frames", "sector", "time_s") if name not in arrays]
    if missing:
        return f"has no array {', '.join(missing)}"
    frames, sector, time_s = (arrays[name] for name in ("frames", "sector", "time_s"))
    branches = {name.removesuffix("_prototypes"): found for name, found in arrays.items() if name.endswith("_prototypes")}
    hidden = arrays.get("hidden")
    n, t = frames.shape[:2] if frames.ndim == 4 else (0, 0)
    good = n > 0 and t > 0 and sector.shape == (n, *frames.shape[2:]) and time_s.shape == (n, t)
    good = good and all(found.ndim == 4 and found.shape[:2] == (n, t) for found in branches.values())
    good = good and (hidden is None or (hidden.ndim == 3 and len(hidden) == n))
    grids = {found.shape[2:] for found in branches.values()} | (set() if hidden is None else {hidden.shape[1:]})
    if not good or any(frames.shape[2] % rows or frames.shape[3] % columns for rows, columns in grids):
        return "expected frames (N, T, H, W), sector (N, H, W), time_s (N, T) and token grids that divide H and W"
    return [
        ClipStrip(
            frames[k], sector[k].astype(bool), time_s[k], None if hidden is None else hidden[k].astype(bool),
            {name: found[k] for name, found in branches.items()},
        )
        for k in range(n)
    ]  # fmt: skip


def read_regression(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | str:
    """Return targets and predictions (N,) of a figures file with `target` and `predicted`, or what is wrong with it."""
    if not {"target", "predicted"} <= set(arrays):
        return "has no arrays target and predicted"
    target, predicted = (np.asarray(arrays[name], dtype=np.float64) for name in ("target", "predicted"))
    if target.ndim != 1 or target.shape != predicted.shape or not np.isfinite(target).any():
        return "expected target and predicted of one length, finite"
    return target, predicted


def strip_rows(clip: ClipStrip, columns: int = COLUMNS) -> tuple[list[tuple[str, np.ndarray]], np.ndarray]:
    """Return headings and pictures (K, H, W, 3) of the rows of a strip, and the times (K,) of its columns.

    Outside the sector everything is black. Where a token was hidden, its square is painted; a prototype has the same colour at all times.
    """
    chosen = np.unique(np.linspace(0, len(clip.frames) - 1, min(columns, len(clip.frames))).round().astype(int))
    inside = clip.frames[:, clip.sector]
    shown = grey(clip.frames[chosen], window_of(inside if inside.size else clip.frames))
    shown = np.where(clip.sector[None, :, :, None], shown, 0.0).astype(np.float32)
    rows = [("clip", shown)]
    size = clip.frames.shape[1:]
    if clip.hidden is not None:
        cover = np.asarray(HIDDEN, np.float32)
        painted = np.where((_large(clip.hidden, size) & clip.sector)[None, :, :, None], cover, shown)
        rows.append(("student sees", painted))
    order = _by_frequency(list(clip.prototypes.values()))
    for name, found in clip.prototypes.items():
        places = np.stack([_large(one, size) for one in found[chosen]])
        colours = prototype_colours(len(order))[np.searchsorted(order, np.clip(places, order[0] if len(order) else 0, None))]
        known = ((places != NONE) & clip.sector)[..., None]
        rows.append((f"{name} prototypes", np.where(known, 0.35 * shown + 0.65 * colours, 0.4 * shown).astype(np.float32)))
    return rows, clip.time_s[chosen]


def prototype_colours(count: int) -> np.ndarray:
    """Return (max(count, 1), 3) colours whose hues lie as far apart as the golden section puts them."""
    from matplotlib.colors import hsv_to_rgb

    k = np.arange(max(count, 1))
    colours: np.ndarray = hsv_to_rgb(np.stack([(k * GOLDEN) % 1, 0.45 + 0.4 * (k % 2), 0.75 + 0.25 * (k % 3 == 0)], axis=1))
    return colours.astype(np.float32)


def _by_frequency(found: Sequence[np.ndarray]) -> np.ndarray:
    """Return the prototypes that occur, sorted."""
    used = [np.unique(one[one != NONE]) for one in found]
    return np.unique(np.concatenate(used)) if used else np.zeros(0, dtype=int)


def _large(cells: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Repeat the cells of a token grid so that they fill a picture."""
    return np.repeat(np.repeat(cells, size[0] // cells.shape[0], axis=0), size[1] // cells.shape[1], axis=1)


def strip_png(clip: ClipStrip, columns: int = COLUMNS) -> bytes:
    """Draw a clip: one row each for the frames, what the student saw, and the prototypes of each branch; time runs to the right."""
    from matplotlib.figure import Figure

    rows, times = strip_rows(clip, columns)
    height, width = clip.frames.shape[1:]
    cell, gap, head, left = 1.15, 0.05, 0.24, 0.26  # inches
    high = cell * height / width
    wide = left + len(times) * (cell + gap)
    tall = head + len(rows) * (high + gap)
    figure = Figure(figsize=(wide, tall), dpi=DPI, facecolor="black")
    style: dict[str, Any] = {"color": "#e8e8e8", "ha": "center", "va": "center"}
    for c, time in enumerate(times):
        figure.text((left + c * (cell + gap) + cell / 2) / wide, 1 - head / 2 / tall, f"{time:.2f} s", size=8, **style)
    for r, (heading, pictures) in enumerate(rows):
        bottom = tall - head - (r + 1) * (high + gap)
        figure.text(left / 2 / wide, (bottom + high / 2) / tall, heading, size=6.5, rotation=90, **style)
        for c, picture in enumerate(pictures):
            axes = figure.add_axes(((left + c * (cell + gap)) / wide, bottom / tall, cell / wide, high / tall))
            axes.imshow(picture, aspect="auto", interpolation="nearest")
            axes.axis("off")
    return to_png(figure)


def scatter_png(target: np.ndarray, predicted: np.ndarray, theme: Theme, *, unit: str = "points") -> bytes:
    """Draw predictions over targets on one scale, with the line of equal values and the line that always says the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.4), dpi=DPI, facecolor="none")
    axes = figure.add_axes((0.16, 0.15, 0.8, 0.75))
    known = np.isfinite(target) & np.isfinite(predicted)
    x, y = target[known], predicted[known]
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    room = 0.05 * max(high - low, 1e-6)
    limits = (low - room, high + room)
    axes.set_facecolor("none")
    axes.plot(limits, limits, color=theme.grid, linewidth=1.2)
    axes.axhline(float(x.mean()), color=theme.grid, linewidth=1, linestyle=":")
    axes.plot(x, y, "o", color=theme.lines[0], markersize=4, alpha=0.75, markeredgewidth=0)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    error = float(np.abs(x - y).mean())
    axes.set_title(f"mean absolute error {error:.1f} {unit}, n = {len(x)}", color=theme.text, size=9, loc="left")
    axes.set_xlabel("measured", color=theme.text, size=8)
    axes.set_ylabel("predicted", color=theme.text, size=8)
    axes.tick_params(colors=theme.text, labelsize=7.5, length=2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    return to_png(figure)
