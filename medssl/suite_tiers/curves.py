"""Tiers of fine-tuned networks: label curves of classes, segmentation and detection."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl import build
from medssl.api import label_curve as run_curve
from medssl.errors import ImageError, RequestError, TrainingStopped
from medssl.evaluation.frozen import fit_probe, predicted
from medssl.evaluation.scores import mean_auc, score_row
from medssl.evaluation.self_configuring import starting_point
from medssl.evaluation.suite_rows import BASELINE, CONTROLS, WEIGHTS, Row, row_of, skip
from medssl.evaluation.target_cases import few_label_order
from medssl.recipe import CurveSection, FinetuneTargetsRecipe, Recipe, SegmentationSection
from medssl.suite_tiers.bench import Bench, Found, join, mean_of, or_skip
from medssl.suite_tiers.curve_rows import further, read_cells
from medssl.suite_tiers.probes import fitted_tasks
from medssl.weights import forced_differences

Controls = Callable[[Bench, Any, Sequence[int], Sequence[int]], tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""(bench, fine-tuning recipe, numbers of labels, seeds) -> summary of the controls, as that of the curve, and results of their cells."""
FROZEN = ", frozen encoder"


def classification(bench: Bench, out: Path) -> Found:
    """Label curves of classes: the weights and the scratch twin fine-tuned, the controls probed on the same cases."""
    section = bench.recipe.classification
    if section is None:
        return _not_named("classification", "label curves")
    if section.recipe is not None:
        return label_curves("classification", section, Recipe.load(section.recipe, section.overrides), bench, out, "")
    done = Found()
    for name, cases in fitted_tasks(bench, done, "label curves", "classification"):
        counts = budgets(section, len(cases.where("train")), least=len(cases.classes))
        join(done, label_curves("classification", section, own_recipe(bench, section, name), bench, out, name, counts))
        with or_skip(done, name, f"label curves of {', '.join(CONTROLS)}"):
            join(done, _control_curves(bench, name, counts, section.seeds))
    return done


def segmentation(bench: Bench, out: Path) -> Found:
    """Label curves of a segmentation network: all of it, the decoder on the frozen encoder, and a network that configures itself."""
    section = bench.recipe.segmentation
    found = _named("segmentation", "label curves of Dice", section, bench, out, _drawn_by_pixels)
    if section is not None and section.recipe is not None and section.frozen:
        recipe = Recipe.load(section.recipe, section.overrides)
        if getattr(recipe, "task", None) == "segmentation" and recipe.settings.get("encoder_lr_scale") != 0:
            still = recipe.model_copy(update={"settings": {**recipe.settings, "encoder_lr_scale": 0.0}})
            join(found, label_curves("segmentation", section, still, bench, out, "", how=FROZEN))
    if section is not None and section.recipe is not None:
        join(found, _self_configured(section, bench, out))
    return found


def _self_configured(section: SegmentationSection, bench: Bench, out: Path) -> Found:
    """Return the label curve of the supervised baseline on the cases of the others; models are not aggregated by it."""
    task, folder = Path(str(section.recipe)).stem, out / "segmentation" / "curve_self_configuring"
    if not section.self_configuring:
        why = "not asked for, as it adds one training per number of labels, seed and fold; segmentation: {self_configuring: true} asks for it"
        return Found(skipped=[skip(task, BASELINE, why)])
    recipe = Recipe.load(str(section.recipe), section.overrides)
    try:
        if getattr(recipe, "task", None) == "segmentation":
            starting_point(build.finetune_settings(recipe))
    except RequestError as err:  # pictures stay pictures: nothing to try again
        return Found(skipped=[skip(task, BASELINE, str(err))])

    def run() -> dict[str, Any]:
        counts = _counts_of(section, recipe)
        own = recipe.model_copy(update={"out": str(folder)})
        return run_curve(own, None, counts=counts, seeds=section.seeds, twin=False, self_configuring=True)

    summary, found = _or_stopped(run, folder, task, BASELINE)
    if summary is None:
        return found
    patients, cells = _patients_of(folder), read_cells(folder)
    found.rows = [{**row, "main": False} for row in _curve_rows(summary, "segmentation", task, patients, most=0)]
    found.plans = [{"task": task, **plan} for plan in summary.get("plans", ())]
    join(found, further(bench, "segmentation", task, cells))
    return _read_by(recipe, found)


def detection(bench: Bench, out: Path) -> Found:
    """Label curves of a detector."""
    return _named("detection", "label curves of mAP", bench.recipe.detection, bench, out, _found_by_pixels)


def _named(tier: str, what: str, section: CurveSection | None, bench: Bench, out: Path, controls: Controls) -> Found:
    """Return the label curves of the fine-tuning recipe that the suite's recipe names."""
    if section is None or section.recipe is None:
        return _not_named(tier, what)
    return label_curves(tier, section, Recipe.load(section.recipe, section.overrides), bench, out, "", controls=controls)


