"""Fine-tuning for one label per case, a class or a number, from an index and a table: the road around `evaluation.finetune_targets`.

out/target_curve.json              what the cells have in common; a folder never mixes two settings
out/cells/<arm>_n<labels>_s<seed>/ results.json (last: it says that the cell is done), network.safetensors with its manifest
out/summary.json, out/table.md     rewritten after every cell
out/private/classes.csv            what class_1, class_2, ... are called in the table, where the recipe does not name the classes

A column of labels may hold anything, patients too; so its values reach no artefact and no error unless the recipe lists them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl import build, data_sources
from medssl.archive.table import group_facts
from medssl.build import load_recipe
from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic, bootstrap_interval, paired_bootstrap
from medssl.evaluation.finetune_targets import (
    Cases,
    Classifier,
    Images,
    TargetResult,
    check,
    deal,
    few_label_order,
    finetune_targets,
    mean_auc,
)
from medssl.evaluation.folds import pool_folds
from medssl.evaluation.label_curve import SCRATCH, Cell, plan
from medssl.evaluation.outside import Look
from medssl.evaluation.scores import encode_classes, mae
from medssl.leakage import refuse_pretraining_patients
from medssl.probe_tasks import evaluation_section, labelled_rows
from medssl.recipe import FinetuneBoxesRecipe, FinetuneTargetsRecipe, SourceSection
from medssl.sampling.items import Item
from medssl.seeding import derive_seed
from medssl.training.run_folder import facts_of_machine, now
from medssl.types import DrawKey
from medssl.weights import load_part, private_folder, save_part, write_atomic, write_private

NAME = "source"
SourceRecipe = FinetuneTargetsRecipe | FinetuneBoxesRecipe
OnCell = Callable[[int, int, Cell, dict[str, Any]], None]
OnStep = Callable[[int, int, Mapping[str, float]], None]


@dataclass
class SourceBatches:
    """Pictures of labelled series, from the store, as pretraining shows them.

    Args:
        shelf: The cached series.
        section: Their source, with the views of the weights.
        augment: What is added to the views in training.
        series: id -> series_id.
        batch: Cases per step.
        device: Where views are made.
    """

    shelf: data_sources.Shelf
    section: SourceSection
    augment: Mapping[str, Any]
    series: dict[int, str]
    batch: int
    device: torch.device

    def __post_init__(self) -> None:
        self._drawn: tuple[tuple[int, ...], Any] | None = None

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Images, Sequence[int]]:
        """Draw a batch of `ids` with augmentation, a function of (ids, step, seed)."""
        wanted = tuple(ids)
        if self._drawn is None or self._drawn[0] != wanted:
            items = [Item(number, self.shelf.name, "", self.series[number], "", "train") for number in ids]
            section = self.section.model_copy(update={"views": {**self.section.views, **self.augment}})
            self._drawn = (wanted, data_sources.training_source(self.shelf, section, items, batch))
        source = self._drawn[1]
        views = source.views(source.fetch([DrawKey(seed, step, place) for place in range(batch)]), self.device)
        return data_sources.first_view(views, source.view_maker.name), views.meta.ids.tolist()

    def plain(self, ids: Sequence[int]) -> Iterable[tuple[Images, Sequence[int]]]:
        """Show the middle of each case."""
        source = data_sources.evaluation_source(self.shelf.name, self.shelf, self.section, [self.series[n] for n in ids])
        for images, places in data_sources.images_and_ids(source, self.device, self.batch):
            yield images, [ids[place] for place in places]


@dataclass(frozen=True)
class Arm:
    """Where an encoder comes from.

    Args:
        encoder: `{"name", "args"}`.
        weights: Where its weights lie; None is the scratch twin.
        hash: Of the weights.
    """

    encoder: dict[str, Any]
    weights: Path | None
    hash: str | None

    def build(self, seed: int) -> Any:
        """Build it; a scratch encoder depends on the seed alone."""
        if self.weights is not None:
            size = {"image_size": self.encoder["args"]["image_size"]} if "image_size" in self.encoder["args"] else {}
            return build.load_encoder(self.weights, **size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "finetune", "encoder"))
            return build.build_encoder(self.encoder)


def target_curve(
    recipe: Any,
    weights: Path | str | None,
    overrides: Sequence[str] = (),
    *,
    counts: Sequence[int] | None,
    seeds: Sequence[int],
    twin: bool = True,
    on_cell: OnCell | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Compute the cells (labels x seed x arm) that are missing, then summarise.

    Args:
        recipe: YAML path or `FinetuneTargetsRecipe`.
        weights: Run folder or safetensors file; None or "scratch" trains from scratch.
        overrides: `key=value` assignments.
        counts: Numbers of labelled training cases; None takes the recipe's `labels`, or all.
        seeds: Seeds.
        twin: Also train the scratch twin of every cell.
        on_cell: Called with (cells done, cells in all, cell, its results) after each.
        on_step: Progress within a cell.

    Returns:
        `rows` (labels, arm, seeds, n_test, metric, value, low, high, seed_means, scores), `differences` to scratch, and the facts.

    Raises:
        RequestError: Recipe, table and weights do not go together; nothing was trained.
        LeakageError: A patient to be scored was pretrained on.
    """
    recipe = load_recipe(recipe, overrides, kind="finetune")
    if not isinstance(recipe, FinetuneTargetsRecipe):
        raise RequestError("this recipe is of no target task; set task: classification or regression")
    pretrained = weights is not None and str(weights) != SCRATCH
    manifest = load_part(weights)[1] if pretrained else None  # type: ignore[arg-type]
    section, forced = section_of(recipe, manifest)
    settings = build.target_settings(recipe)
    shelf = data_sources.fill_shelf(NAME, section)
    cases, series, names = labelled_cases(shelf, recipe)
    arms = arms_of(recipe, weights if pretrained else None, manifest, section, twin)
    dealt = deals(cases, recipe.folds, seeds)
    scored = shelf if recipe.folds else _scored(shelf, cases, series)
    leakage = "no weights" if not pretrained else refuse_pretraining_patients(weights, scored)  # type: ignore[arg-type]
    counts = [recipe.labels or fewest(dealt)] if counts is None else list(counts)
    refuse_counts(dealt, counts)
    out = Path(recipe.out)
    cells = plan(arms, counts, seeds, recipe.folds)
    shared = {
        "kind": "finetune",
        "task": recipe.task,
        "target": recipe.target,
        "folds": recipe.folds,
        "classes": list(cases.classes),
        "cases": _digest(cases, series),
        "settings": json.loads(json.dumps(asdict(replace(settings, device="")))),
        "views": section.views,
        "domain": section.domain.model_dump(),
        "encoder": next(iter(arms.values())).encoder,
        "weights": {name: arm.hash for name, arm in arms.items()},
        "leakage_check": leakage,
        "forced": forced,
    }
    private_folder(out)
    claim(out, shared)
    if names and not recipe.classes:
        keep_names(out, cases.classes, names)
    batches = SourceBatches(shelf, section, settings.augment, series, settings.batch, torch.device(settings.device))
    for number, cell in enumerate(cells, start=1):
        content = read_cell(out / "cells" / cell.name)
        if content is None:
            arm = arms[cell.arm]
            own = dealt[cell.seed, cell.fold]
            result, network = finetune_targets(
                arm.build(cell.seed), batches, own, settings, labels=cell.labels, seed=cell.seed,
                pretrained=arm.weights is not None, arm=cell.arm, on_step=on_step,
            )  # fmt: skip
            content = write_cell(out, cell, result, network, _facts(network, arm, section), cases, series)
        summary = write_summary(out, cells, shared, summarise)
        if on_cell is not None:
            on_cell(number, len(cells), cell, content)
    return summary


