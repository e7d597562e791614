"""The label curve: what pretraining is worth with n labelled volumes, over seeds, beside the scratch twin.

A cell is one fine-tuning run (number of labels, seed, arm). Cells are computed one by one and each is kept when it is
done, so that a curve that was killed continues where it stopped. Two questions are answered by two curves in two
folders: speed (a short budget for both arms) and quality (the plateau of scratch).

    out/label_curve.json               what the cells have in common; a folder never mixes two settings
    out/cells/<arm>_n<labels>_s<seed>/ the folder of that run; its results.json comes last and says that it is done
    out/summary.json, out/table.md     rewritten after every cell
    out/plans.json                     where each cell is configured by its training cases: fingerprint and settings of every cell
    out/private/cohort.key             random; the digest of the cohort is of no use to whoever does not have it
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.evaluation import self_configuring
from medssl.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.finetune import (
    Pretrained,
    check_cases,
    data_cards,
    finetune,
    for_channels,
    network_of,
    reader_of,
    refuse_settings,
    structures_of,
    unlike_pretraining,
    with_channels,
    with_encoder,
)
from medssl.evaluation.label_facts import label_sentences
from medssl.evaluation.segmentation_checks import look_through, refuse_unlearnable
from medssl.evaluation.segmentation_results import FinetuneResult
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.self_configuring import Plan
from medssl.evaluation.volumes import CaseReader
from medssl.weights import private_folder, stated_lines, write_atomic, write_private

log = logging.getLogger(__name__)

NO_WEIGHTS = "no weights"
PLANS = "plans.json"
SCRATCH = "scratch"
UNUSED_SETTINGS = ("device", "figures", "predictions", "dicom_seg", "log_every", "force")  # change no score
VALIDATION_SETTINGS = ("val_every", "val_cases")  # change no score without `patience`
BY_CASE = "by image"  # as `evaluation.scores` has it
Configure = Callable[[Sequence[Case], CaseReader, FinetuneSettings], Plan]
TRANSFER_SETTINGS = ("encoder_lr_scale", "layer_decay", "freeze_steps", "transfer")  # change no score of a scratch cell


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the curve; `fold` of `folds` is the one that is tested, None where the splits are given."""

    arm: str
    labels: int
    seed: int
    fold: int | None = None
    folds: int | None = None

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.arm}_n{self.labels}_s{self.seed}" + ("" if self.fold is None else f"_f{self.fold}")