def _drawn_by_pixels(
    bench: Bench, recipe: Any, counts: Sequence[int], seeds: Sequence[int]
) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """Return summary and results of the controls of segmentation."""
    from medssl.evaluation.cohort import Cohort
    from medssl.evaluation.label_curve import summarise
    from medssl.evaluation.pixel_controls import segmentation_controls

    settings = replace(build.finetune_settings(recipe), encoder=bench.manifest["encoder"])
    cohort = Cohort.load(recipe.cohort.path, every=recipe.folds is not None)
    results = segmentation_controls(cohort, settings, counts=counts, seeds=seeds, folds=recipe.folds)
    return summarise(results), [result.to_json() for result in results]


def _found_by_pixels(
    bench: Bench, recipe: Any, counts: Sequence[int], seeds: Sequence[int]
) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """Return summary and results of the controls of detection; the curve has refused patients that the weights have seen."""
    from medssl.box_tasks import BoxRoad
    from medssl.evaluation.box_summary import summarise
    from medssl.evaluation.pixel_controls import detection_controls
    from medssl.finetune_cells import section_of

    section, _ = section_of(recipe, bench.manifest)
    source = BoxRoad(recipe, section, None).source
    results = detection_controls(source, counts=counts, seeds=seeds, folds=recipe.folds)
    return summarise(results), results


def budgets(section: CurveSection, cases: int, least: int = 1) -> list[int]:
    """Return the numbers of labels of a curve, in rising order."""
    wanted = section.counts or [round(share * cases) for share in section.fractions]
    return sorted({min(max(count, least), cases) for count in wanted})


def own_recipe(bench: Bench, section: CurveSection, name: str) -> FinetuneTargetsRecipe:
    """Return the fine-tuning recipe of a task of the suite, where none is named."""
    task = bench.recipe.tasks[name]
    return FinetuneTargetsRecipe(
        task=task.task, source=bench.recipe.source, table=bench.recipe.table, file_column=bench.recipe.file_column, target=task.column,
        settings=section.settings, classes=task.classes, force=bench.recipe.force,
    )  # fmt: skip


def _control_curves(bench: Bench, name: str, counts: Sequence[int], seeds: Sequence[int]) -> Found:
    """Return the logistic probes of the controls on the labels that the fine-tuned arms have."""
    cases, found, what = bench.tasks[name], Found(), f"label curves of {', '.join(CONTROLS)}"
    test = cases.where("test")
    if not len(cases.where("val")):
        return Found(skipped=[skip(name, what, "no labelled case is marked val, and few labels leave none to choose the penalty")])
    for count in counts:
        trains = [few_label_order(cases, seed)[:count] for seed in seeds]
        usable = [rows for rows in trains if len(set(cases.targets[rows].tolist())) == len(cases.classes)]
        if lacking := len(trains) - len(usable):
            why = f"the labels of {lacking} of {len(trains)} seeds lack a class; controls have {len(usable)} seeds here"
            found.skipped.append(skip(name, f"{what}, {count} labels", why))
        for model, values in bench.of(name).items():
            if model == WEIGHTS or not usable:
                continue
            table = np.stack([predicted(fit_probe(values, cases, rows), values, cases, test) for rows in usable], axis=1)
            score = score_row(
                model, "", "auroc", table, cases.patients(test), statistic=mean_of(mean_auc), draws=bench.recipe.draws,
                seed=bench.recipe.seed,
            )  # fmt: skip
            row = row_of(score, "classification", name, f"{count} labels", seeds=len(usable), main=count == max(counts))
            found.rows.append(row)
    return found


def _not_named(tier: str, what: str) -> Found:
    return Found(skipped=[skip("", what, f"the recipe names no fine-tuning (key {tier})")])


