"""The tier of other sites, other scanners and corrupted images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic
from medssl.evaluation.corruptions import Seen, corrupt_seen, relative_robustness
from medssl.evaluation.frozen import fit_probe, predicted
from medssl.evaluation.scores import mean_auc, r2, score_row
from medssl.evaluation.stain import check_domain, stain_shift
from medssl.evaluation.suite_rows import row_of, skip
from medssl.evaluation.target_cases import Cases
from medssl.suite_tiers.bench import Bench, Change, Found, finite, join, or_skip
from medssl.suite_tiers.probes import LEAST, cannot_fit, fitted_tasks, probe_tables, probes


def ood(bench: Bench, _out: Path) -> Found:
    """Sites and scanners held out in turn, and test images corrupted at rising levels."""
    done = Found()
    for name, _ in fitted_tasks(bench, done, "robustness"):
        bench.of(name)
        for column in bench.recipe.left_out:
            with or_skip(done, name, f"{column} held out"):
                join(done, _held_out(bench, name, column))
        with or_skip(done, name, "corruptions"):
            join(done, _corrupted(bench, name))
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
    test = cases.where("test")
    metric, statistic, chance = _statistic(cases)
    features, fitted = bench.of(name), probes(bench, name)
    clean = {model: statistic(table) for model, table in probe_tables(bench, name, fitted).items()}
    patients, found = cases.patients(test), Found()
    scores: dict[str, list[float]] = {model: [] for model in fitted}
    for kind in bench.recipe.corruptions.kinds:
        with or_skip(found, name, f"corruption {kind}"):
            for level in bench.recipe.corruptions.levels:
                changed = bench.look(cases.ids[test], _change(bench, kind, level))
                for model, probe in fitted.items():
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
            why = "its clean score is at chance" if values else "no corruption was scored"
            found.skipped.append(skip(name, f"relative robustness of {model}", why))
    return found


def _change(bench: Bench, kind: str, level: int) -> Change:
    """Return what a corruption does to images.

    Raises:
        RequestError: It is not defined for images of this domain.
    """
    seed = bench.recipe.seed
    if kind != "stain":
        return lambda images, places: corrupt_seen(images, kind, level, places, seed=seed)
    check_domain(bench.section.domain.name)
    normalize = bench.section.views["normalize"]

    def stained(images: Seen, places: Sequence[int]) -> Seen:
        if not isinstance(images, Tensor):
            raise RequestError("stacks and clips are not stained; stain is for single images")
        return stain_shift(images, level, places, normalize=normalize, seed=seed)

    return stained