def label_curve(
    cohort: Cohort,
    settings: FinetuneSettings,
    out: Path,
    *,
    arms: Mapping[str, Pretrained | None],
    counts: Sequence[int] | None,
    seeds: Sequence[int],
    folds: int | None = None,
    leakage_check: str = NO_WEIGHTS,
    configure: Configure | None = None,
    on_cell: Callable[[int, int, Cell, FinetuneResult], None] | None = None,
    on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Compute the cells that are missing, then summarise.

    Args:
        cohort: The labelled set; the same first n training cases for every arm and seed.
        settings: Shared by all cells.
        out: Folder, created when missing, for its owner alone, after everything that can be refused before the first cell.
        arms: Name to weights; `scratch` to None is the twin that differences are taken against.
        counts: Numbers of labelled training cases; None takes as many as every cell has.
        seeds: Seeds; the same for every arm, so that cells are pairs.
        folds: Deal all labelled patients into so many folds, each tested once; every seed deals anew. Structures that some patients lack are
            spread over them. None keeps the given splits.
        leakage_check: What was checked of the weights and the test cases, for the results; see `medssl.leakage`.
        configure: Plans some of the settings of each cell from the training cases of that cell, and from nothing else
            (`self_configuring.configure`); None gives all cells the same settings.
        on_cell: Called with (cells done, cells, cell, result) after each.
        on_step: Passed on to `finetune`.

    Returns:
        The summary, see `summarise`.

    Raises:
        RequestError: The folder holds cells of other settings, weights were chosen by labels, the fewest labels lack a structure,
            images differ from those of the pretraining and nobody forced it, the training cases admit no plan, or the request is empty or
            unnamed.
    """
    out = Path(out)
    plan(arms, [1] if counts is None else counts, seeds, folds)  # what is asked wrongly is said before anything is read
    refuse_chosen(arms)
    arms = {arm: for_channels(weights, cohort) for arm, weights in arms.items()}
    first = next((weights for weights in arms.values() if weights is not None), None)
    settings = with_channels(with_encoder(settings, first), cohort)  # the twin is built with the encoder of the weights
    refuse_settings(settings)
    reader = reader_of(settings)
    if folds is not None and not cohort.structures:
        cohort = replace(cohort, structures=structures_of(cohort, reader, every=True))
    present = None if folds is None else presence(cohort, reader, settings.raters)
    dealt = deals(cohort, folds, seeds, present)
    if counts is None:
        counts = [min(len(one.split("train")) for one in dealt.values())]
    cells = plan(arms, counts, seeds, folds)
    for one in dealt.values():
        one.first(max(counts))  # too many labels asked for: say so before the first hour, not after it
    cases = next(iter(dealt.values())).first(max(counts))
    named = {arm: weights for arm, weights in arms.items() if weights is not None}
    refuse_too_few(dealt, min(counts), settings, reader)
    plans: dict[str, Plan] = {}
    if configure is not None:
        plans = {cell.name: configure(dealt[cell.seed, cell.fold].first(cell.labels), reader, settings) for cell in cells}
    own = {cell.name: replace(settings, **plans[cell.name].settings) if plans else settings for cell in cells}
    forced = {arm: unlike_pretraining(weights.manifest, settings, cases, reader) for arm, weights in named.items()}
    if any(
        read_cell(out / "cells" / cell.name) is None for cell in cells
    ):  # what a first cell would refuse, before anything is written
        cell, tested = cells[0], dealt[cells[0].seed, cells[0].fold]
        structures = check_cases(tested, own[cell.name], max(counts), reader, one_fold=cell.fold is not None)
        for weights in arms.values():
            network_of(own[cell.name], structures, cell.seed, weights)
    refuse_other_plans(out, cells, plans)
    private_folder(out)
    claim(out, cohort, settings, arms, folds, forced, leakage_check, uneven(cohort, present))
    if plans:
        facts = {cell.name: {"labels": cell.labels, **plans[cell.name].facts()} for cell in cells}
        write_atomic(out / PLANS, json.dumps(facts, indent=1, allow_nan=False).encode())
    for number, cell in enumerate(cells, start=1):
        folder = out / "cells" / cell.name
        result = read_cell(folder)
        if result is None:
            result = finetune(
                dealt[cell.seed, cell.fold],
                own[cell.name],
                folder,
                labels=cell.labels,
                seed=cell.seed,
                weights=arms[cell.arm],
                arm=cell.arm,
                fold=(cell.fold, cell.folds),
                forced=forced.get(cell.arm, []),
                reader=reader,
                on_step=on_step,
            )
        write_summary(out, cells)
        if on_cell is not None:
            on_cell(number, len(cells), cell, result)
    return write_summary(out, cells)


def refuse_other_plans(out: Path, cells: Sequence[Cell], plans: Mapping[str, Plan]) -> None:
    """Refuse to go on beside cells that were computed with another plan than their training cases give now.

    Raises:
        RequestError: An earlier medssl had other rules.
    """
    for cell in cells if plans else ():
        done = read_cell(out / "cells" / cell.name)
        settings = json.loads(json.dumps(dict(plans[cell.name].settings)))
        changed = [] if done is None else [name for name in settings if done.settings.get(name) != settings[name]]
        if changed:
            raise RequestError(
                f"{out} holds cells that an earlier medssl has planned otherwise ({', '.join(changed)}); choose another folder, or remove this one"
            )


def refuse_too_few(
    dealt: Mapping[tuple[int, int | None], Cohort], count: int, settings: FinetuneSettings, reader: CaseReader
) -> None:
    """Refuse a smallest number of labels that lacks a structure on some side of a deal; larger ones begin with the same cases.

    Raises:
        RequestError: A structure cannot be learnt from the first `count` training cases.
        ImageError: Their images or label maps cannot be used.
    """
    for (_, fold), cohort in dealt.items():
        structures = structures_of(cohort, reader)
        drawn = look_through(reader, cohort.first(count), structures, settings.raters)
        refuse_unlearnable(cohort.name, drawn, structures, one_fold=fold is not None)
        if fold is None:
            return  # the same cases for every seed


def plan(arms: Mapping[str, Any], counts: Sequence[int], seeds: Sequence[int], folds: int | None = None) -> list[Cell]:
    """Return the cells, seeds outermost, so that an interrupted curve has whole pairs of early seeds; with `folds` one cell per tested fold.

    Raises:
        RequestError: There is nothing to do, something is named twice, or an arm's name cannot be a folder.
    """
    for what, values in (("arms", list(arms)), ("counts", list(counts)), ("seeds", list(seeds))):
        if not values or len(set(values)) < len(values):
            found = ", ".join(map(str, values)) or "none"
            raise RequestError(f"label curve: {what}: {found}; give at least one, none twice; correct the list")
    bad = [arm for arm in arms if not re.fullmatch(r"[A-Za-z0-9.-]+", arm)]
    if bad:
        raise RequestError(f'label curve: arm "{bad[0]}"; letters, digits, dots and hyphens; rename it')
    tested = [None] if folds is None else list(range(folds))
    return [Cell(arm, count, seed, fold, folds) for seed in seeds for count in counts for fold in tested for arm in arms]


def refuse_chosen(arms: Mapping[str, Pretrained | None]) -> None:
    """Refuse weights that a live probe chose: its labels lie in no label budget.

    Raises:
        RequestError: An arm has `weights/best`.
    """
    for arm, weights in arms.items():
        chosen = weights.manifest.get("chosen_by") if weights is not None else None
        if chosen:
            raise RequestError(
                f"label curve: arm {arm} has weights that {chosen['labels']} labelled items chose ({chosen['metric']}), which lie in no "
                "budget of the curve; give the run folder itself, which means weights/last"
            )


def presence(cohort: Cohort, reader: CaseReader, raters: str = "majority") -> dict[str, frozenset[int]]:
    """Return case id -> structures that the label map of every labelled case has, for `deals`.

    Raises:
        RequestError: No label map holds a structure.
        ImageError: Images or label maps cannot be used.
    """
    cohort.refuse_folds_of_some_unknown()  # before an hour of reading
    structures, cases = structures_of(cohort, reader, every=True), cohort.labelled()
    return {case.id: drawn.present for case, drawn in zip(cases, look_through(reader, cases, structures, raters), strict=True)}


def uneven(cohort: Cohort, present: Mapping[str, frozenset[int]] | None) -> list[int]:
    """Return the structures that some patients have and others lack, by which folds are balanced; none without folds."""
    of_patient: dict[str, frozenset[int]] = {}
    for case in cohort.labelled() if present else []:
        of_patient[case.patient] = of_patient.get(case.patient, frozenset()) | (present or {})[case.id]
    held = list(of_patient.values())
    return sorted(frozenset.union(*held) - frozenset.intersection(*held)) if held else []


def deals(
    cohort: Cohort, folds: int | None, seeds: Sequence[int], present: Mapping[str, frozenset[int]] | None = None
) -> dict[tuple[int, int | None], Cohort]:
    """Return (seed, fold) -> the cohort with the splits of that cell; (seed, None) where the splits are given.

    Args:
        cohort: The labelled set.
        folds: Number of folds, or None.
        seeds: Seeds.
        present: What `presence` found; without it folds are dealt without regard to structures.
    """
    if folds is None:
        return {(seed, None): cohort for seed in seeds}
    return {(seed, fold): cohort.dealt(folds, seed, fold, present) for seed in seeds for fold in range(folds)}


def claim(
    out: Path,
    cohort: Cohort,
    settings: FinetuneSettings,
    arms: Mapping[str, Pretrained | None],
    folds: int | None = None,
    forced: Mapping[str, Sequence[str]] | None = None,
    leakage_check: str = NO_WEIGHTS,
    balanced_by: Sequence[int] = (),
) -> dict[str, Any]:
    """Write what the cells of a folder have in common, or check it against what the finished cells have.

    New arms may join later; known ones must have the same weights. How weights are transferred may still change while only
    scratch cells are there.

    Raises:
        RequestError: The folder belongs to another cohort, other settings, or other weights of the same name.
    """
    path = out / "label_curve.json"
    weights = {arm: None if w is None else str(w.manifest.get("weights_hash")) for arm, w in arms.items()}
    values = as_json(settings)
    key_file = out / "private" / "cohort.key"
    if path.is_file() and not key_file.is_file():
        raise RequestError(
            f"{out} holds cells of an earlier medssl, which called cases by another name; choose another folder, or remove this one"
        )
    key = folder_key(key_file)
    cards = {arm: data_cards(cohort, w) for arm, w in arms.items()}
    adapted = {arm: list(w.adapted) for arm, w in arms.items() if w is not None and w.adapted}
    shared = {
        "cohort": cohort.name,
        "cohort_digest": cohort.digest(key),
        "settings": values,
        "folds": folds,
        "balanced_by": list(balanced_by),
        "weights": weights,
        "data_cards": cards,
        "forced": dict(forced or {}),
        "adapted": adapted,
        "leakage_check": leakage_check,
    }
    if path.is_file() and any(out.glob("cells/*/results.json")):  # without one there is nothing to be mixed
        known = json.loads(path.read_text())
        faults = []
        if known["cohort_digest"] != shared["cohort_digest"]:
            faults.append("another cohort or split")
        if known.get("folds") != folds:
            faults.append(f"folds {known.get('folds')} (now {folds})")
        elif known.get("balanced_by", []) != list(balanced_by):
            faults.append("folds dealt without regard to structures that some patients lack, as an earlier medssl did")
        free = UNUSED_SETTINGS + (() if settings.patience is not None else VALIDATION_SETTINGS)
        free += () if set(known["weights"]) - {SCRATCH} else TRANSFER_SETTINGS
        before = {**as_json(FinetuneSettings()), **known["settings"]}  # what came later had its default then
        changed = [name for name in sorted({*before, *values} - set(free)) if before.get(name) != values.get(name)]
        faults += [f"{name} {before.get(name)} (now {values.get(name)})" for name in changed]
        faults += [f"other weights for arm {arm}" for arm in weights if known["weights"].get(arm, weights[arm]) != weights[arm]]
        if faults:
            raise RequestError(
                f"{out} holds cells computed with {'; '.join(faults)}; cells of one folder share everything but "
                "labels, seed and arm; choose another folder, or remove this one"
            )
        shared["weights"] = {**known["weights"], **weights}
        shared["data_cards"] = {**known.get("data_cards", {}), **cards}
        shared["forced"] = {**known.get("forced", {}), **(forced or {})}
        shared["adapted"] = {**known.get("adapted", {}), **adapted}
        if leakage_check == NO_WEIGHTS:  # of the scratch twin alone: what was said of the weights stays
            shared["leakage_check"] = known.get("leakage_check", NO_WEIGHTS)
    write_atomic(path, json.dumps(shared, indent=1).encode())
    return shared


def as_json(settings: FinetuneSettings) -> dict[str, Any]:
    """Return settings as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def folder_key(path: Path) -> bytes:
    """Return the key in a file that only its owner may read; make it when missing."""
    if not path.is_file():
        write_private(path, secrets.token_bytes(32))
    return path.read_bytes()


def read_cell(folder: Path) -> FinetuneResult | None:
    """Return a finished cell; None when it was not started, or cut short."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    return FinetuneResult.from_json(json.loads(path.read_text()))


def write_summary(out: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """Summarise the finished cells of a plan into `summary.json` and `table.md`."""
    results = [result for cell in cells if (result := read_cell(out / "cells" / cell.name)) is not None]
    summary = summarise(results)
    summary["cells"] = {"planned": len(cells), "done": len(results)}
    if said := label_sentences(out):
        summary["label_facts"] = said
    if (out / PLANS).is_file():
        summary["plans"] = plans_of(json.loads((out / PLANS).read_text()))
    summary["shared"] = json.loads((out / "label_curve.json").read_text())
    write_atomic(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    write_atomic(out / "table.md", (markdown(summary) + "\n").encode())
    return summary


def plans_of(cells: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each plan once per number of labels: `labels`, `cells` (how many have it), `fingerprints`, `settings` and `sentence`."""
    found: dict[str, dict[str, Any]] = {}
    for facts in cells.values():
        labels, settings, seen = facts["labels"], facts["settings"], facts["fingerprint"]
        key = json.dumps([labels, settings], sort_keys=True)
        known = found.setdefault(
            key,
            {
                "labels": labels,
                "cells": 0,
                "fingerprints": [],
                "settings": settings,
                "sentence": self_configuring.said(labels, settings),
            },
        )
        known["cells"] += 1
        known["fingerprints"] += [seen] if seen not in known["fingerprints"] else []
    return sorted(found.values(), key=lambda entry: int(entry["labels"]))


def summarise(results: Sequence[FinetuneResult]) -> dict[str, Any]:
    """Return means with intervals per (labels, arm), and the paired differences to scratch per labels; folds are taken together.

    A patient's score is the mean over structures, then over seeds; intervals come from a bootstrap over test patients, or over test cases
    where the patient of one of them is not known.
    They say how far the mean could move with other patients, not with other seeds or other training cases: the spread
    over seeds is given beside them.

    Returns:
        `rows`: labels, arm, seeds, n_test, n_patients (None where not known), by (what intervals are drawn by), dice, low, high,
        seed_spread (largest minus smallest seed mean), seed_means, structures {name: mean}, hd95_mm {name: mean}, seconds (mean).
        `differences`: labels, arm, against, seeds (those both have), difference, low, high, seed_differences. All Dice as fractions.
        `without_dicom_seg`: test cases that have NIfTI for DICOM-SEG; absent where there are none.
    """
    resampled = sorted({name for result in results for name in result.without_dicom_seg})
    results = together(results)
    rows, differences = [], []
    for labels in sorted({result.labels for result in results}):
        groups: dict[str, dict[int, FinetuneResult]] = {}
        for result in results:
            if result.labels == labels:
                groups.setdefault(result.arm, {})[result.seed] = result
        rows += [_row(labels, arm, by_seed) for arm, by_seed in groups.items()]
        twins = groups.get(SCRATCH, {})
        for arm, by_seed in groups.items():
            common = sorted(set(by_seed) & set(twins))
            if arm != SCRATCH and common:
                pair = [[by_seed[s] for s in common], [twins[s] for s in common]]
                differences.append(_difference(labels, arm, common, *pair))
    more = {"without_dicom_seg": resampled} if resampled else {}
    return {"metric": "mean Dice over structures", "rows": rows, "differences": differences, **more}


def together(results: Sequence[FinetuneResult]) -> list[FinetuneResult]:
    """Return one result per arm, labels and seed, with the tested cases of all its folds; a seed that lacks a fold is left out."""
    whole = [result for result in results if result.fold is None]
    groups: dict[tuple[str, int, int], list[FinetuneResult]] = {}
    for result in results:
        if result.fold is not None:
            groups.setdefault((result.arm, result.labels, result.seed), []).append(result)
    for group in groups.values():
        if len(group) == group[0].of_folds:
            cases = [case for result in sorted(group, key=lambda r: r.fold or 0) for case in result.cases]
            seconds = {key: float(np.mean([result.seconds[key] for result in group])) for key in group[0].seconds}
            whole.append(replace(group[0], cases=cases, curve=[], seconds=seconds, training_range={}, fold=None))
    return whole


def _row(labels: int, arm: str, by_seed: Mapping[int, FinetuneResult]) -> dict[str, Any]:
    seeds = sorted(by_seed)
    runs = [by_seed[seed] for seed in seeds]
    table, patients = score_table(runs)
    mean, low, high = bootstrap_interval(table.mean(axis=0), patients)
    seed_means = table.mean(axis=1)
    names = runs[0].structures
    return {
        "labels": labels,
        "arm": arm,
        "seeds": seeds,
        "n_test": table.shape[1],
        "n_patients": None if patients is None else len(set(patients)),
        "by": BY_CASE if patients is None else "by patient",
        "dice": mean,
        "low": _plain(low),
        "high": _plain(high),
        "seed_spread": float(seed_means.max() - seed_means.min()),
        "seed_means": [float(v) for v in seed_means],
        "choice": runs[0].choice,
        "structures": {name: _plain(float(np.mean([run.mean("dice")[name] for run in runs]))) for name in names},
        "hd95_mm": {name: _plain(float(np.mean([run.mean("hd95_mm")[name] for run in runs]))) for name in names},
        "seconds": float(np.mean([run.seconds["train"] for run in runs])),
    }


def _difference(
    labels: int, arm: str, seeds: list[int], runs: Sequence[FinetuneResult], twins: Sequence[FinetuneResult]
) -> dict[str, Any]:
    a, patients = score_table(runs)
    b, _ = score_table(twins)
    value, low, high = paired_bootstrap(a.mean(axis=0), b.mean(axis=0), patients)
    return {
        "labels": labels,
        "arm": arm,
        "against": SCRATCH,
        "seeds": seeds,
        "difference": value,
        "low": _plain(low),
        "high": _plain(high),
        "seed_differences": [float(v) for v in a.mean(axis=1) - b.mean(axis=1)],
    }


def score_table(runs: Sequence[FinetuneResult]) -> tuple[np.ndarray, list[str] | None]:
    """Return mean Dice (runs, cases) and the patient of each case, cases in one order; None where one is not known.

    Cases without any structure in label and prediction are left out.

    Raises:
        RequestError: The runs were scored on different cases.
    """
    order = [case.id for case in runs[0].cases]
    rows = []
    for run in runs:
        by_id = {case.id: case for case in run.cases}
        if set(by_id) != set(order):
            raise RequestError(
                "label curve: cells were scored on different test cases; one table needs the same; remove the cells and run again"
            )
        rows.append([by_id[name].mean_dice for name in order])
    table = np.array(rows, dtype=np.float64)
    kept = np.flatnonzero(np.isfinite(table).all(axis=0))
    patients = [patient for i in kept if (patient := runs[0].cases[i].patient) is not None]
    return table[:, kept], patients if len(patients) == len(kept) else None


def markdown(summary: Mapping[str, Any]) -> str:
    """Render a summary as two Markdown tables; Dice in points (0 to 100), differences in points."""
    lines = [
        "| labels | arm | Dice (95 % interval) | seeds | spread over seeds | per structure | HD95 mm | s/cell |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        structures = ", ".join(f"{name} {_points(value)}" for name, value in row["structures"].items())
        distances = ", ".join(f"{name} {_number(value)}" for name, value in row["hd95_mm"].items())
        lines.append(
            f"| {row['labels']} | {row['arm']} | "
            f"{_points(row['dice'])} ({_points(row['low'])} to {_points(row['high'])}) | {len(row['seeds'])} | "
            f"{_points(row['seed_spread'])} | {structures} | {distances} | {row['seconds']:.0f} |"
        )
    chosen = sorted({row["choice"] for row in summary["rows"] if not row["choice"].startswith("last state")})
    if chosen:
        lines += ["", "Validation labels beyond the budget chose the state that is scored, for instance " + chosen[0] + "."]
    if any(row.get("by") == BY_CASE for row in summary["rows"]):
        lines += ["", "Intervals by case: not all patients are known. They are too narrow where a patient has several."]
    if resampled := summary.get("without_dicom_seg"):
        lines += [
            "",
            f"{len(resampled)} test case(s) have NIfTI for DICOM-SEG, as their series was resampled: {', '.join(resampled)}.",
        ]
    for line in stated_lines(summary.get("shared", {})):
        lines += ["", line]
    for entry in summary.get("plans", []):
        lines += ["", f"{entry['sentence']} (cells: {entry['cells']})"]
    lines += ["", *(f"- labels: {sentence}" for sentence in summary.get("label_facts", []))] if summary.get("label_facts") else []
    if summary["differences"]:
        lines += ["", "| labels | difference | Dice points (95 % interval) | per seed |", "|---|---|---|---|"]
    for row in summary["differences"]:
        per_seed = ", ".join(f"{100 * v:+.1f}" for v in row["seed_differences"])
        interval = f"{_signed(row['low'])} to {_signed(row['high'])}"
        lines.append(
            f"| {row['labels']} | {row['arm']} - {row['against']} | {_signed(row['difference'])} ({interval}) | {per_seed} |"
        )
    return "\n".join(lines)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
