"""What a clinician asks of a fine-tuned network, from the results of its cells: numbers with intervals, never a name.

Scores of cells with several seeds are means over seeds, patient by patient. What belongs to one network (volumes, thresholds, calibration,
worst cases) is that of the first seed at the most labels. The tested cases of all folds of a seed are one test set. Cases go by their
code: `case0007` of a cohort, `slide0007` of a table of slides, or the first eight digits of the pseudonym of a series.

What boxes need besides lies in `clinical_boxes`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation import clinical_boxes
from medssl.evaluation.agreement import bland_altman
from medssl.evaluation.bootstrap import Statistic, bootstrap_interval
from medssl.evaluation.box_summary import DRAWS
from medssl.evaluation.calibration import BINS, calibration_rows, reliability
from medssl.evaluation.cell_summary import Asked
from medssl.evaluation.finetune_targets import SPECIFICITY
from medssl.evaluation.folds import fold_numbers, mean_over_folds, pool_folds
from medssl.evaluation.label_curve import SCRATCH
from medssl.evaluation.scores import mae, mean_auc
from medssl.evaluation.subgroups import POSITIVES, SMALLEST, subgroup_rows
from medssl.evaluation.target_summary import scored
from medssl.weights import stated_lines

WORST = 10
FAILED_DICE = 0.5
OPEN_COLUMNS = ("sex", "age_band", "vendor", "field_strength_t", "contrast_state", "kernel_class", "body_region", "view")
"""Columns with closed vocabularies, whose values may be shown; groups of others are numbered."""
MAIN = {"segmentation": "Dice", "classification": "AUC", "regression": "Mean absolute error", "detection": "mAP"}

Result = Mapping[str, Any]


def clinical_facts(results: Sequence[Result], *, draws: int = 2000) -> dict[str, Any]:
    """Return what the page of fine-tuning results shows, as plain values.

    Args:
        results: Contents of `results.json` of the cells of one folder, all of one task; folds are put together here.
        draws: Bootstrap draws.

    Returns:
        `task`, `metric`, `arm`, `labels`, `seed`, `folds` (how many were put together, or None), `forced` (how images differ from those of
        the pretraining, and what was changed of the weights for their channels), `headlines` (one per labels and arm), and one entry per
        question: `structures`, `agreement`, `sensitivity`,
        `calibration`, `worst`, `subgroups`, `outside`. An entry that cannot be given is `{"why": sentence}`.

    Raises:
        RequestError: There is no result with test cases, or they are of several tasks.
    """
    counted = [clinical_boxes.counted(r) if task_of(r) == "detection" else r for r in results if r.get("cases")]
    usable = [clinical_boxes.by_name(r) if task_of(r) == "detection" else r for r in pool_folds(counted)]
    tasks = sorted({task_of(result) for result in usable})
    if len(tasks) != 1 or tasks[0] not in MAIN:
        found = ", ".join(tasks) or "none"
        raise RequestError(
            f"clinical report: results of the tasks {found}; it takes the folder of one fine-tuning for one of {', '.join(MAIN)}"
        )
    task = tasks[0]
    most = max(int(result["labels"]) for result in usable)
    arms = _arms([result for result in usable if result["labels"] == most])
    chosen = next((arm for arm in arms if arm != SCRATCH), SCRATCH)
    first = arms[chosen][0]
    cells = {(int(result["labels"]), str(result["arm"])) for result in usable}
    headlines = [
        _headline(task, [r for r in usable if (r["labels"], r["arm"]) == key], draws)
        for key in sorted(cells, key=lambda k: (-k[0], k[1] == SCRATCH))
    ]
    return {
        "task": task,
        "metric": MAIN[task],
        "arm": chosen,
        "labels": most,
        "seed": first["seed"],
        "folds": len(first["folds"]) if first.get("folds") else None,
        "choice": first.get("choice"),
        "forced": stated_lines(first),
        "classes": list(first.get("classes") or []),
        "headlines": headlines,
        "structures": {"rows": structure_rows(arms, draws)} if task == "segmentation" else _why("the network gives no label map."),
        "agreement": _agreement(task, {arm: runs[0] for arm, runs in arms.items()}, draws),
        "sensitivity": _sensitivity(task, {arm: runs[0] for arm, runs in arms.items()}, draws),
        "calibration": _calibration(task, {arm: runs[0] for arm, runs in arms.items()}, draws),
        "worst": worst_cases(first),
        "subgroups": subgroups(first, draws=draws),
        "outside": outside_facts(first),
        "unit": "volume" if task != "detection" or clinical_boxes.is_volume(first) else "image",
    }


def task_of(result: Result) -> str:
    """Return the task of a result; segmentation says none."""
    return str(result.get("task") or ("segmentation" if "structures" in result else "unknown"))


def code_of(case: Mapping[str, Any], place: int) -> str:
    """Return what a test case may be called: its code in the cohort or table, or the beginning of its pseudonym; else its place."""
    series = str(case.get("series_id", ""))
    for name in (str(case.get("id", "")), str(case.get("case", "")), series):
        if re.fullmatch(r"(case|slide)[0-9]+", name):
            return name
    return series[:8] if re.fullmatch(r"[0-9a-f]{16,}", series) else f"test case {place + 1}"


def _arms(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return arm -> its results by seed, scratch last."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r["arm"] == SCRATCH, str(r["arm"]), r["seed"])):
        found.setdefault(str(result["arm"]), []).append(result)
    return found


def _why(sentence: str) -> dict[str, Any]:
    return {"why": sentence}


def _patients(cases: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the patient of each case, or None when one is not known."""
    found = [case.get("patient") or case.get("patient_id") for case in cases]
    return None if None in found else [str(patient) for patient in found]