def deals(cases: Cases, folds: int | None, seeds: Sequence[int]) -> dict[tuple[int, int | None], Cases]:
    """Return (seed, fold) -> the cases with the splits of that cell, each checked; (seed, None) where the splits are given.

    Raises:
        RequestError: A split cannot be learnt from or scored.
    """
    if folds is None:
        check(cases, cases.where("train"))
        return {(seed, None): cases for seed in seeds}
    found: dict[tuple[int, int | None], Cases] = {(seed, k): deal(cases, folds, seed, k) for seed in seeds for k in range(folds)}
    for one in found.values():
        check(one, one.where("train"))
    return found


def refuse_counts(dealt: Mapping[tuple[int, int | None], Cases], counts: Sequence[int]) -> None:
    """Refuse label counts that a cell could not train with, before any does.

    Raises:
        RequestError: A cell has fewer training cases, or a class is not among the first.
    """
    for (seed, _), cases in dealt.items():
        order = few_label_order(cases, seed)
        for count in counts:
            if count > len(order):
                raise RequestError(f"{count} labels are asked for, and {len(order)} training cases have one; ask for fewer")
            check(cases, order[:count])


def fewest(dealt: Mapping[Any, Cases]) -> int:
    """Return how many training cases every cell has at least."""
    return min(len(cases.where("train")) for cases in dealt.values())


