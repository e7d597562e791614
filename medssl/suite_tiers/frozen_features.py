"""Tiers of frozen features alone: smoke, frozen, retrieval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from medssl.errors import RequestError
from medssl.evaluation.corruptions import corrupt_seen
from medssl.evaluation.frozen import few_shot, fewest
from medssl.evaluation.retrieval import precisions, reidentified
from medssl.evaluation.scores import mean_auc, score_row
from medssl.evaluation.suite_rows import WEIGHTS, row_of, skip
from medssl.feature_statistics import alignment, effective_rank, uniformity
from medssl.suite_tiers.bench import Bench, Found, join, mean_of, or_skip
from medssl.suite_tiers.probes import against_controls, classes_of, fitted_tasks, neighbours, probe_rows, probe_tables


def smoke(bench: Bench, _out: Path) -> Found:
    """Rank, uniformity, alignment and neighbours of the features of unseen patients."""
    done = Found()
    for name, cases in bench.tasks.items():
        rows = bench.unseen(name)
        if len(rows) < 4:
            done.skipped.append(skip(name, "smoke metrics", f"{len(rows)} validation and test cases; four or more are needed"))
            continue
        features, patients = bench.of(name), cases.patients(rows)
        noisy = bench.look(cases.ids[rows], lambda seen, places: corrupt_seen(seen, "noise", 1, places, seed=bench.recipe.seed))
        for model, values in features.items():
            x = torch.from_numpy(np.asarray(values[rows], dtype=np.float64))
            numbers = {"smooth_rank": float(effective_rank(x)), "uniformity": float(uniformity(x))}
            numbers["alignment"] = float(alignment(x, torch.from_numpy(np.asarray(noisy[model], dtype=np.float64))))
            for metric, value in numbers.items():
                score = {"name": model, "metric": metric, "value": value if np.isfinite(value) else None, "low": None, "high": None}
                score |= {"n_images": len(rows), "n_patients": None if patients is None else len(set(patients))}
                done.rows.append(row_of(score, "smoke", name, ""))
        with or_skip(done, name, "neighbours"):
            done.rows += neighbours(bench, "smoke", name, [k for k in (1, 5, 20) if k < len(rows)])
    return done


def frozen(bench: Bench, _out: Path) -> Found:
    """Neighbours, logistic probe with the penalty chosen on validation, and few-label probes, of classes."""
    done = Found()
    for name, cases in fitted_tasks(bench, done, "frozen probes", "classification"):
        features = bench.of(name)
        with or_skip(done, name, "neighbours"):
            done.rows += neighbours(bench, "frozen", name, [k for k in bench.recipe.k if k < len(bench.unseen(name))])
        with or_skip(done, name, "logistic probe"):
            tables = probe_tables(bench, name)
            done.rows += probe_rows(bench, "frozen", name, tables, "logistic", {"auroc": mean_auc}, main="auroc")
            done.p_values += against_controls(bench, "frozen", name, tables, mean_auc)
        test = cases.where("test")
        for shots in bench.recipe.shots:
            if (least := fewest(cases)) < shots:
                done.skipped.append(skip(name, f"{shots} per class", f"the rarest class has {least} training cases"))
                continue
            for model, values in features.items():
                table, ids = few_shot(values, cases, shots, range(bench.recipe.shot_seeds))
                score = score_row(
                    model, "", "auroc", table, cases.patients(test), statistic=mean_of(mean_auc), draws=bench.recipe.draws,
                    seed=bench.recipe.seed,
                )  # fmt: skip
                done.rows.append(row_of(score, "frozen", name, f"{shots} per class", seeds=bench.recipe.shot_seeds))
                done.private[f"{name}, {shots} per class"] = [[bench.series[n] for n in drawn] for drawn in ids]
    return done


def retrieval(bench: Bench, _out: Path) -> Found:
    """Precision among the nearest images of other patients, and how often a patient is found again in another study."""
    done = Found()
    for name, cases in classes_of(bench):
        rows = bench.unseen(name)
        if len(rows) < 4:
            done.skipped.append(skip(name, "retrieval", f"{len(rows)} validation and test cases; four or more are needed"))
            continue
        targets, patients = cases.targets[rows].astype(np.int64), cases.patients(rows)
        ks = [k for k in bench.recipe.k if k < len(rows)]
        for model, values in bench.of(name).items():
            try:
                hits, chance = precisions(values[rows], targets, patients, ks)
            except RequestError as err:  # the same for all models: too few patients
                done.skipped.append(skip(name, "retrieval", str(err)))
                break
            for k in ks:
                for who, found in ((model, hits[k]), *((("chance", chance),) if model == WEIGHTS else ())):
                    score = score_row(who, "", f"precision@{k}", found, patients, draws=bench.recipe.draws, seed=bench.recipe.seed)
                    done.rows.append(row_of(score, "retrieval", name, "", main=who != "chance" and k == (5 if 5 in ks else ks[0])))
    join(done, _again(bench))
    return done


def _again(bench: Bench) -> Found:
    what = "patients found again"
    scored = sorted({int(n) for name, cases in bench.all_cases.items() for n in cases.ids[bench.unseen(name)]})
    if any("patient_unknown" in flags for flags in bench.row("quality_flags")):
        return Found(skipped=[skip("", what, "patients are not known")])
    patients, studies = ([bench.row(key)[n] for n in scored] for key in ("patient_id", "study_id"))
    rows = []
    for model, values in bench.features.items():
        places, hits, chance = reidentified(values[scored], patients, studies)
        if not len(places):
            return Found(skipped=[skip("", what, "no patient of the validation and test cases has two studies")])
        own = [patients[k] for k in places]
        for who, found in ((model, hits), *((("chance", chance),) if model == WEIGHTS else ())):
            score = score_row(who, "", "reidentified", found, own, draws=bench.recipe.draws, seed=bench.recipe.seed)
            rows.append(row_of(score, "retrieval", "privacy", "nearest of another study"))
    return Found(rows=rows)
