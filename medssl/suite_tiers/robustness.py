"""The tier of other sites, other scanners and corrupted images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.corruptions import corrupt, relative_robustness
from medssl.evaluation.frozen import fit_probe, predicted
from medssl.evaluation.scores import mean_auc, r2, score_row
from medssl.evaluation.suite_rows import row_of, skip
from medssl.evaluation.target_cases import Cases
from medssl.suite_tiers.bench import Bench, Found, finite, join, or_skip
from medssl.suite_tiers.probes import LEAST, cannot_fit


def ood(bench: Bench, _out: Path) -> Found:
    """Sites and scanners held out in turn, and test images corrupted at rising levels."""
    done = Found()
    for name, cases in bench.tasks.items():
        if why := cannot_fit(cases):
            done.skipped.append(skip(name, "robustness", why))
            continue
        bench.of(name)
        for column in bench.recipe.left_out:
            with or_skip(done, name, f"{column} held out"):
                join(done, _held_out(bench, name, column))
        try:
            with or_skip(done, name, "corruptions"):
                join(done, _corrupted(bench, name))
        except TypeError as err:
            done.skipped.append(skip(name, "corruptions", str(err)))
    return done


def _statistic(cases: Cases) -> tuple[str, Statistic, float]:
    """Return the metric of out-of-distribution tables, and what chance has."""
    return ("auroc", mean_auc, 0.5) if cases.task == "classification" else ("r2", r2, 0.0)


def _held_out(bench: Bench, name: str, column: str) -> Found:
    """Fit on the cases with other values of a column, score on the test cases with this one."""
    cases, values = bench.tasks[name], bench.column(column)
    if values is None:
        return Found(skipped=[skip(name, f"{column} held out", f"no attached labels for {column}")])
    own = np.array(bench.public(column, values))[cases.ids]
    known = sorted(set(own.tolist()) - {"unknown"})
    if len(known) < 2:
        why = f"{len(known)} known value of {column} among {len(own)} cases; it takes two"
        return Found(skipped=[skip(name, f"{column} held out", why)])
    metric, statistic, _ = _statistic(cases)
    found = Found()
    for value in known:
        test = np.array([row for row in cases.where("test") if own[row] == value])
        rest = replace(cases, split=np.where((own == value) & (cases.split != "test"), "none", cases.split))
        seen = np.array([row for row in cases.where("test") if own[row] != value])
        if (
            len(test) < LEAST
            or len(seen) < LEAST
            or cannot_fit(rest)
            or (cases.classes and len(set(cases.targets[test].tolist())) < 2)
        ):
            found.skipped.append(
                skip(name, f"{column} {value} held out", f"{len(test)} test cases with it, {len(seen)} without: too few")
            )
            continue
        for model, x in bench.of(name).items():
            probe = fit_probe(x, rest, rest.where("train"), bench.recipe.seed)
            for what, rows in (("held out", test), ("the others", seen)):
                table = predicted(probe, x, cases, rows)
                score = score_row(
                    model,
                    "",
                    metric,
                    table,
                    cases.patients(rows),
                    statistic=statistic,
                    draws=bench.recipe.draws,
                    seed=bench.recipe.seed,
                )
                found.rows.append(row_of(score, "ood", name, f"{column} {what}", subgroup=value))
    return found


def _corrupted(bench: Bench, name: str) -> Found:
    """Score the test cases under every corruption and level with the probe of clean training images."""
    cases = bench.tasks[name]
    train, test = cases.where("train"), cases.where("test")
    metric, statistic, chance = _statistic(cases)
    features = bench.of(name)
    probes = {model: fit_probe(x, cases, train, bench.recipe.seed) for model, x in features.items()}
    clean = {model: statistic(predicted(probe, features[model], cases, test)) for model, probe in probes.items()}
    patients, found = cases.patients(test), Found()
    scores: dict[str, list[float]] = {model: [] for model in probes}
    for kind in bench.recipe.corruptions.kinds:
        for level in bench.recipe.corruptions.levels:

            def change(images: torch.Tensor, kind: str = kind, level: int = level) -> torch.Tensor:
                return corrupt(images, kind, level, bench.recipe.seed)

            changed = bench.look(cases.ids[test], change)
            for model, probe in probes.items():
                whole = features[model].copy()
                whole[test] = changed[model]
                table = predicted(probe, whole, cases, test)
                score = score_row(
                    model, "", metric, table, patients, statistic=statistic, draws=bench.recipe.draws, seed=bench.recipe.seed
                )
                if score["value"] is not None:
                    scores[model].append(float(score["value"]))
                found.rows.append(row_of(score, "ood", name, f"{kind}, level {level}"))
    for model, values in scores.items():
        value = finite(relative_robustness(clean[model], values, chance))
        score = {"name": model, "metric": "relative_robustness", "value": value, "low": None, "high": None}
        score |= {"n_images": len(test), "n_patients": None if patients is None else len(set(patients))}
        found.rows.append(row_of(score, "ood", name, "all corruptions"))  # no main row: it rewards what is near chance
        if value is None:
            found.skipped.append(skip(name, f"relative robustness of {model}", "its clean score is at chance"))
    return found
