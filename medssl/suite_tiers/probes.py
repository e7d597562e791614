"""Probes that several tiers ask: neighbours, logistic and ridge regression, and their differences to the controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medssl.evaluation.bootstrap import Statistic, paired_bootstrap, paired_p
from medssl.evaluation.frozen import fit_probe, predicted
from medssl.evaluation.knn import knn_probe
from medssl.evaluation.linear_probe import LinearModel
from medssl.evaluation.scores import score_row
from medssl.evaluation.suite_rows import CONTROLS, WEIGHTS, Row, row_of, skip
from medssl.evaluation.target_cases import Cases
from medssl.suite_tiers.bench import Bench, Features, Found, finite

LEAST = 5  # patients of a value for a leakage probe (its outer folds), and test cases of a held-out value; fewer say nothing


def classes_of(bench: Bench) -> list[tuple[str, Cases]]:
    """Return the tasks of classes."""
    return [(name, cases) for name, cases in bench.tasks.items() if cases.task == "classification"]


def cannot_fit(cases: Cases) -> str:
    """Return why nothing can be fitted and scored, or an empty string."""
    for split in ("train", "test"):
        if not len(cases.where(split)):
            return f"no labelled case is marked {split}"
    if cases.task == "classification":
        for split in ("train", "test"):
            absent = len(cases.classes) - len(set(cases.targets[cases.where(split)].tolist()))
            if absent:
                return f"{absent} of {len(cases.classes)} classes have no {split} case"
    return ""


def fitted_tasks(bench: Bench, done: Found, what: str, kind: str | None = None) -> Iterator[tuple[str, Cases]]:
    """Yield name and cases of the tasks that something can be fitted to; of the others `done` says why not.

    Args:
        bench: What the suite asks.
        done: Takes the skipped parts.
        what: That cannot be done.
        kind: `classification` or `regression`, None for both.
    """
    for name, cases in bench.tasks.items():
        if kind is not None and cases.task != kind:
            continue
        if why := cannot_fit(cases):
            done.skipped.append(skip(name, what, why))
            continue
        yield name, cases


def neighbours(bench: Bench, tier: str, name: str, ks: Sequence[int]) -> list[Row]:
    """Return the scores of the nearest neighbours of every model, among validation and test cases of other patients."""
    cases, rows = bench.tasks[name], bench.unseen(name)
    found = []
    for model, values in bench.of(name).items():
        for k in ks:
            scores = knn_probe(
                values[rows], cases.targets[rows], cases.patients(rows), task=cases.task, name=model, k=k, draws=bench.recipe.draws,
                seed=bench.recipe.seed,
            )  # fmt: skip
            found += [row_of(score, tier, name, f"{k} nearest") for score in scores]
    return found


def probes(bench: Bench, name: str) -> dict[str, LinearModel]:
    """Return the probe of a task under every model, fitted on its training cases."""
    cases = bench.tasks[name]
    train = cases.where("train")
    return {model: fit_probe(values, cases, train, bench.recipe.seed) for model, values in bench.of(name).items()}


def probe_tables(bench: Bench, name: str, fitted: Mapping[str, LinearModel] | None = None, split: str = "test") -> Features:
    """Return target and prediction of the cases of a split under every model; probes are fitted here where none are given."""
    cases, features = bench.tasks[name], bench.of(name)
    rows = cases.where(split)
    return {model: predicted(probe, features[model], cases, rows) for model, probe in (fitted or probes(bench, name)).items()}


def probe_rows(
    bench: Bench, tier: str, name: str, tables: Features, setting: str, metrics: Mapping[str, Statistic], *, main: str = ""
) -> list[Row]:
    """Return the scores of what `probe_tables` predicted."""
    cases = bench.all_cases[name]
    patients = cases.patients(cases.where("test"))
    found = []
    for metric, statistic in metrics.items():
        for model, table in tables.items():
            score = score_row(
                model, "", metric, table, patients, statistic=statistic, draws=bench.recipe.draws, seed=bench.recipe.seed
            )
            found.append(row_of(score, tier, name, setting, main=metric == main))
    return found


def against_controls(bench: Bench, tier: str, name: str, tables: Features, statistic: Statistic) -> list[dict[str, Any]]:
    """Return the paired differences of the weights to every control, with p-values for Holm."""
    cases, draws, seed = bench.all_cases[name], bench.recipe.draws, bench.recipe.seed
    patients = cases.patients(cases.where("test"))
    found = []
    for control in CONTROLS:
        pair = tables[WEIGHTS], tables[control], patients
        value, low, high = paired_bootstrap(*pair, statistic=statistic, draws=draws, seed=seed)
        p = paired_p(*pair, statistic=statistic, draws=draws, seed=seed)
        row = {
            "tier": tier,
            "task": name,
            "against": control,
            "value": finite(value),
            "low": finite(low),
            "high": finite(high),
            "p": finite(p),
        }
        found.append(row)
    return found