def _interval(
    values: np.ndarray, patients: Sequence[str] | None, draws: int, statistic: Statistic = np.mean
) -> dict[str, float | None]:
    value, low, high = bootstrap_interval(values, patients, statistic=statistic, draws=draws)
    return {"value": _finite(value), "low": _finite(low), "high": _finite(high)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _dice_of(case: Mapping[str, Any]) -> float | None:
    values = [v for v in case["dice"].values() if v is not None]
    return float(np.mean(values)) if values else None


def _scores(task: str, results: Sequence[Result]) -> Asked:
    """Return what the main score is a statistic of, the patients, and the statistic; seeds stand side by side."""
    if task == "segmentation":
        _, values, patients = dice_of_cases(results)
        return values, patients, np.mean
    return scored(results)


def dice_of_cases(results: Sequence[Result]) -> tuple[list[str], np.ndarray, list[str] | None]:
    """Return names, mean Dice over structures and then seeds (N,), and patients (None where one is not known) of the cases that have one."""
    by_case: dict[str, list[float]] = {}
    patient: dict[str, Any] = {}
    for result in results:
        for case in result["cases"]:
            if (dice := _dice_of(case)) is not None:
                by_case.setdefault(str(case["id"]), []).append(dice)
                patient[str(case["id"])] = case.get("patient")
    values = np.array([np.mean(found) for found in by_case.values()], dtype=np.float64)
    return list(by_case), values, _patients([{"patient": patient[name]} for name in by_case])


def _headline(task: str, results: Sequence[Result], draws: int) -> dict[str, Any]:
    if task == "detection":
        return clinical_boxes.headline(results)
    values, patients, statistic = _scores(task, results)
    found: dict[str, Any] = {"labels": int(results[0]["labels"]), "arm": str(results[0]["arm"]), "seeds": len(results)}
    found |= {"n_cases": len(values), "n_patients": None if patients is None else len(set(patients))}
    return found | (_interval(values, patients, draws, statistic) if len(values) else {"value": None, "low": None, "high": None})


def structure_rows(arms: Mapping[str, Sequence[Result]], draws: int) -> list[dict[str, Any]]:
    """Return Dice and HD95 of each structure and arm, and two counts of the first seed.

    Args:
        arms: Name -> results of its seeds, folds put together (`pool_folds`).
        draws: Bootstrap draws.

    Returns:
        Rows with `structure`, `arm`, `dice` and `hd95_mm` (each value, low, high, n, n_patients; Dice as a fraction), `not_found`, `invented`.

    `not_found` counts cases whose label has the structure and of which not one voxel was found; `invented` those whose label lacks it
    and whose prediction has it. Dice is 0 in both. They are None where no volumes were kept.
    """
    rows = []
    names = [str(name) for name in next(iter(arms.values()))[0]["structures"]]
    for name in names:
        for arm, results in arms.items():
            row: dict[str, Any] = {"structure": name, "arm": arm}
            for metric in ("dice", "hd95_mm"):
                by_case: dict[str, list[float]] = {}
                patient: dict[str, Any] = {}
                for result in results:
                    for case in result["cases"]:
                        value = case[metric].get(name)
                        if value is not None:
                            by_case.setdefault(str(case["id"]), []).append(float(value))
                            patient[str(case["id"])] = case.get("patient")
                values = np.array([np.mean(found) for found in by_case.values()])
                groups = _patients([{"patient": patient[key]} for key in by_case])
                empty = {"value": None, "low": None, "high": None}
                counts = {"n": len(values), "n_patients": None if groups is None else len(set(groups))}
                row[metric] = (_interval(values, groups, draws) if len(values) else empty) | counts
            kept = any(_sizes(case)[0] for case in results[0]["cases"])
            row["not_found"] = sum(_missed(case, name) for case in results[0]["cases"]) if kept else None
            row["invented"] = sum(_invented(case, name) for case in results[0]["cases"]) if kept else None
            rows.append(row)
    return rows


def _sizes(case: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
    """Return how large the structures of a case are in label and prediction, and the unit: volumes, or areas of pictures."""
    for unit, reference, found in (
        ("ml", "reference_ml", "volume_ml"),
        ("mm2", "reference_mm2", "area_mm2"),
        ("px", "reference_px", "area_px"),
    ):
        if case.get(reference):
            return case[reference], case.get(found) or {}, unit
    return {}, {}, ""


def _missed(case: Mapping[str, Any], name: str) -> bool:
    """Say whether the label of a case has a structure of which the prediction meets no voxel."""
    return bool(case["dice"].get(name) == 0 and (_sizes(case)[0].get(name) or 0) > 0)


def _invented(case: Mapping[str, Any], name: str) -> bool:
    """Say whether the prediction of a case has a structure that its label lacks."""
    reference, found = (sizes.get(name) for sizes in _sizes(case)[:2])
    return reference == 0 and (found or 0) > 0


def _agreement(task: str, arms: Mapping[str, Result], draws: int) -> dict[str, Any]:
    """Return Bland and Altman's numbers and the pairs behind them: volumes in ml, areas in mm2, or the numbers that were to be found.

    Cases in which neither label nor prediction has a structure agree on nothing that was measured: they are left out, and counted as
    `neither`.
    """
    found = []
    for arm, result in arms.items():
        if task == "segmentation":
            for name in result["structures"]:
                sized = [(*_sizes(case), case) for case in result["cases"]]
                unit = "ml" if any(of == "ml" for _, _, of, _ in sized) else "mm2"  # areas in pixels are no measurement
                pairs = [(label.get(name), shown.get(name), case) for label, shown, of, case in sized if of == unit]
                known = [(float(one), float(other), case) for one, other, case in pairs if one is not None and other is not None]
                there = [p for p in known if p[0] or p[1]]
                found += [row | {"neither": len(known) - len(there)} for row in _pairs(str(name), unit, arm, there, draws)]
        elif task == "regression":
            found += _pairs("prediction", "", arm, [(case["target"], case["prediction"], case) for case in result["cases"]], draws)
    if found:
        return {"rows": found}
    if task == "classification":
        return _why("classes are no measurement.")
    if any(_sizes(case)[2] == "px" for result in arms.values() for case in result["cases"]):
        return _why("the pictures do not say how large their pixels are.")
    return _why(
        "no volumes were kept (results of an earlier medssl, or fewer than two test cases with a structure); fine-tune again."
    )


def _pairs(
    what: str, unit: str, arm: str, pairs: Sequence[tuple[float, float, Mapping[str, Any]]], draws: int
) -> list[dict[str, Any]]:
    if len(pairs) < 2:
        return []
    reference, measured = [float(one) for one, _, _ in pairs], [float(other) for _, other, _ in pairs]
    numbers = asdict(bland_altman(reference, measured, _patients([case for _, _, case in pairs]), draws=draws))
    plain = {key: [_finite(v) for v in value] if isinstance(value, tuple) else value for key, value in numbers.items()}
    return [{"what": what, "unit": unit, "arm": arm, **plain, "reference": reference, "measured": measured}]


def _sensitivity(task: str, arms: Mapping[str, Result], draws: int) -> dict[str, Any]:
    if task == "detection":
        return clinical_boxes.sensitivity(arms, {arm: _patients(run["cases"]) for arm, run in arms.items()}, draws)
    if task != "classification":
        return _why("an operating point is a matter of classes and of findings; this network gives neither.")
    if len(next(iter(arms.values())).get("classes") or []) != 2:
        return _why("a threshold is fitted for two classes; here are more.")
    rows = []
    for arm, result in arms.items():
        known = _operating_point(result, draws) if result.get("folds") else result["rows"]
        found = {row["metric"]: row for row in known if row["metric"] in ("sensitivity", "specificity")}
        for metric, row in found.items():
            rows.append({"arm": arm, "metric": metric, **{key: row[key] for key in ("value", "low", "high")}, "n": row["n_images"]})
    if not rows:
        if any(result.get("folds") for result in arms.values()):
            return _why("not every fold had validation cases without the finding to fit its threshold on.")
        return _why("no validation case was there to fit a threshold on; mark some cases as val.")
    return {"rows": rows, "specificity": SPECIFICITY, "threshold": {arm: _fitted(run, "threshold") for arm, run in arms.items()}}


def _fitted(result: Result, name: str) -> Any:
    """Return what was fitted on validation cases; of folds, the value of each."""
    if result.get("folds"):
        return [(fold.get("fitted") or {}).get(name) for fold in result["folds"]]
    return (result.get("fitted") or {}).get(name)


def _operating_point(result: Result, draws: int) -> list[dict[str, Any]]:
    """Return sensitivity and specificity over the cases of all folds, each case by the threshold of its own; none where one has none."""
    limits = {fold["fold"]: (fold.get("fitted") or {}).get("threshold") for fold in result["folds"]}
    if None in limits.values():
        return []
    rows = []
    for metric, kind in (("sensitivity", 1), ("specificity", 0)):
        inside = [case for case in result["cases"] if int(case["target"]) == kind]
        right = [float((case["probability"][1] >= limits[case["fold"]]) == bool(kind)) for case in inside]
        if right:
            rows.append({"metric": metric, "n_images": len(right), **_interval(np.array(right), _patients(inside), draws)})
    return rows


def _calibration_of_cases(result: Result, draws: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return Brier score and calibration error over the cases of all folds, and the bins of their reliability plot.

    Not those that the cell has written: an earlier medssl had bins of equal width.
    """
    chances = np.array([case["probability"] for case in result["cases"]], dtype=np.float64)
    targets = np.array([int(case["target"]) for case in result["cases"]])
    found = calibration_rows(chances, targets, _patients(result["cases"]), draws=draws)
    rows = [
        {"metric": name, "value": value, "low": _finite(low), "high": _finite(high)} for name, (value, low, high) in found.items()
    ]
    return rows, reliability(chances, targets)


def _calibration(task: str, arms: Mapping[str, Result], draws: int) -> dict[str, Any]:
    if task != "classification":
        return _why("the network states no probability of a finding for a case.")
    rows, bins = [], {}
    for arm, result in arms.items():
        known, bins[arm] = _calibration_of_cases(result, draws)
        rows += [{"arm": arm, **row} for row in known]
    temperature = {arm: _fitted(result, "temperature") for arm, result in arms.items()}
    return {"rows": rows, "bins": bins, "most_bins": BINS, "temperature": temperature, "n": len(next(iter(arms.values()))["cases"])}


def badness(task: str, case: Mapping[str, Any]) -> float | None:
    """Return how bad a case is: 1 - Dice, 1 - F1, -ln p of the true class, or the absolute error; None without a score."""
    if task == "segmentation":
        dice = _dice_of(case)
        return None if dice is None else 1 - dice
    if task == "detection":
        return 1 - float(case["f1"])
    if task == "classification":
        return -math.log(max(float(case["probability"][int(case["target"])]), 1e-12))
    return abs(float(case["prediction"]) - float(case["target"]))


def worst_cases(result: Result, count: int = WORST) -> dict[str, Any]:
    """Return the worst test cases by code, worst first, with what is known of them."""
    task, rows = task_of(result), []
    for place, case in enumerate(result["cases"]):
        bad = badness(task, case)
        if bad is None or (task == "detection" and not bad):
            continue
        row: dict[str, Any] = {
            "case": code_of(case, place),
            "bad": bad,
            "outside": [f["reason"] for f in case.get("outside") or []],
        }
        if task == "segmentation":
            row |= {"dice": dict(case["dice"]), "hd95_mm": dict(case["hd95_mm"])}
        elif task == "detection":
            row |= {key: case[key] for key in ("f1", "objects", "right", "missed", "wrong", "threshold", "fitted", "asked")}
        elif task == "classification":
            chances = case["probability"]
            row |= {"target": int(case["target"]), "called": int(np.argmax(chances)), "p": float(chances[int(case["target"])])}
        else:
            row |= {"target": float(case["target"]), "prediction": float(case["prediction"])}
        rows.append(row)
    rows.sort(key=clinical_boxes.how_bad if task == "detection" else lambda row: -float(row["bad"]))
    return {"rows": rows[:count], "n": len(result["cases"]) if task == "detection" else len(rows)}


def failed(task: str, case: Mapping[str, Any], limit: float = math.inf) -> bool:
    """Say whether a case failed: mean Dice below 0.5 or 0 for a structure; F1 below 0.5 where there is an object; the wrong class; a large error."""
    if task == "segmentation":
        dice = _dice_of(case)
        return dice is not None and (dice < FAILED_DICE or 0 in case["dice"].values())
    if task == "detection":
        return bool(case["objects"] and case["f1"] < FAILED_DICE)
    if task == "classification":
        return int(np.argmax(case["probability"])) != int(case["target"])
    return abs(float(case["prediction"]) - float(case["target"])) > limit


def subgroups(result: Result, *, draws: int = 2000) -> dict[str, Any]:
    """Return score and failures by the values of every column that tells cases apart; small groups have a count and no number.

    Reference:
        The rule of the smallest group: card evaluation-protocols, section B.
    """
    task = task_of(result)
    cases = [case for case in result["cases"] if task != "segmentation" or _dice_of(case) is not None]
    columns = [name for name in (cases[0].get("facts") or {} if cases else {}) if any(_known(case, name) for case in cases)]
    if not columns:
        return _why("nothing is known of the patients and scanners of these cases; a cohort that is a query of an index brings it.")
    values, statistic_of, positives = _grouped(task, cases, result)
    draws = min(draws, DRAWS) if task == "detection" else draws
    errors = [badness(task, case) or 0.0 for case in cases]
    limit = float(np.quantile(errors, 0.9)) if task == "regression" else math.inf
    tables = {}
    for name in columns:
        attribute = [str((case.get("facts") or {}).get(name) or "unknown") for case in cases]
        shown = attribute if name in OPEN_COLUMNS else numbered(attribute)
        metric = MAIN[task]
        rows = subgroup_rows(
            "", "", metric, values, shown, _patients(cases), statistic_of=statistic_of, positives=positives, draws=draws
        )
        for row in rows:
            inside = [case for case, group in zip(cases, shown) if group == row["group"]]
            row["failed"] = sum(failed(task, case, limit) for case in inside) if row["sufficient"] else None
            if task == "detection":
                row["alarms"] = sum(clinical_boxes.is_alarm(case) for case in inside) if row["sufficient"] else None
        keys = ["group", "value", "low", "high", "n_images", "n_patients", "sufficient", "failed"]
        keys += ["alarms"] if task == "detection" else []
        tables[name] = [{key: row[key] for key in keys} for row in rows]
    how = {
        "segmentation": f"mean Dice below {FAILED_DICE}, or a structure with Dice 0 (missed wholly, or predicted where the label has none)",
        "detection": f"F1 below {FAILED_DICE}, of found boxes with real ones at the score threshold of the worst cases, where there is an object; "
        "images without an object in which something was found are counted beside these",
        "classification": "the most likely class was the wrong one",
        "regression": f"an error above {limit:.3g}, which one in ten of all test cases has",
    }[task]
    return {"tables": tables, "failure": how, "smallest": [SMALLEST, POSITIVES]}


def _known(case: Mapping[str, Any], name: str) -> bool:
    return (case.get("facts") or {}).get(name) not in (None, "", "unknown")


def _grouped(
    task: str, cases: Sequence[Mapping[str, Any]], result: Result
) -> tuple[np.ndarray, Callable[[np.ndarray], Statistic], list[bool] | None]:
    """Return the values of cases, values of a group -> its statistic, and which cases are of the second of two classes."""
    if task == "segmentation":
        return np.array([_dice_of(case) for case in cases], dtype=np.float64), lambda _: np.mean, None
    if task == "detection":
        return *clinical_boxes.group_map(result), None
    rows = np.array([[case["target"], *(case.get("probability") or [case["prediction"]])] for case in cases], dtype=np.float64)
    if task == "regression":
        return rows, lambda _: mae, None
    positives = [bool(row[0] == 1) for row in rows] if rows.shape[1] == 3 else None
    return np.column_stack([rows, fold_numbers(cases)]), lambda _: mean_over_folds(mean_auc), positives


def numbered(values: Sequence[str]) -> list[str]:
    """Return `group_1` ... for the values in their order; `unknown` stays."""
    names = sorted({value for value in values if value != "unknown"})
    return [value if value == "unknown" else f"group_{names.index(value) + 1}" for value in values]


def outside_facts(result: Result) -> dict[str, Any]:
    """Return how many test cases lie outside the training range and in what, and which ones."""
    if any(case.get("outside") is None for case in result["cases"]):
        return _why("these results are of an earlier medssl, which did not compare test with training cases; fine-tune again.")
    flagged: list[dict[str, Any]] = [
        {"case": code_of(case, place), "flags": [dict(flag) for flag in case["outside"]]}
        for place, case in enumerate(result["cases"])
        if case["outside"]
    ]
    counts = Counter(by for row in flagged for by in {flag["by"] for flag in row["flags"]})
    return {"rows": flagged, "n": len(result["cases"]), "counts": dict(counts), "range": dict(result.get("training_range") or {})}
