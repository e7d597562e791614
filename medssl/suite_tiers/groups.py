"""The tier of subgroups, and of what frozen features say of site, sex and scanner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.calibration import expected_calibration_error, threshold_at_specificity
from medssl.evaluation.clinical import OPEN_COLUMNS
from medssl.evaluation.linear_probe import linear_probe
from medssl.evaluation.scores import mae, mean_auc, score_row
from medssl.evaluation.subgroups import POSITIVES, SMALLEST, called, equalised_odds, subgroup_rows
from medssl.evaluation.suite_rows import LOWER, Row, row_of, skip
from medssl.evaluation.target_cases import Cases
from medssl.suite_tiers.bench import Bench, Features, Found, join, or_skip
from medssl.suite_tiers.probes import LEAST, fitted_tasks, probe_tables, probes

CHOSEN = "best and worst on these same data"
CHOSEN_ODDS = "rate and groups picked on these same data"
SENSITIVITY = "sensitivity at 95 % specificity"
SPECIFICITY = 0.95
"""On validation cases, at the threshold from which a case is called positive (card evaluation-protocols, section B)."""


def fairness(bench: Bench, _out: Path) -> Found:
    """Scores by subgroup with the rule of the smallest group, gaps, and what frozen features say of site, sex and scanner."""
    done = Found()
    for name, cases in fitted_tasks(bench, done, "subgroups"):
        bench.of(name)
        with or_skip(done, name, "subgroups"):
            fitted = probes(bench, name)
            tables = probe_tables(bench, name, fitted)
            thresholds: dict[str, float] = {}
            if why := _no_threshold(cases):
                done.skipped.append(skip(name, f"equalised odds, {SENSITIVITY}", why))
            else:
                val = probe_tables(bench, name, fitted, "val")
                thresholds = {model: threshold_at_specificity(rows[:, 2], rows[:, 0], SPECIFICITY) for model, rows in val.items()}
            for column in bench.recipe.subgroups:
                join(done, _by_group(bench, name, column, tables, thresholds))
    for column in bench.recipe.leakage:
        join(done, _leakage(bench, column))
    done.private["groups"] = {
        column: dict(sorted(set(zip(bench.public(column, values), values))))
        for column in {*bench.recipe.subgroups, *bench.recipe.left_out}
        if column not in OPEN_COLUMNS and (values := bench.column(column)) is not None
    }
    return done


def _no_threshold(cases: Cases) -> str:
    """Return why cases cannot be called positive, or an empty string: the threshold is fitted on validation cases alone."""
    if len(cases.classes) != 2:
        kind = f"{len(cases.classes)} classes" if cases.classes else "numbers"
        return f"it is of two classes, and these are {kind}"
    if not (cases.targets[cases.where("val")] == 0).any():
        return "no validation case of the first class to fit a threshold on"
    return ""


def _by_group(bench: Bench, name: str, column: str, tables: Features, thresholds: Mapping[str, float] | None = None) -> Found:
    """Score every value of a column, and the gaps between them; equalised odds where a model has a threshold."""
    cases, values = bench.tasks[name], bench.column(column)
    if values is None:
        return Found(skipped=[skip(name, f"subgroups by {column}", f"no attached labels for {column}")])
    test = cases.where("test")
    kinds = np.array(bench.public(column, values))[cases.ids][test]
    if set(kinds.tolist()) <= {"unknown"}:
        return Found(skipped=[skip(name, f"subgroups by {column}", f"{column} is not known of any test case")])
    metric, statistic = ("auroc", mean_auc) if cases.task == "classification" else ("mae", mae)
    positives = cases.targets[test] == 1 if len(cases.classes) == 2 else None
    patients, found, setting = cases.patients(test), Found(), f"by {column}"
    for model, table in tables.items():
        rows, usable = scored_groups(
            bench, model, name, setting, metric, table, kinds, patients, statistic=statistic, positives=positives
        )
        found.rows += rows
        if cases.task == "classification":
            error, _ = scored_groups(
                bench,
                model,
                name,
                setting,
                "ece",
                table,
                kinds,
                patients,
                statistic=expected_calibration_error,
                positives=positives,
            )
            found.rows += error
        if thresholds:
            calls = np.stack([table[:, 0], table[:, 2] >= thresholds[model]], axis=1)
            seen, _ = scored_groups(
                bench, model, name, setting, SENSITIVITY, calls, kinds, patients, statistic=lambda part: called(part, 1.0),
                positives=positives,
            )  # fmt: skip
            found.rows += seen
        if len(usable) < 2:
            continue
        if thresholds:
            odds = equalised_odds(
                model, "", table[:, 2] >= thresholds[model], table[:, 0], kinds.tolist(), patients,
                usable, draws=bench.recipe.draws, seed=bench.recipe.seed,
            )  # fmt: skip
            assert odds is not None  # two groups are there
            high, low = odds["groups"]
            about = f"{odds['rate']}, {high} against {low}, {CHOSEN_ODDS}"
            found.rows.append(row_of(odds, "fairness", name, f"by {column}", subgroup=about))
    if any(row["value"] is None for row in found.rows):
        why = (
            f"a group needs {SMALLEST} cases, and {POSITIVES} of either of two classes; some have fewer and are called insufficient"
        )
        found.skipped.append(skip(name, f"some subgroups by {column}", why))
    return found


def scored_groups(
    bench: Bench,
    model: str,
    task: str,
    setting: str,
    metric: str,
    table: np.ndarray,
    kinds: np.ndarray,
    patients: Sequence[str] | None,
    *,
    statistic: Statistic,
    positives: np.ndarray | None = None,
    seeds: int = 1,
) -> tuple[list[Row], list[str]]:
    """Score every group, and the gap between the best and the worst; return rows of the tier of fairness and the groups large enough.

    Args:
        bench: What the suite asks.
        model: That made the predictions.
        task: What was asked.
        setting: Of the rows.
        metric: Of the rows; those of `suite_rows.LOWER` are better when lower.
        table: (N, K), what the statistic is of.
        kinds: (N,) group of each case.
        patients: Of the cases, or None.
        statistic: Of rows of the table.
        positives: (N,) bool of two classes, see `subgroups.subgroup_rows`.
        seeds: Of the rows.
    """
    draws, seed = bench.recipe.draws, bench.recipe.seed
    rows = subgroup_rows(
        model, "", metric, table, kinds.tolist(), patients, statistic=statistic, positives=positives, draws=draws, seed=seed
    )
    found = [row_of(row, "fairness", task, setting, subgroup=row["group"], seeds=seeds) for row in rows]
    usable = [row for row in rows if row["value"] is not None and row["group"] != "unknown"]
    if len(usable) > 1:
        sign = -1.0 if metric in LOWER else 1.0
        ordered = sorted(usable, key=lambda row: sign * row["value"])
        best, worst = ordered[-1]["group"], ordered[0]["group"]
        marked = np.concatenate([table, (kinds == best)[:, None], (kinds == worst)[:, None]], axis=1)

        def gap(rows: np.ndarray) -> float:  # signed, or no interval could hold 0
            inside = [rows[rows[:, k] > 0, :-2] for k in (-2, -1)]
            return sign * (statistic(inside[0]) - statistic(inside[1])) if all(map(len, inside)) else float("nan")

        score = score_row(model, "", f"gap of {metric}", marked, patients, statistic=gap, draws=draws, seed=seed)
        found.append(row_of(score, "fairness", task, setting, subgroup=f"{best} against {worst}, {CHOSEN}", seeds=seeds))
    return found, [row["group"] for row in usable]


def _leakage(bench: Bench, column: str) -> Found:
    """Predict a column from frozen features across patients; near 1 is a shortcut that a network may take."""
    what = f"leakage of {column}"
    values = bench.column(column)
    if values is None:
        return Found(skipped=[skip("", what, f"no attached labels for {column}")])
    scored = sorted({int(n) for name, cases in bench.all_cases.items() for n in cases.ids[bench.unseen(name)]})
    unknown = any("patient_unknown" in flags for flags in bench.row("quality_flags"))
    known = list(map(str, range(len(bench.series)))) if unknown else bench.row("patient_id")
    # patients, not series: folds are of patients, and a value of one patient is learnt from its other images or not at all
    holders = {v: len({known[n] for n in scored if values[n] == v}) for v in {values[n] for n in scored} - {"unknown"}}
    kept = [n for n in scored if holders.get(values[n], 0) >= LEAST]
    kinds = len({values[n] for n in kept})
    if kinds < 2:
        whom = "series" if unknown else "patients"
        why = f"{kinds} value of {column} has {LEAST} or more {whom} among the validation and test cases; it takes two"
        return Found(skipped=[skip("", what, why)])
    patients = None if unknown else [known[n] for n in kept]
    target = [values[n] for n in kept]
    done, features = Found(), bench.features
    with or_skip(done, "", what):
        for model, x in features.items():
            scores = linear_probe(
                x[kept], target, patients, task="classification", name=model, seed=bench.recipe.seed, draws=bench.recipe.draws
            )
            score = next(row for row in scores if row["metric"] == "balanced_accuracy")
            done.rows.append(row_of({**score, "metric": "balanced accuracy"}, "fairness", what, f"chance {1 / kinds:.2f}"))
    return done
