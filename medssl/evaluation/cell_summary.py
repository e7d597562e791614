"""The table of a folder of cells: the main score with its interval per (labels, arm), the mean of all scores, differences to scratch.

Of several seeds the score is the mean, and intervals draw patients again with all seeds at once: they say how far the mean could move with
other patients, not with other seeds, whose scores are given beside it. Of several folds the tested cases are one test set; scores that rank cases
are the mean over folds (see `folds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medssl.evaluation.bootstrap import Statistic, bootstrap_interval
from medssl.evaluation.folds import pool_folds
from medssl.evaluation.label_curve import SCRATCH
from medssl.weights import forced_lines

Result = Mapping[str, Any]
Asked = tuple[np.ndarray, Sequence[str] | None, Statistic]
"""Rows of the tested cases, their patients, and what is to be known of the rows."""
Score = Callable[[Sequence[Result], Sequence[Result] | None], Asked]
"""(runs by seed, runs of the same seeds to take off or None) -> what to ask."""


def summarise_cells(
    results: Sequence[Result], metric: str, better: str, score_of: Callable[[Sequence[Result]], Score], *, draws: int
) -> dict[str, Any]:
    """Summarise cells.

    Args:
        results: Contents of `results.json` of finished cells.
        metric: Name of the main score.
        better: `higher` or `lower`.
        score_of: (all results, folds put together) -> how runs are scored.
        draws: Bootstrap draws; 0 gives no intervals.

    Returns:
        `metric`, `rows` (labels, arm, seeds, n_test, metric, value, low, high, seed_means, scores, seconds), `differences`. What cannot be
        given (an AUC of one class) is None.
    """
    results = pool_folds(results) if results else []
    if not results:
        return {"metric": "", "rows": [], "differences": []}
    score = score_of(results)
    rows, differences = [], []
    for labels in sorted({result["labels"] for result in results}):
        groups: dict[str, dict[int, Result]] = {}
        for result in results:
            if result["labels"] == labels:
                groups.setdefault(result["arm"], {})[result["seed"]] = result
        for arm, by_seed in groups.items():
            seeds = sorted(by_seed)
            asked = score([by_seed[seed] for seed in seeds], None)
            rows.append(
                {"labels": labels, "arm": arm, "seeds": seeds, "n_test": len(asked[0]), "metric": metric, **_estimate(asked, draws)}
                | {"seed_means": [_estimate(score([by_seed[seed]], None), 0)["value"] for seed in seeds]}
                | {"scores": _mean_scores([by_seed[seed] for seed in seeds])}
                | {"seconds": float(np.mean([result["seconds"]["train"] for result in by_seed.values()]))}
            )
        for arm, by_seed in groups.items():
            common = sorted(set(by_seed) & set(groups.get(SCRATCH, {})))
            if arm == SCRATCH or not common:
                continue
            found = _estimate(score([by_seed[seed] for seed in common], [groups[SCRATCH][seed] for seed in common]), draws)
            differences.append(
                {"labels": labels, "arm": arm, "against": SCRATCH, "seeds": common, "difference": found["value"]}
                | {"low": found["low"], "high": found["high"], "better": better}
            )
    return {"metric": metric, "rows": rows, "differences": differences}


def _estimate(asked: Asked, draws: int) -> dict[str, float | None]:
    rows, patients, statistic = asked
    if not draws:
        return {"value": _finite(float(statistic(rows))), "low": None, "high": None}
    value, low, high = bootstrap_interval(rows, patients, draws=draws, statistic=statistic)
    return {"value": _finite(value), "low": _finite(low), "high": _finite(high)}


def _mean_scores(runs: Sequence[Result]) -> dict[str, float]:
    """Return the mean over seeds of all scores that the cells have."""
    found: dict[str, list[float]] = {}
    for result in runs:
        for row in result["rows"]:
            if row["value"] is not None:
                found.setdefault(row["metric"] + (f" {row['class']}" if row.get("class") else ""), []).append(row["value"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def markdown(summary: Mapping[str, Any]) -> str:
    """Render a summary as two Markdown tables."""
    lines = [f"| labels | arm | {summary['metric']} (95 % interval) | per seed | others |", "|---|---|---|---|---|"]
    for row in summary["rows"]:
        others = ", ".join(f"{name} {value:.3f}" for name, value in row["scores"].items() if name != summary["metric"])
        seeds = ", ".join(_number(value) for value in row["seed_means"])
        lines.append(f"| {row['labels']} | {row['arm']} | {_number(row['value'])} ({_span(row)}) | {seeds} | {others} |")
    for line in forced_lines(summary.get("shared", {}).get("forced")):
        lines += ["", line]
    if summary["differences"]:
        lines += ["", "| labels | difference (95 % interval) | better |", "|---|---|---|"]
    for row in summary["differences"]:
        found = _number(row["difference"], "+.3f")
        lines.append(f"| {row['labels']} | {row['arm']} - {row['against']} {found} ({_span(row)}) | {row['better']} |")
    return "\n".join(lines)


def _span(row: Mapping[str, Any]) -> str:
    return "-" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
