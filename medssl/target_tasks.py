"""Fine-tuning for one label per case, a class or a number, from an index and a table: the road around `evaluation.finetune_targets`.

What a folder holds, and what all roads share, is in `finetune_cells`. A column of labels may hold anything, patients too; so its values reach
no artefact and no error unless the recipe lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl import build, data_sources, label_tables
from medssl.archive.table import group_facts
from medssl.errors import RequestError
from medssl.evaluation.finetune_targets import Classifier, Images, TargetResult, finetune_targets, start
from medssl.evaluation.label_curve import Cell
from medssl.evaluation.outside import Look
from medssl.evaluation.scores import encode_classes
from medssl.evaluation.target_cases import Cases, training_rows
from medssl.evaluation.target_summary import summarise
from medssl.finetune_cells import Arm, OnStep, keep_names, refuse_some_unknown, same_settings, write_cell
from medssl.leakage import refuse_pretraining_patients
from medssl.probe_tasks import labelled_rows, refuse_size
from medssl.recipe import FinetuneTargetsRecipe, SourceSection

NAME = "source"


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
        self._draws = data_sources.LabelledDraws(self.shelf, self.section, self.augment, self.series)

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Images, Sequence[int]]:
        """Draw a batch of `ids` with augmentation, a function of (ids, step, seed)."""
        views, name = self._draws.batch(ids, step, seed, batch, self.device)
        return data_sources.first_view(views, name), views.meta.ids.tolist()

    def plain(self, ids: Sequence[int]) -> Iterable[tuple[Images, Sequence[int]]]:
        """Show the middle of each case."""
        source = data_sources.evaluation_source(self.shelf.name, self.shelf, self.section, [self.series[n] for n in ids])
        for images, places in data_sources.images_and_ids(source, self.device, self.batch):
            yield images, [ids[place] for place in places]


class TargetRoad:
    """The road of one label per case; see `finetune_cells.Road`.

    Args:
        recipe: The recipe.
        section: Its source, with the views of the weights.
        weights: Where they lie; None is from scratch.

    Raises:
        RequestError: Source, table and settings do not go together.
        LeakageError: A patient to be scored was pretrained on.
    """

    def __init__(self, recipe: FinetuneTargetsRecipe, section: SourceSection, weights: Path | str | None) -> None:
        self.recipe, self.section = recipe, section
        self.settings = build.target_settings(recipe)
        label_tables.check_table(recipe.table, recipe.file_column, recipe.target)
        self.shelf = data_sources.fill_shelf(NAME, section)
        self.cases, self.series, self.names = labelled_cases(self.shelf, recipe)
        scored = self.shelf if recipe.folds else _scored(self.shelf, self.cases, self.series)
        self.leakage = "no weights" if weights is None else refuse_pretraining_patients(weights, scored)
        device = torch.device(self.settings.device)
        self.batches = SourceBatches(self.shelf, section, self.settings.augment, self.series, self.settings.batch, device)

    def training_rows(self, cases: Cases, labels: int | None, seed: int) -> np.ndarray:
        """Return the rows of the first training cases."""
        return training_rows(cases, labels, seed)

    def refuse(self, arms: Mapping[str, Arm], cell: Cell, cases: Cases) -> None:
        """Refuse settings that do not go with cases and images, and a size that the encoder does not take; a head fits every encoder."""
        refuse_size(next(iter(arms.values())).encoder, self.section.views)
        start(self.batches, cases, self.settings, labels=cell.labels, seed=cell.seed)

    def facts(self) -> dict[str, Any]:
        """Return what the cells share."""
        return {
            "target": self.recipe.target,
            "cases": _digest(self.cases, self.series),
            "settings": same_settings(asdict(self.settings)),
            "domain": self.section.domain.model_dump(),
            "sampler": self.section.sampler.model_dump(),
            "leakage_check": self.leakage,
        }

    def keep(self, out: Path) -> None:
        """Write what the table calls the classes."""
        if self.names and not self.recipe.classes:
            keep_names(out, self.cases.classes, self.names)

    def compute(self, folder: Path, cell: Cell, arm: Arm, cases: Cases, on_step: OnStep | None) -> dict[str, Any]:
        """Train and score a cell."""
        result, network = finetune_targets(
            arm.build(cell.seed), self.batches, cases, self.settings, labels=cell.labels, seed=cell.seed,
            pretrained=arm.weights is not None, arm=cell.arm, on_step=on_step,
        )  # fmt: skip
        return write_targets(folder, cell, result, network, _facts(network, arm, self.section), self.cases, self.series)

    def summarise(self, results: Sequence[Mapping[str, Any]], last: bool) -> dict[str, Any]:
        """Return the table of finished cells."""
        return summarise(results)


def labelled_cases(shelf: data_sources.Shelf, recipe: FinetuneTargetsRecipe) -> tuple[Cases, dict[int, str], list[str]]:
    """Return the labelled cases of a shelf, numbered in the order of their series ids, number -> series_id, and what the table calls the classes.

    Raises:
        RequestError: The column has one class, or a value that `classes` does not list.
    """
    targets, ids, groups = labelled_rows(shelf, recipe.table, recipe.file_column, recipe.target, recipe.task)
    splits = {row.series_id: row.split for row in shelf.rows}
    if recipe.folds is not None:
        labelled = set(ids)
        refuse_some_unknown([row for row in shelf.rows if row.series_id in labelled])
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


def _scored(shelf: data_sources.Shelf, cases: Cases, series: Mapping[int, str]) -> data_sources.Shelf:
    """Return the shelf with the rows whose labels choose or score: pretraining may have seen the others."""
    kept = {series[int(number)] for number, split in zip(cases.ids, cases.split) if split in ("val", "test")}
    return replace(shelf, rows=[row for row in shelf.rows if row.series_id in kept])


def _digest(cases: Cases, series: Mapping[int, str]) -> str:
    rows = sorted((series[int(n)], float(t), str(s)) for n, t, s in zip(cases.ids, cases.targets, cases.split))
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def write_targets(
    folder: Path,
    cell: Cell,
    result: TargetResult,
    network: Classifier,
    facts: Mapping[str, Any],
    cases: Cases,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Write network and results of a cell, see `finetune_cells.write_cell`.

    Args:
        folder: Of the cell.
        cell: The cell.
        result: Its results.
        network: The state that was scored.
        facts: What the manifest says of encoder, views and weights.
        cases: The cases.
        names: Number of a case -> what results call it.
    """
    row_of = {int(number): row for row, number in enumerate(cases.ids)}
    content = asdict(result)
    for case in content["cases"]:
        number = case.pop("id")
        case["series_id"] = names[number]
        case["patient_id"] = None if cases.groups is None else cases.groups[row_of[number]]
    head = {"name": result.settings["head"], "classes": content["classes"], "fitted": result.fitted}
    return write_cell(folder, content, cell, (network, {"library": "medssl", **facts, "head": head, "task": result.task}))


def _facts(network: Classifier, arm: Arm, section: SourceSection) -> dict[str, Any]:
    axes = {"image": "HW", "clip": "THW"}.get(str(section.views.get("kind", "volume")), "XYZ-RAS")
    channels = getattr(network.encoder, "in_channels", 1)
    facts = {"encoder": arm.encoder, "views": section.views, "pretrained": arm.hash, "forced": list(arm.forced)}
    return {**facts, "axis_order": axes, "channels": channels}
