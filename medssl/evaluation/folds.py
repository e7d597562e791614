"""Results of folds put together: every patient is tested once, so the tested cases of all folds are one test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Result = Mapping[str, Any]
OF_ONE_FOLD = ("fold", "reliability", "fitted", "training_range", "curve", "mean", "mean_dice", "n_test")
"""Parts of a result that belong to the network of one fold; pooled results have none of them."""


def pool_folds(results: Sequence[Result]) -> list[Result]:
    """Return one result per arm, labels and seed: the tested cases of all its folds together, and the mean of the folds' scores.

    Folds that are not finished leave their arm's seed out, so that no table mixes other patients. Results without folds come back as
    they are.

    Args:
        results: Contents of `results.json` of cells.

    Returns:
        Results; a pooled one has `folds` (fold, fitted, training_range of each), its cases have `fold`, and its rows have a value and no
        interval.
    """
    if all(result.get("fold") is None for result in results):
        return list(results)
    grouped: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        grouped.setdefault((result["arm"], result["labels"], result["seed"]), []).append(result)
    fullest = max(len(group) for group in grouped.values())
    return [_pooled(group) for group in grouped.values() if len(group) == (group[0].get("of_folds") or fullest)]


def _pooled(group: Sequence[Result]) -> dict[str, Any]:
    group = sorted(group, key=lambda result: int(result["fold"]))
    values: dict[str, list[float]] = {}
    for result in group:
        for row in result.get("rows") or []:  # segmentation has scores of cases alone
            if row["value"] is not None:
                values.setdefault(row["metric"], []).append(row["value"])
    choices = list(dict.fromkeys(str(result["choice"]) for result in group if result.get("choice")))
    shared = {key: value for key, value in group[0].items() if key not in OF_ONE_FOLD}
    return {
        **shared,
        "cases": [{**case, "fold": result["fold"]} for result in group for case in result["cases"]],
        "rows": [{"metric": metric, "value": float(np.mean(found))} for metric, found in values.items()],
        "seconds": {"train": float(np.mean([result["seconds"]["train"] for result in group]))},
        "choice": choices[0] if len(choices) == 1 else "by fold: " + "; ".join(choices) if choices else None,
        "folds": [{key: result.get(key) for key in ("fold", "fitted", "training_range")} for result in group],
    }