def labelled_cases(shelf: data_sources.Shelf, recipe: FinetuneTargetsRecipe) -> tuple[Cases, dict[int, str], list[str]]:
    """Return the labelled cases of a shelf, numbered in the order of their series ids, number -> series_id, and what the table calls the classes.

    Raises:
        RequestError: The column has one class, or a value that `classes` does not list.
    """
    targets, ids, groups = labelled_rows(shelf, recipe.table, recipe.file_column, recipe.target, recipe.task)
    splits = {row.series_id: row.split for row in shelf.rows}
    if recipe.folds is not None and groups is None:
        _refuse_some_unknown(shelf, set(ids))
    names: list[str] = []
    if recipe.task == "classification":
        names = [str(name) for name in recipe.classes] or encode_classes(targets)[1]
        place = {name: number for number, name in enumerate(names)}
        unlisted = sum(str(target) not in place for target in targets)
        if unlisted:
            raise RequestError(
                f"column {recipe.target}: {unlisted} of {len(targets)} labelled cases have a value that classes does not list; "
                "list it, or empty the cell of a case that is to be left out"
            )
        targets = np.array([place[str(target)] for target in targets])
        found = len(set(targets.tolist()))
        if found < 2:
            raise RequestError(f"column {recipe.target}: {found} class among {len(targets)} labelled cases; it takes two or more")
    public = names if recipe.classes else [f"class_{number}" for number in range(1, len(names) + 1)]
    split = np.array([splits[name] for name in ids])
    cases = Cases(np.arange(len(ids)), np.asarray(targets, dtype=np.float64), groups, split, public)
    known = {row.series_id: row for row in shelf.rows}
    looks = [Look(known[name].spacing_mm, known[name].vendor) for name in ids]
    cases = replace(cases, looks=looks, facts=[group_facts(known[name]) for name in ids])
    return cases, dict(enumerate(ids)), names


def _refuse_some_unknown(shelf: data_sources.Shelf, ids: set[str]) -> None:
    """Refuse folds where some patients are known: dealt by series, theirs would be split."""
    unknown = sum("patient_unknown" in row.quality_flags for row in shelf.rows if row.series_id in ids)
    if unknown < len(ids):
        raise RequestError(
            f"folds: {unknown} of {len(ids)} labelled series have no usable patient identity, so patients cannot be kept together; leave them "
            "out, for instance with source.where=not list_contains(quality_flags, 'patient_unknown')"
        )


def keep_names(out: Path, public: Sequence[Any], names: Sequence[str]) -> None:
    """Write what the table calls the classes, for the owner alone."""
    text = io.StringIO()
    csv.writer(text).writerows([("class", "value"), *zip(public, names)])
    write_private(out / "private" / "classes.csv", text.getvalue().encode())


def _scored(shelf: data_sources.Shelf, cases: Cases, series: Mapping[int, str]) -> data_sources.Shelf:
    """Return the shelf with the rows whose labels choose or score: pretraining may have seen the others."""
    kept = {series[int(number)] for number, split in zip(cases.ids, cases.split) if split in ("val", "test")}
    return replace(shelf, rows=[row for row in shelf.rows if row.series_id in kept])


def section_of(recipe: SourceRecipe, manifest: Mapping[str, Any] | None) -> tuple[SourceSection, list[str]]:
    """Return the source with the views of the weights, and how it differs from them where that was forced.

    Raises:
        RequestError: Views differ from those of the weights and nobody forced it, or there are none.
    """
    assert recipe.source is not None
    if manifest is None:
        if "size" not in recipe.source.views:
            raise RequestError(
                "from scratch the recipe must say what the encoder sees: source.views.size and source.views.normalize"
            )
        return recipe.source, []
    section = evaluation_section(recipe, manifest)
    differ = []
    known = {"normalize": manifest["intensity"]["normalize"]}
    if manifest.get("spacing_source") == "views":
        known["spacing_mm"] = manifest["spacing_mm"]
    for key, value in known.items():
        given = section.views.get(key)
        if json.dumps(given, default=list) != json.dumps(value, default=list):
            differ.append(f"{key} is {given}, the weights were pretrained with {value}")
    if differ and not recipe.force:
        raise RequestError(
            "source.views: " + "; ".join(differ) + "; features would meet other images than they know: leave it out of the recipe, "
            "or set force: true, which the result will say"
        )
    return section, differ


