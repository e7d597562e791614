"""Agreement and reliability, drawn: Bland and Altman's plot, and confidence against accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.report.figures import DPI, Theme, _plain, to_png

PANEL = (3.5, 2.9)  # inches


@dataclass(frozen=True)
class AgreementPlot:
    """One plot of Bland and Altman.

    Args:
        title: Text above.
        unit: Of both axes, may be empty.
        reference: (N,) measured by hand.
        measured: (N,) measured by the network.
        bias: Value, low and high.
        lower: The lower limit of agreement, value, low and high.
        upper: The upper limit.
        colour: Place in the theme's colours.
    """

    title: str
    unit: str
    reference: np.ndarray
    measured: np.ndarray
    bias: Sequence[float | None]
    lower: Sequence[float | None]
    upper: Sequence[float | None]
    colour: int = 0


def agreement_png(plots: Sequence[AgreementPlot], theme: Theme, *, columns: int = 3) -> bytes:
    """Draw difference over mean, with bias, limits of agreement and the intervals of all three.

    Reference:
        Bland and Altman 1999, figure 2.
    """
    figure, boxes = _grid(len(plots), columns)
    for plot, box in zip(plots, boxes):
        axes = figure.add_axes(box)
        _frame(axes, theme, plot.title)
        mean, away = (plot.reference + plot.measured) / 2, plot.measured - plot.reference
        colour = theme.lines[plot.colour % len(theme.lines)]
        for line, style in ((plot.bias, "-"), (plot.lower, "--"), (plot.upper, "--")):
            value, low, high = (np.nan if v is None else float(v) for v in line)
            if np.isfinite(low) and np.isfinite(high):
                axes.axhspan(low, high, color=colour, alpha=0.15, linewidth=0)
            if np.isfinite(value):
                axes.axhline(value, color=colour, linestyle=style, linewidth=1.1)
        axes.axhline(0, color=theme.text, linewidth=0.7, alpha=0.6)
        axes.scatter(mean, away, s=14, color=colour, alpha=0.75, linewidths=0)
        unit = f" ({plot.unit})" if plot.unit else ""
        axes.set_xlabel(_plain(f"mean of both{unit}"), color=theme.text, size=8)
        axes.set_ylabel(_plain(f"network minus reference{unit}"), color=theme.text, size=8)
    return to_png(figure)


def reliability_png(bins: Mapping[str, Sequence[Mapping[str, Any]]], theme: Theme, colours: Mapping[str, int]) -> bytes:
    """Draw accuracy over confidence of each arm, points as large as their number of cases; on the diagonal is right.

    Reference:
        Guo et al. 2017, "On Calibration of Modern Neural Networks", figure 1.
    """
    figure, boxes = _grid(len(bins), 3)
    for (arm, rows), box in zip(bins.items(), boxes):
        axes = figure.add_axes(box)
        _frame(axes, theme, arm)
        confidence, accuracy, n = (np.array([float(row[key]) for row in rows]) for key in ("confidence", "accuracy", "n"))
        colour = theme.lines[colours.get(arm, 0) % len(theme.lines)]
        axes.plot([0, 1], [0, 1], color=theme.text, linewidth=0.7, alpha=0.6)
        axes.plot(confidence, accuracy, color=colour, linewidth=0.8, alpha=0.6)
        axes.scatter(confidence, accuracy, s=10 + 90 * n / max(n.max(initial=1), 1), color=colour, alpha=0.7, linewidths=0)
        axes.set(xlim=(max(0, confidence.min(initial=1) - 0.08), 1.03), ylim=(-0.03, 1.03))
        axes.set_xlabel("stated probability of the called class", color=theme.text, size=8)
        axes.set_ylabel("share called rightly", color=theme.text, size=8)
    return to_png(figure)


def _grid(count: int, columns: int) -> tuple[Any, list[tuple[float, float, float, float]]]:
    """Return a transparent figure and the boxes of its panels, row by row."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    width, height = columns * PANEL[0], rows * PANEL[1]
    left, right, top, bottom = 0.62, 0.14, 0.28, 0.46
    boxes = [
        (
            ((k % columns) * PANEL[0] + left) / width,
            ((rows - 1 - k // columns) * PANEL[1] + bottom) / height,
            (PANEL[0] - left - right) / width,
            (PANEL[1] - top - bottom) / height,
        )
        for k in range(count)
    ]
    return Figure(figsize=(width, height), dpi=DPI, facecolor="none"), boxes


def _frame(axes: Any, theme: Theme, title: str) -> None:
    axes.set_facecolor("none")
    axes.set_title(_plain(title), color=theme.text, size=9, loc="left")
    axes.tick_params(colors=theme.text, labelsize=7.5, length=2)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
