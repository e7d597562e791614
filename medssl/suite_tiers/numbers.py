"""The tier of numbers and survival: ridge, neighbours, fine-tuning where the recipe asks, and proportional hazards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medssl.evaluation.folds import mean_over_folds
from medssl.evaluation.scores import mae, patient_folds, r2, score_row
from medssl.evaluation.suite_rows import row_of, skip
from medssl.evaluation.survival import concordance, fit_cox, fold_order
from medssl.suite_tiers.bench import Bench, Found, join, or_skip
from medssl.suite_tiers.curves import budgets, label_curves, own_recipe
from medssl.suite_tiers.probes import LEAST, against_controls, fitted_tasks, neighbours, probe_rows, probe_tables

FOLDS = 5
"""Of survival (card evaluation-protocols, section D, tier 7)."""


def regression(bench: Bench, out: Path) -> Found:
    """Numbers and survival: ridge with the penalty chosen on validation, neighbours, and fine-tuning where the recipe asks."""
    done = Found()
    for name, cases in fitted_tasks(bench, done, "ridge", "regression"):
        bench.of(name)
        with or_skip(done, name, "ridge"):
            tables = probe_tables(bench, name)
            done.rows += probe_rows(bench, "regression", name, tables, "ridge", {"r2": r2, "mae": mae}, main="mae")
            done.p_values += against_controls(bench, "regression", name, tables, r2)
        with or_skip(done, name, "neighbours"):
            done.rows += neighbours(bench, "regression", name, [k for k in bench.recipe.k if k < len(bench.unseen(name))])
        if bench.recipe.regression is None:
            done.skipped.append(skip(name, "fine-tuning", "the recipe names none (key regression)"))
        else:
            section = bench.recipe.regression
            counts = budgets(section, len(cases.where("train")), least=2)
            more = label_curves("regression", section, own_recipe(bench, section, name), bench, out, name, counts)
            done.rows += [{**row, "setting": f"fine-tuned, {row['setting']}"} for row in more.rows]
            done.skipped += more.skipped
            done.again |= more.again
    for name in bench.survival:
        bench.of(name)
        for part in (_of_splits, _of_folds):
            with or_skip(done, name, "survival"):
                join(done, part(bench, name))
    if not bench.survival:
        done.skipped.append(skip("", "survival", "the recipe names no task of times and events (task: survival)"))
    return done


def _of_splits(bench: Bench, name: str) -> Found:
    """Fit proportional hazards on training cases, choose the penalty on validation cases, score the order of test cases."""
    own = bench.survival[name]
    cases, times, events = own.cases, own.cases.targets, own.events
    train, val, test = (cases.where(split) for split in ("train", "val", "test"))
    if why := _too_few(events[train], "training") or ("" if len(test) else "no labelled case is marked test"):
        return Found(skipped=[skip(name, "survival, given splits", why)])
    tables = {}
    for model, x in bench.of(name).items():
        held_out = (
            None if _too_few(events[val], "validation") else (x[val], times[val], events[val])
        )  # else inner folds choose the penalty
        cox = fit_cox(x[train], times[train], events[train], cases.patients(train), held_out=held_out, seed=bench.recipe.seed)
        tables[model] = own.rows(test, cox.hazard(x[test]))
    rows = probe_rows(bench, "regression", name, tables, "Cox", {"concordance": concordance}, main="concordance")
    return Found(rows=rows, p_values=against_controls(bench, "regression", name, tables, concordance))


def _of_folds(bench: Bench, name: str) -> Found:
    """Deal validation and test patients into folds alike in sites; each is scored by a fit on the others and the training cases.

    Training cases are never scored: pretraining may have seen them. The index is the mean over folds, as each has its own scale of hazards.
    """
    own, seed = bench.survival[name], bench.recipe.seed
    cases, times, events = own.cases, own.cases.targets, own.events
    unseen, train = bench.unseen(name), cases.where("train")
    patients = cases.patients(unseen)
    if (number := len(unseen if patients is None else set(patients))) < FOLDS:
        return Found(skipped=[skip(name, f"survival, {FOLDS} folds", f"{number} validation and test patients; it takes {FOLDS}")])
    sites = [(bench.column("site") or [])[int(n)] for n in cases.ids[unseen]]
    fold = patient_folds(fold_order(times[unseen], events[unseen], sites), patients, folds=FOLDS, seed=seed)
    fits = [np.concatenate([train, unseen[fold != k]]) for k in range(FOLDS)]
    if why := next((why for fit in fits if (why := _too_few(events[fit], "fitted"))), ""):
        return Found(skipped=[skip(name, f"survival, {FOLDS} folds", why)])
    rows = []
    for model, x in bench.of(name).items():
        hazard = np.empty(len(unseen))
        for k, fit in enumerate(fits):
            cox = fit_cox(x[fit], times[fit], events[fit], cases.patients(fit), seed=seed)
            hazard[fold == k] = cox.hazard(x[unseen[fold == k]])
        table = np.concatenate([own.rows(unseen, hazard), fold[:, None]], axis=1)
        statistic = mean_over_folds(concordance)
        score = score_row(model, "", "concordance", table, patients, statistic=statistic, draws=bench.recipe.draws, seed=seed)
        spread = ", sites spread" if len(set(sites) - {"unknown"}) > 1 else ""
        rows.append(row_of(score, "regression", name, f"Cox, {FOLDS} folds{spread}"))
    return Found(rows=rows)


def _too_few(events: np.ndarray, which: str) -> str:
    """Return why hazards cannot be fitted, or an empty string."""
    found = int(events.sum())
    return "" if found >= LEAST else f"{found} events among {len(events)} {which} cases; it takes {LEAST}"