def arms_of(
    recipe: SourceRecipe,
    weights: Path | str | None,
    manifest: Mapping[str, Any] | None,
    section: SourceSection,
    twin: bool,
) -> dict[str, Arm]:
    """Return the arms by name: `pretrained` where there are weights, and `scratch`.

    Raises:
        RequestError: There are no weights, and the recipe names no encoder.
    """
    if manifest is None or weights is None:
        if not recipe.encoder:
            raise RequestError(
                "from scratch the recipe must name an encoder: encoder: {name: ..., ...}; weights would bring their own"
            )
        args = {key: value for key, value in recipe.encoder.items() if key != "name"}
        return {SCRATCH: Arm({"name": recipe.encoder["name"], "args": args}, None, None)}
    if chosen := manifest.get("chosen_by"):
        raise RequestError(
            f"these weights were chosen by {chosen['labels']} labelled items ({chosen['metric']}), which lie in no budget of labels; give the "
            "run folder itself, which means weights/last"
        )
    encoder = {"name": manifest["encoder"]["name"], "args": dict(manifest["encoder"]["args"])}
    if "image_size" in encoder["args"] and section.views.get("kind", "volume") == "volume":
        encoder["args"]["image_size"] = data_sources.make_views(section.views).size
    arms = {"pretrained": Arm(encoder, Path(weights), str(manifest["weights_hash"]))}
    return {**arms, SCRATCH: Arm(encoder, None, None)} if twin else arms


def _digest(cases: Cases, series: Mapping[int, str]) -> str:
    rows = sorted((series[int(n)], float(t), str(s)) for n, t, s in zip(cases.ids, cases.targets, cases.split))
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def claim(out: Path, shared: Mapping[str, Any]) -> None:
    """Write what the cells of a folder have in common, or check it against what is there.

    Raises:
        RequestError: The folder holds cells of something else.
    """
    path = out / "target_curve.json"
    if path.is_file():
        known = json.loads(path.read_text())
        same = json.loads(json.dumps(shared))
        changed = [key for key in same if key not in ("weights", "leakage_check") and known.get(key) != same[key]]
        changed += [f"weights of arm {a}" for a, h in same["weights"].items() if a in known["weights"] and known["weights"][a] != h]
        if changed:
            raise RequestError(
                f"{out} holds cells computed with other {', '.join(changed)}; cells of one folder share everything but labels, seed and "
                "arm; choose another folder, or remove this one"
            )
        shared = {**shared, "weights": {**known["weights"], **shared["weights"]}}
    write_atomic(path, json.dumps(shared, indent=1).encode())


