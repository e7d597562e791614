"""Curves of the page of a run: loss and monitors against step, and Dice against the number of labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl.report import figures
from medssl.report.collect import Json, Leftovers, number
from medssl.report.elements import absent, charts
from medssl.report.headline import network_of


def training_curves(found: Leftovers) -> str:
    """Return loss, live probes and monitors of a pretraining, and the losses of fine-tuning."""
    parts = []
    if found.metrics:
        keys = list(dict.fromkeys(key for row in found.metrics for key in row if key != "step"))
        columns = {key: np.array([_or_nan(row.get(key)) for row in found.metrics]) for key in keys}
        losses = [key for key in keys if key == "loss" or key.endswith("/loss") or key.startswith("loss/")]
        probes = [key for key in keys if key.startswith("probe/")]
        drawn = [key for key in keys if np.isfinite(columns[key]).any()]
        for group, alt in (
            (losses, "Loss against step"),
            (probes, "Live probes against step"),
            ([key for key in keys if key not in (*losses, *probes)], "Monitors against step"),
        ):
            shown = [key for key in group if key in drawn][:12]
            if shown:
                panel = (5.4, 2.8) if len(shown) == 1 else (3.3, 2.2)
                parts.append(charts([_chart(key, found.metrics) for key in shown], alt, panel=panel))
        logged = [row["loss"] for row in found.metrics if "loss" in row]
        holes = sum(number(loss) is None for loss in logged)
        if holes:
            parts.append(f'<p class="warn">{holes} of {len(logged)} logged losses were not finite.</p>')
    else:
        parts.append(absent("No metrics.jsonl was found.", "<code>medssl pretrain</code> writes one."))
    parts.append(_finetune_curves(found))
    return "".join(parts)


def _chart(key: str, metrics: Sequence[Json]) -> figures.Chart:
    """Return the chart of one metric: lines of other monitors leave no gap in it, a loss that was not finite does."""
    points = [(_or_nan(row.get("step", k)), _or_nan(row[key])) for k, row in enumerate(metrics) if key in row]
    points = [(step, value) for step, value in points if math.isfinite(step) and (math.isfinite(value) or key == "loss")]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    name = key.removeprefix("monitor/").replace("probe/", "probe ").replace("_", " ")
    return figures.Chart(name, [figures.Line("", steps, values)], smooth=True)


def _finetune_curves(found: Leftovers) -> str:
    """Return the fine-tuning losses and validation Dice of both arms, so that a plateau can be seen."""
    panels: dict[str, list[figures.Line]] = {}
    seen: set[tuple[str, str]] = set()
    for result in found.results:
        curve = [row for row in result.get("curve") or [] if isinstance(row, dict)]
        arm = str(result.get("arm", "unknown"))
        where = " at ".join(part for part in (network_of(result), f"{result.get('labels', '?')} labels") if part)
        if (where, arm) in seen:  # further seeds would only thicken the lines
            continue
        seen.add((where, arm))
        for key, title in (("loss", "fine-tuning loss"), ("val_dice", "validation Dice"), ("dice", "validation Dice")):
            points = [(_or_nan(row.get("step")), _mean_of(row.get(key))) for row in curve]
            points = [(step, value) for step, value in points if math.isfinite(step) and math.isfinite(value)]
            if len(points) > 1:
                x, y = (np.array(part) for part in zip(*points))
                lines = panels.setdefault(f"{title}, {where}", [])
                lines.append(figures.Line(arm, x, y, colour=1 if arm == "scratch" else (0, 2, 3)[len(lines) % 3]))
    if not panels:
        return ""
    parts = [figures.Chart(title, lines, smooth=True) for title, lines in list(panels.items())[:12]]
    return charts(parts, "Fine-tuning: loss and validation Dice against step", "Fine-tuning, first seed of each arm.")


def label_curves(found: Leftovers) -> str:
    """Return Dice of every arm against the number of labels, with its interval."""
    parts = []
    for curve in found.curves:
        arms: dict[str, list[Json]] = {}
        for row in curve["rows"]:
            if number(row.get("labels")) is not None and number(row.get("dice")) is not None:
                arms.setdefault(str(row.get("arm", "")), []).append(row)
        lines = []
        for k, (arm, rows) in enumerate(sorted(arms.items(), key=lambda item: item[0] == "scratch")):
            rows.sort(key=lambda row: float(row["labels"]))
            columns = {key: np.array([_or_nan(row.get(key)) for row in rows]) for key in ("labels", "dice", "low", "high")}
            colour = 1 if arm == "scratch" else (0, 2, 3, 4)[k % 4]
            lines.append(figures.Line(arm, columns["labels"], columns["dice"], columns["low"], columns["high"], colour))
        if lines and len(lines[0].x) > 1:
            chart = figures.Chart("mean Dice on test", lines, x_label="labelled training cases", log_x=True)
            parts.append(charts([chart], "Label curve: mean Dice against labelled cases", columns=1, panel=(5.4, 3.0)))
    return "".join(parts)


def _mean_of(value: Any) -> float:
    """Return a number, or the mean of the numbers in name -> value."""
    if isinstance(value, Mapping):
        kept = [v for v in map(number, value.values()) if v is not None]
        return float(np.mean(kept)) if kept else math.nan
    return _or_nan(value)


def _or_nan(value: Any) -> float:
    found = number(value)
    return math.nan if found is None else found
