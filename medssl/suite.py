"""`medssl evaluate --suite`: the nine-tier protocol on one labelled set, as far as the data allow.

out/suite.json               what the tiers have in common; a folder never mixes two settings
out/tiers/<tier>.json        rows, what was skipped and why; a tier whose file is there is not run again
out/<tier>/...               folders of the fine-tunings
out/results.json, table.md, page.html
out/private/                 names of classes and groups behind class_1, group_1; ids of the few-label probes

The rule of the split: fitted on training cases, chosen on validation cases, scored on test cases. What fits nothing (neighbours, retrieval,
leakage) takes validation and test cases, of which none may be of a patient that the weights were pretrained on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl import data_sources, label_tables, target_tasks
from medssl.errors import RequestError
from medssl.evaluation import suite_rows
from medssl.evaluation.aggregate import holm
from medssl.evaluation.suite_rows import TIERS, skip
from medssl.evaluation.survival import SurvivalCases
from medssl.evaluation.target_cases import Cases
from medssl.leakage import refuse_pretraining_patients
from medssl.probe_tasks import matching_section, refuse_size
from medssl.recipe import FinetuneTargetsRecipe, Recipe, SuiteRecipe
from medssl.recipe_checks import load_recipe
from medssl.suite_tiers import RUN, Bench
from medssl.training.run_folder import facts_of_machine, now
from medssl.weights import load_part, private_folder, stated_lines, write_atomic, write_private

OnTier = Callable[[str, int, int], None]


def run_suite(
    recipe: Any, weights: Path | str, overrides: Sequence[str] = (), *, on_cache: Any = None, on_tier: OnTier | None = None
) -> dict[str, Any]:
    """Run the tiers that are not done yet, and write tables and page.

    Args:
        recipe: YAML path or `SuiteRecipe`.
        weights: Run folder or safetensors file.
        overrides: `key=value` assignments.
        on_cache: Progress of filling the store.
        on_tier: Called with (tier, tiers done, tiers in all) before each.

    Returns:
        What `results.json` in `out` holds: `rows`, `skipped`, `aggregate`, `comparisons`, and the facts.

    Raises:
        RequestError: Recipe, table and weights do not go together, or `out` holds another suite; nothing was computed.
        LeakageError: A patient to be scored was pretrained on.
    """
    recipe = load_recipe(recipe, overrides, kind="suite")
    for section in (recipe.classification, recipe.segmentation, recipe.detection, recipe.regression):
        if section is not None and section.recipe is not None:  # a fault in it must not come to light after hours
            load_recipe(section.recipe, section.overrides, kind="finetune")
    bench = open_bench(recipe, weights, on_cache)
    scored = {bench.series[int(n)] for name, cases in bench.all_cases.items() for n in cases.ids[bench.unseen(name)]}
    rows = [row for row in bench.shelf.rows if row.series_id in scored]
    leakage = refuse_pretraining_patients(weights, replace(bench.shelf, rows=rows))
    out = Path(recipe.out)
    private_folder(out)
    shared = claim(out, bench, leakage)
    for number, tier in enumerate(recipe.tiers):
        if on_tier is not None:
            on_tier(tier, number, len(recipe.tiers))
        run_tier(tier, bench, out)
    # of all tiers of the folder, also those that this run leaves out: a run of one tier must not lose the others
    files = {tier: out / "tiers" / f"{tier}.json" for tier in TIERS}
    found = {tier: json.loads(path.read_text()) for tier, path in files.items() if path.is_file()}
    return {**write_results(out, found, shared), "out": str(out)}


def open_bench(recipe: SuiteRecipe, weights: Path | str, on_cache: Any = None) -> Bench:
    """Read what all tiers share: weights, series, labels.

    Raises:
        RequestError: A column is missing, or labels do not fit their task.
    """
    columns = [column for task in recipe.tasks.values() for column in (task.column, task.event) if column is not None]
    label_tables.check_table(recipe.table, recipe.file_column, *columns)
    _, manifest = load_part(weights)
    section, forced = matching_section(recipe, manifest)
    refuse_size(manifest["encoder"], section.views)
    shelf = data_sources.fill_shelf("source", section, on_progress=on_cache)
    found: dict[str, tuple[Cases, dict[int, str]]] = {}
    names = {}
    events: dict[str, np.ndarray] = {}
    for name, task in recipe.tasks.items():
        one = FinetuneTargetsRecipe(
            task="regression" if task.task == "survival" else task.task,
            source=section,
            table=recipe.table,
            file_column=recipe.file_column,
            target=task.column,
            classes=task.classes,
        )
        cases, series, known = target_tasks.labelled_cases(shelf, one)
        if bad := int((~np.isfinite(cases.targets)).sum()):
            raise RequestError(
                f"tasks.{name}: {bad} of {len(cases.targets)} numbers in column {task.column} are not finite; empty the cells of cases "
                "without a label"
            )
        if task.task == "survival":
            events[name] = _events(recipe, name, cases, series, shelf)
        names[name] = (known, [str(public) for public in cases.classes])
        found[name] = (cases, series)
    everything = sorted({name for _, series in found.values() for name in series.values()})
    place = {name: k for k, name in enumerate(everything)}
    tasks = {
        name: replace(cases, ids=np.array([place[series[int(n)]] for n in cases.ids])) for name, (cases, series) in found.items()
    }
    survival = {name: SurvivalCases(tasks.pop(name), own) for name, own in events.items()}
    return Bench(recipe, Path(weights), manifest, section, shelf, tasks, everything, names, survival, forced)


def _events(recipe: SuiteRecipe, name: str, cases: Cases, series: Mapping[int, str], shelf: data_sources.Shelf) -> np.ndarray:
    """Return (N,) whether an event ended the time of each case.

    Raises:
        RequestError: A time is below 0, or a case with a time has neither 0 nor 1 for its event.
    """
    task = recipe.tasks[name]
    assert task.event is not None
    if early := int((cases.targets < 0).sum()):
        raise RequestError(f"tasks.{name}: {early} of {len(cases.targets)} times in column {task.column} are below 0; correct them")
    said = label_tables.read_targets(recipe.table, recipe.file_column, task.event, shelf)
    values = [{"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}.get(said.get(series[int(n)], ""), np.nan) for n in cases.ids]
    if bad := int(np.isnan(values).sum()):
        raise RequestError(
            f"tasks.{name}: {bad} of {len(values)} cases with a time have neither 0 nor 1 in column {task.event}; write 1 for an event, 0 for "
            "none until then, and empty the time of cases that are to be left out"
        )
    return np.array(values)


def claim(out: Path, bench: Bench, leakage: str) -> dict[str, Any]:
    """Write what all tiers of a folder share, or check it against what is there.

    Raises:
        RequestError: The folder holds tiers of other settings, weights or cases.
    """
    settings = {k: v for k, v in bench.recipe.model_dump(mode="json").items() if k not in ("out", "tiers", "batch", "force")}
    cases = {
        name: sorted((bench.series[int(n)], float(t), str(s)) for n, t, s in zip(cases.ids, cases.targets, cases.split))
        for name, cases in bench.all_cases.items()
    }
    for name, own in bench.survival.items():
        cases[f"{name}, events"] = sorted((bench.series[int(n)], float(e), "") for n, e in zip(own.cases.ids, own.events))
    for name in ("classification", "segmentation", "detection", "regression"):
        section = getattr(bench.recipe, name)
        if section is not None and section.recipe is not None:  # what it says, not where it lies
            resolved = load_recipe(section.recipe, section.overrides, kind="finetune")
            settings[name] = {**settings[name], "recipe": Recipe.hash(resolved), "overrides": []}
    shared = {
        "kind": "suite",
        "settings": hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest(),
        "weights": str(bench.manifest["weights_hash"]),
        "cases": hashlib.blake2b(json.dumps(cases).encode(), digest_size=16).hexdigest(),
        "columns": hashlib.blake2b(json.dumps(_columns(bench)).encode(), digest_size=16).hexdigest(),
    }
    path = out / "suite.json"
    if path.is_file():
        known = json.loads(path.read_text())
        changed = [key for key in shared if known.get(key) != shared[key]]
        if changed:
            raise RequestError(
                f"{out} holds tiers computed with other {', '.join(changed)}; tiers of one folder share everything; choose another folder, "
                "or remove this one"
            )
    write_atomic(path, json.dumps(shared, indent=1).encode())
    mapping = {name: dict(zip(public, known)) for name, (known, public) in bench.names.items()}
    write_private(out / "private" / "classes.json", json.dumps(mapping, indent=1).encode())
    counts = {name: {s: int((cases.split == s).sum()) for s in ("train", "val", "test")} for name, cases in bench.all_cases.items()}
    tasks = {
        name: {"task": bench.recipe.tasks[name].task, "cases": counts[name], "classes": bench.names[name][1]}
        for name in bench.all_cases
    }
    encoder = str(bench.manifest["encoder"]["name"])
    facts = {"leakage_check": leakage, "forced": bench.forced, "tasks": tasks, "seed": bench.recipe.seed}
    return {**shared, "encoder": encoder, **facts}


def _columns(bench: Bench) -> dict[str, Any]:
    """Return column -> value of every series, of all columns besides the targets that a tier reads."""
    of_folds = ["site"] if bench.survival else []
    names = sorted({*bench.recipe.left_out, *bench.recipe.subgroups, *bench.recipe.leakage, *of_folds})
    found: dict[str, Any] = {name: bench.column(name) for name in names}
    found |= {f"index.{key}": list(map(str, bench.row(key))) for key in ("patient_id", "study_id", "quality_flags")}
    return {"series": bench.series, **found}


def run_tier(tier: str, bench: Bench, out: Path) -> dict[str, Any]:
    """Return what a tier found; it runs where its file is not there yet, or says that something is to be tried again."""
    path = out / "tiers" / f"{tier}.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if known.get("finished", True):
            return known
    began = time.perf_counter()
    done = RUN[tier](bench, out)
    for row in done.rows:
        row.setdefault("modality", bench.section.domain.name)  # a fine-tuning with a recipe of its own has said its own
    if done.private:
        write_private(out / "private" / f"{tier}.json", json.dumps(done.private, indent=1).encode())
    if not done.rows and not done.skipped:
        done.skipped.append(skip("", "the tier", "no task of the recipe is of its kind"))
    skipped = list({tuple(entry.items()): entry for entry in done.skipped}.values())  # several curves of one cohort lack the same
    content: dict[str, Any] = {"tier": tier, "rows": done.rows, "skipped": skipped, "p_values": done.p_values}
    content |= {
        "forced": done.forced,
        "adapted": done.adapted,
        "plans": done.plans,
        "finished": not done.again,
        "seconds": time.perf_counter() - began,
        "when": now(),
    }
    text = json.dumps(content, indent=1, allow_nan=False, default=float)
    write_atomic(path, text.encode())
    kept: dict[str, Any] = json.loads(text)
    return kept


def write_results(out: Path, found: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Write `results.json`, `table.md` and `page.html` from the tiers."""
    from medssl.report.suite_page import suite_page

    rows = [row for tier in TIERS if tier in found for row in found[tier]["rows"]]
    skipped = {tier: content["skipped"] for tier, content in found.items()}
    plans = [{"tier": tier, **plan} for tier, content in found.items() for plan in content.get("plans", ())]
    tables = suite_rows.tables(rows, skipped, plans)
    totals, pairs = suite_rows.overall(rows), suite_rows.pairs(rows)
    comparisons = _verdicts([row for tier in TIERS if tier in found for row in found[tier]["p_values"]])
    facts = facts_of_machine()
    own = [one for content in found.values() for one in content.get("forced", ())]  # a recipe that a tier names has its own
    forced = list(dict.fromkeys([*shared["forced"], *own]))
    adapted = list(dict.fromkeys(one for content in found.values() for one in content.get("adapted", ())))
    result = {
        **shared,
        "forced": forced,
        "adapted": adapted,
        "rows": rows,
        "skipped": [{"tier": tier, **entry} for tier, entries in skipped.items() for entry in entries],
        "plans": plans,
        "aggregate": totals,
        "pairs": pairs,
        "comparisons": comparisons,
        "seconds": {tier: content["seconds"] for tier, content in found.items()},
        "when": now(),
        **{key: facts[key] for key in ("hardware", "versions", "git")},
    }
    write_atomic(out / "table.md", (suite_rows.markdown(tables, totals, comparisons, pairs, stated_lines(result)) + "\n").encode())
    write_atomic(out / "page.html", suite_page({**result, "tables": tables}).encode())
    write_atomic(out / "results.json", json.dumps(result, indent=1, allow_nan=False, default=str).encode())
    return result