def read_cell(folder: Path) -> dict[str, Any] | None:
    """Return the results of a finished cell; None when it was not started, or cut short."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write_cell(
    out: Path,
    cell: Cell,
    result: TargetResult,
    network: Classifier,
    facts: Mapping[str, Any],
    cases: Cases,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Write network and results of a cell; the results come last and say that it is done.

    Args:
        out: Folder of all cells.
        cell: The cell.
        result: Its results.
        network: The state that was scored.
        facts: What the manifest says of encoder, views and weights.
        cases: The cases.
        names: Number of a case -> what results call it.
    """
    folder = out / "cells" / cell.name
    row_of = {int(number): row for row, number in enumerate(cases.ids)}
    content = {**asdict(result), "fold": cell.fold, "of_folds": cell.folds}
    for case in content["cases"]:
        number = case.pop("id")
        case["series_id"] = names[number]
        case["patient_id"] = None if cases.groups is None else cases.groups[row_of[number]]
    content |= {"when": now(), **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")}}
    content = json.loads(json.dumps(content, default=str))
    head = {"name": result.settings["head"], "classes": content["classes"], "fitted": result.fitted}
    save_part(folder, "network", network.state_dict(), {"library": "medssl", **facts, "head": head, "task": result.task})
    write_atomic(folder / "results.json", json.dumps(content, indent=1, allow_nan=False).encode())
    return dict(content)


def _facts(network: Classifier, arm: Arm, section: SourceSection) -> dict[str, Any]:
    axes = {"image": "HW", "clip": "THW"}.get(str(section.views.get("kind", "volume")), "XYZ-RAS")
    channels = getattr(network.encoder, "in_channels", 1)
    return {"encoder": arm.encoder, "views": section.views, "pretrained": arm.hash, "axis_order": axes, "channels": channels}


def write_summary(
    out: Path, cells: Sequence[Cell], shared: Mapping[str, Any], summarised: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """Summarise the finished cells of a plan, by `summarised`, into `summary.json` and `table.md`."""
    done = [content for cell in cells if (content := read_cell(out / "cells" / cell.name)) is not None]
    summary = summarised(done)
    summary["cells"] = {"planned": len(cells), "done": len(done)}
    summary["shared"] = dict(shared)
    write_atomic(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    write_atomic(out / "table.md", (markdown(summary) + "\n").encode())
    return summary


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the main score with its interval per (labels, arm), the mean of all scores, and paired differences to scratch.

    The main score is the AUC, or the mean absolute error; of several seeds it is the mean, and intervals draw patients again with all seeds
    at once: they say how far the mean could move with other patients, not with other seeds, whose scores are given beside it.
    """
    results = pool_folds(results) if results else []
    if not results:
        return {"metric": "", "rows": [], "differences": []}
    classes = results[0]["task"] == "classification"
    metric, statistic = ("auroc", _mean_of_seeds(mean_auc)) if classes else ("mae", _mean_of_seeds(mae))
    rows, differences = [], []
    for labels in sorted({result["labels"] for result in results}):
        groups: dict[str, dict[int, Mapping[str, Any]]] = {}
        for result in results:
            if result["labels"] == labels:
                groups.setdefault(result["arm"], {})[result["seed"]] = result
        for arm, by_seed in groups.items():
            table, patients = score_table([by_seed[seed] for seed in sorted(by_seed)])
            value, low, high = bootstrap_interval(table, patients, statistic=statistic)
            scores: dict[str, list[float]] = {}
            for seed in sorted(by_seed):
                for row in by_seed[seed]["rows"]:
                    if row["value"] is not None:
                        scores.setdefault(row["metric"], []).append(row["value"])
            rows.append(
                {"labels": labels, "arm": arm, "seeds": sorted(by_seed), "n_test": len(table), "metric": metric, "value": value}
                | {
                    "low": _finite(low),
                    "high": _finite(high),
                    "seed_means": [float(statistic(table[:, [k]])) for k in range(table.shape[1])],
                }
                | {"scores": {name: float(np.mean(values)) for name, values in scores.items()}}
                | {"seconds": float(np.mean([result["seconds"]["train"] for result in by_seed.values()]))}
            )
        for arm, by_seed in groups.items():
            common = sorted(set(by_seed) & set(groups.get(SCRATCH, {})))
            if arm == SCRATCH or not common:
                continue
            ours, patients = score_table([by_seed[seed] for seed in common])
            theirs, _ = score_table([groups[SCRATCH][seed] for seed in common])
            value, low, high = paired_bootstrap(ours, theirs, patients, statistic=statistic)
            differences.append(
                {"labels": labels, "arm": arm, "against": SCRATCH, "seeds": common, "difference": value}
                | {"low": _finite(low), "high": _finite(high), "better": "higher" if classes else "lower"}
            )
    return {"metric": metric, "rows": rows, "differences": differences}


def score_table(runs: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[str] | None]:
    """Return (N, S, 1 + K): target and probabilities (or prediction) of every test case and seed, and the patients.

    Raises:
        RequestError: The runs were scored on different cases.
    """
    order = [case["series_id"] for case in runs[0]["cases"]]
    columns = []
    for run in runs:
        by_id = {case["series_id"]: case for case in run["cases"]}
        if set(by_id) != set(order):
            raise RequestError(
                "cells were scored on different test cases; one table needs the same; remove the cells and run again"
            )
        columns.append([[by_id[n]["target"], *(by_id[n].get("probability") or [by_id[n]["prediction"]])] for n in order])
    patients = [case["patient_id"] for case in runs[0]["cases"]]
    table: np.ndarray = np.array(columns, dtype=np.float64).transpose(1, 0, 2)
    return table, None if None in patients else patients


def _mean_of_seeds(statistic: Statistic) -> Statistic:
    return lambda rows: float(np.mean([statistic(rows[:, seed]) for seed in range(rows.shape[1])]))


def markdown(summary: Mapping[str, Any]) -> str:
    """Render a summary as two Markdown tables."""
    lines = [f"| labels | arm | {summary['metric']} (95 % interval) | per seed | others |", "|---|---|---|---|---|"]
    for row in summary["rows"]:
        others = ", ".join(f"{name} {value:.3f}" for name, value in row["scores"].items() if name != summary["metric"])
        seeds = ", ".join(f"{value:.3f}" for value in row["seed_means"])
        lines.append(f"| {row['labels']} | {row['arm']} | {row['value']:.3f} ({_span(row)}) | {seeds} | {others} |")
    if summary["differences"]:
        lines += ["", "| labels | difference (95 % interval) | better |", "|---|---|---|"]
    for row in summary["differences"]:
        lines.append(
            f"| {row['labels']} | {row['arm']} - {row['against']} {row['difference']:+.3f} ({_span(row)}) | {row['better']} |"
        )
    return "\n".join(lines)


def _span(row: Mapping[str, Any]) -> str:
    return "-" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
