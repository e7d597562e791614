"""The tier of numbers: ridge, neighbours, and fine-tuning where the recipe asks."""

from __future__ import annotations

from pathlib import Path

from medssl.evaluation.scores import mae, r2
from medssl.evaluation.suite_rows import skip
from medssl.suite_tiers.bench import Bench, Found, or_skip
from medssl.suite_tiers.curves import budgets, label_curves, own_recipe
from medssl.suite_tiers.probes import against_controls, cannot_fit, neighbours, probe_rows, probe_tables


def regression(bench: Bench, out: Path) -> Found:
    """Numbers: ridge with the penalty chosen on validation, neighbours, and fine-tuning where the recipe asks."""
    done = Found()
    for name, cases in bench.tasks.items():
        if cases.task != "regression":
            continue
        if why := cannot_fit(cases):
            done.skipped.append(skip(name, "ridge", why))
            continue
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
    done.skipped.append(skip("", "survival", "no table of times and events"))
    return done