def draw_page(folder: Path, out: Path) -> Path:
    """Draw the page of a suite again from its `results.json`; it shows no patient.

    Raises:
        RequestError: The suite is not finished, or `out` is a folder.
    """
    from medssl.report.suite_page import suite_page

    if out.is_dir():
        raise RequestError(f"{out}: is a folder; name the HTML file to write, for instance {out / 'report.html'}")
    if not (folder / "results.json").is_file():
        raise RequestError(
            f"{folder}: the suite is not finished; run the same `medssl evaluate --suite` again, it goes on where it stopped"
        )
    result = json.loads((folder / "results.json").read_text())
    skipped: dict[str, list[dict[str, str]]] = {}
    for entry in result["skipped"]:
        skipped.setdefault(entry["tier"], []).append(entry)
    write_atomic(
        out, suite_page({**result, "tables": suite_rows.tables(result["rows"], skipped, result.get("plans", ()))}).encode()
    )
    return out


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say which differences to controls are there, all tested together (Holm, 5 %)."""
    rejected = holm([1.0 if row["p"] is None or row["value"] is None else row["p"] for row in rows]) if rows else []
    return [
        {**row, "verdict": ("win" if row["value"] > 0 else "loss") if sure else "no difference shown"}
        for row, sure in zip(rows, rejected, strict=True)
    ]
