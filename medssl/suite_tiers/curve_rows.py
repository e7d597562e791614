"""What the cells of a label curve say besides their main score: distances, structures, sensitivity at false positives, subgroups."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.evaluation.clinical import OPEN_COLUMNS, dice_of_cases, structure_rows
from medssl.evaluation.clinical_boxes import by_name, froc_row
from medssl.evaluation.folds import pool_folds
from medssl.evaluation.suite_rows import WEIGHTS, Row, row_of, skip
from medssl.suite_tiers.bench import Bench, Found, join
from medssl.suite_tiers.groups import scored_groups

Result = Mapping[str, Any]


def read_cells(folder: Path) -> list[Result]:
    """Return the results of the finished cells of a curve."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("cells/*/results.json"))]


def further(bench: Bench, tier: str, task: str, cells: Sequence[Result], how: str = "") -> Found:
    """Return the rows of segmentation and detection that a summary lacks; nothing of other tiers.

    Args:
        bench: What the suite asks.
        tier: `segmentation` or `detection`.
        task: Name of the curve.
        cells: Contents of `results.json` of its cells.
        how: Put behind the number of labels, for instance `, frozen encoder`.
    """
    found = Found()
    runs = pool_folds([cell for cell in cells if cell.get("cases")])
    for labels in sorted({int(run["labels"]) for run in runs}):
        arms: dict[str, list[Result]] = {}
        for run in runs:
            if run["labels"] == labels:
                arms.setdefault(str(run["arm"]), []).append(run)
        setting = f"{labels} labels{how}"
        if tier == "segmentation":
            found.rows += _structures(bench, task, setting, arms)
        elif tier == "detection":
            found.rows += _froc(bench, task, setting, arms)
    if tier == "segmentation" and runs:
        most = max(int(run["labels"]) for run in runs)
        join(found, _dice_by_group(bench, task, f"{most} labels{how}", [run for run in runs if run["labels"] == most]))
    return found


def _score(arm: str, metric: str, estimate: Mapping[str, Any], n: int, patients: int | None) -> dict[str, Any]:
    values = {key: estimate[key] for key in ("value", "low", "high")}
    return {"name": arm, "metric": metric, **values, "n_images": n, "n_patients": patients}


def _structures(bench: Bench, task: str, setting: str, arms: Mapping[str, Sequence[Result]]) -> list[Row]:
    """Return Dice and HD95 in mm of every structure; what measures no distance (controls, pictures without a size) has none."""
    rows = []
    for one in structure_rows(arms, bench.recipe.draws):
        for metric in ("dice", "hd95_mm"):
            if (known := one[metric])["n"]:
                score = _score(one["arm"], metric, known, known["n"], known["n_patients"])
                rows.append(row_of(score, "segmentation", task, f"{setting}, {one['structure']}", seeds=len(arms[one["arm"]])))
    return rows


def _froc(bench: Bench, task: str, setting: str, arms: Mapping[str, Sequence[Result]]) -> list[Row]:
    """Return the sensitivity at each rate of false positives per image or volume, and the mean over the rates."""
    rows = []
    for arm, runs in arms.items():
        ordered = [by_name(run) for run in runs]
        patients = [case["patient_id"] for case in ordered[0]["cases"]]
        known = None if None in patients else patients
        row = froc_row(arm, ordered, known, bench.recipe.draws)
        if row["value"] is None:
            continue
        n_patients = None if known is None else len(set(known))
        parts = [
            (setting, "froc", row),
            *((f"{setting}, {rate} false positives", "sensitivity", at) for rate, at in row["at"].items()),
        ]
        for where, metric, estimate in parts:
            rows.append(row_of(_score(arm, metric, estimate, row["n"], n_patients), "detection", task, where, seeds=len(runs)))
    return rows


def _dice_by_group(bench: Bench, task: str, setting: str, runs: Sequence[Result]) -> Found:
    """Return the mean Dice of subgroups of the tested cases, in the tier of fairness; a cohort that is a query of an index knows them."""
    found = Found()
    arms: dict[str, list[Result]] = {}
    for run in runs:
        arms.setdefault(str(run["arm"]), []).append(run)
    facts = {str(case["id"]): case.get("facts") or {} for run in runs for case in run["cases"]}
    for column in bench.recipe.subgroups:
        said = {name: str(own.get(column) or "unknown") for name, own in facts.items()}
        if set(said.values()) <= {"unknown"}:
            found.skipped.append(skip(task, f"Dice by {column}", f"{column} is not known of any test case of the cohort"))
            continue
        names = sorted(said)
        public = dict(zip(names, bench.public(column, [said[name] for name in names])))
        if column not in OPEN_COLUMNS:
            found.private.setdefault("groups", {})[column] = dict(sorted({(public[name], said[name]) for name in names}))
        for arm, own in arms.items():
            ids, values, patients = dice_of_cases(own)
            model = WEIGHTS if arm == "pretrained" else arm
            rows, _ = scored_groups(
                bench, model, task, f"{setting}, by {column}", "dice", values[:, None], np.array([public[name] for name in ids]),
                patients, statistic=lambda table: float(table[:, 0].mean()), seeds=len(own),
            )  # fmt: skip
            found.rows += rows
    return found
