"""One number for many tasks: mean z-score, mean rank, wins and losses; missing cells are counted and not filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEAST_MODELS = 3


def z_scores(table: Mapping[str, Mapping[str, float]], higher: Mapping[str, bool] | None = None) -> dict[str, dict[str, float]]:
    """Return task -> model -> (score - mean over models) / std over models, signed so that higher is better.

    Args:
        table: Task -> model -> score. A task that all models score alike has 0 for each; with fewer than three models it is left out:
            of two, one has +1 and the other -1, however small the difference (see `pairs`).
        higher: Task -> whether higher is better; tasks that are not named are.

    Reference:
        Goldblum et al. 2023, "Battle of the Backbones", section 3 (population standard deviation over the models of a task).
    """
    found = {}
    for task, scores in table.items():
        known = {model: value for model, value in scores.items() if np.isfinite(value)}
        if len(known) < LEAST_MODELS:
            continue
        values = np.array(list(known.values()))
        sign = 1.0 if (higher or {}).get(task, True) else -1.0
        spread = values.std()
        found[task] = {m: sign * float((v - values.mean()) / spread) if spread > 0 else 0.0 for m, v in known.items()}
    return found


def pairs(table: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return the tasks with two models, which `z_scores` leaves out: task, both models, and the first's score minus the second's."""
    found = []
    for task, scores in table.items():
        known = [(model, value) for model, value in scores.items() if np.isfinite(value)]
        if len(known) == 2:
            (first, a), (second, b) = known
            found.append({"task": task, "models": [first, second], "difference": float(a - b)})
    return found


def aggregate(
    table: Mapping[str, Mapping[str, float]],
    higher: Mapping[str, bool] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return one row per model: mean z-score (mean over kinds of the mean over their tasks), mean rank, tasks and missing ones.

    Tasks with fewer than three models have no part in any of it.

    Args:
        table: Task -> model -> score; NaN or no entry is a missing cell.
        higher: Task -> whether higher is better.
        kinds: Task -> modality, so that each weighs the same; None takes all tasks alike.
    """
    scores = z_scores(table, higher)
    models = sorted({model for row in table.values() for model in row})
    rows = []
    for model in models:
        by_kind: dict[str, list[float]] = {}
        ranks = []
        for task, row in scores.items():
            if model in row:
                by_kind.setdefault((kinds or {}).get(task, ""), []).append(row[model])
                better = sum(value > row[model] for value in row.values())
                equal = sum(value == row[model] for value in row.values())
                ranks.append(better + (equal + 1) / 2)
        means = [float(np.mean(values)) for values in by_kind.values()]
        rows.append(
            {"model": model, "z": float(np.mean(means)) if means else None, "rank": float(np.mean(ranks)) if ranks else None}
            | {"tasks": len(ranks), "missing": len(scores) - len(ranks)}
        )
    return sorted(rows, key=lambda row: -(row["z"] if row["z"] is not None else -np.inf))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Return which hypotheses are rejected when all are tested together.

    Reference:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for step, place in enumerate(order):
        if p_values[int(place)] > level / (len(p_values) - step):
            break
        rejected[int(place)] = True
    return rejected