def label_curves(
    tier: str,
    section: CurveSection,
    recipe: Any,
    bench: Bench,
    out: Path,
    name: str,
    counts: Sequence[int] | None = None,
    controls: Controls | None = None,
    how: str = "",
) -> Found:
    """Run a label curve and return its rows; one that cannot run is a skipped part, not a lost suite.

    With `how` (`FROZEN`) it stands beside another one of the same recipe: in a folder of its own, without scratch twin and controls, and
    models are not aggregated by it.

    A refused request (a folder that is not there, weights that do not fit) can be corrected, so it is tried again by the next run. A
    training that a monitor stopped would stop again; the cells that were done before it stay in the table.
    """
    folder = out / tier / (name or ("curve_frozen" if how else "curve"))
    task = name or Path(str(section.recipe)).stem
    labels: list[int] = []

    def run() -> dict[str, Any]:
        own = recipe.model_copy(update={"out": str(folder)})
        labels.extend(counts or _counts_of(section, own))
        return run_curve(own, bench.weights, counts=labels, seeds=section.seeds, twin=not how)

    summary, found = _or_stopped(run, folder, task, f"fine-tuning{how}")
    if summary is None:
        return found
    patients = _patients_of(folder)
    most = max((row["labels"] for row in summary["rows"]), default=0)  # what a stopped curve came to, for its controls too
    found.rows = _curve_rows(summary, tier, task, patients, most, how)
    found.forced, found.adapted = (forced_differences(summary.get("shared", {}).get(key)) for key in ("forced", "adapted"))
    cells = read_cells(folder)
    if controls is not None:
        with or_skip(found, task, "controls"):
            beside, results = controls(bench, recipe, labels, section.seeds)
            found.rows += _curve_rows(beside, tier, task, patients, most)
            cells += results
        why = "an untrained network draws nothing and finds nothing; trained, it is the scratch twin"
        found.skipped.append(skip(task, "random_init", why))
    elif tier != "classification" and not how:
        found.skipped.append(skip(task, ", ".join(CONTROLS), "a control is not fine-tuned; its ridge stands beside"))
    join(found, further(bench, tier, task, cells, how))
    return _read_by(recipe, found)


def _or_stopped(run: Callable[[], dict[str, Any]], folder: Path, task: str, what: str) -> tuple[dict[str, Any] | None, Found]:
    """Return the summary of a curve, of its finished cells where a training was stopped, None where there is none; and what was skipped."""
    try:
        return run(), Found()
    except (RequestError, ImageError) as err:
        return None, Found(skipped=[skip(task, what, f"{err}; the next run tries again")], again=True)
    except TrainingStopped as err:
        path = folder / "summary.json"
        if not path.is_file():
            return None, Found(skipped=[skip(task, what, str(err))])
        summary: dict[str, Any] = json.loads(path.read_text())
        cells = summary["cells"]
        left = f"{what}, {cells['planned'] - cells['done']} of {cells['planned']} cells"
        return summary, Found(skipped=[skip(task, left, str(err))])


def _read_by(recipe: Any, found: Found) -> Found:
    """Say in the rows of a curve which domain read its images."""
    read = getattr(recipe, "cohort", None) or getattr(recipe, "source", None)  # slides come as features, read by no domain
    for row in found.rows:
        row["modality"] = getattr(getattr(read, "domain", None), "name", "wsi")
    return found


def _curve_rows(summary: Mapping[str, Any], tier: str, task: str, patients: int | None, most: int, how: str = "") -> list[Row]:
    """Return the rows of a curve from its summary; the main ones are those with most labels, none with `how`."""
    rows = []
    for entry in summary["rows"]:
        score = {
            "name": entry["arm"],
            "metric": entry.get("metric", "dice"),
            "value": entry.get("value", entry.get("dice")),
            "low": entry["low"],
            "high": entry["high"],
            "n_images": entry["n_test"],
            "n_patients": patients,
        }
        setting, main = f"{entry['labels']} labels{how}", entry["labels"] == most and not how
        rows.append(row_of(score, tier, task, setting, seeds=len(entry["seeds"]), main=main))
    return rows


def _counts_of(section: CurveSection, recipe: Any) -> list[int]:
    """Return the label budgets of a curve with a recipe of its own."""
    if section.counts:
        return list(section.counts)
    if getattr(recipe, "cohort", None) is None:
        raise RequestError("fractions are taken of a cohort, and this recipe has none; give counts")
    return budgets(section, _training_cases(recipe))


def _training_cases(recipe: Any) -> int:
    """Return how many training cases every cell of a curve over a cohort has at least."""
    from medssl.evaluation.cohort import Cohort

    cohort = Cohort.load(recipe.cohort.path, every=recipe.folds is not None)
    if recipe.folds is None:
        return len(cohort.split("train"))
    # folds are alike in structures or boxes, which nobody has looked for yet: the two that do not train have no more than these patients
    sizes = sorted(Counter(case.patient for case in cohort.cases if case.label is not None).values(), reverse=True)
    fewest, over = divmod(len(sizes), recipe.folds)
    return sum(sizes[2 * fewest + min(over, 2) :])


def _patients_of(folder: Path) -> int | None:
    """Return the number of test patients of a curve: those of the cells of one arm, number of labels and seed, of all its folds."""
    found: dict[str, set[str | None]] = {}
    for path in sorted(folder.glob("cells/*/results.json")):
        own = [case.get("patient") or case.get("patient_id") for case in json.loads(path.read_text()).get("cases", [])]
        found.setdefault(re.sub(r"_f[0-9]+$", "", path.parent.name), set()).update(own)
    most = max(found.values(), key=len, default=set())
    return len(most) if most and None not in most else None
