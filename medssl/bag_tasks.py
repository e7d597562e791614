"""Fine-tuning a head on bags of tile features, one label a slide: the road around `evaluation.bags`.

out/                               as `finetune_cells` leaves it; cases are called slide0001, ... in the order of the table
out/private/slides.csv             what these are called in the table
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from medssl import build
from medssl.errors import RequestError
from medssl.evaluation.bags import BagBatches, BagEncoder, LabelledBags, case_name, labelled_bags
from medssl.evaluation.finetune_targets import finetune_targets, start
from medssl.evaluation.folds import deals, fewest, refuse_counts
from medssl.evaluation.label_curve import Cell, folder_key, plan
from medssl.evaluation.target_cases import training_rows
from medssl.evaluation.target_summary import summarise
from medssl.finetune_cells import OnCell, OnStep, claim, fill, keep_names, same_settings
from medssl.recipe import FinetuneBagsRecipe
from medssl.target_tasks import write_targets
from medssl.weights import private_folder, write_private

ARM = "features"


def bag_curve(
    recipe: FinetuneBagsRecipe,
    *,
    counts: Sequence[int] | None,
    seeds: Sequence[int],
    on_cell: OnCell | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Compute the cells (labels x seed) that are missing, then summarise.

    Args:
        recipe: The recipe.
        counts: Numbers of labelled training slides; None takes the recipe's `labels`, or all.
        seeds: Seeds.
        on_cell: Called with (cells done, cells in all, cell, its results) after each.
        on_step: Progress within a cell.

    Returns:
        As `finetune_cells.source_curve`; the only arm is `features`.

    Raises:
        RequestError: Table and features do not go together; nothing was trained.
    """
    settings = build.target_settings(recipe)
    found = labelled_bags(
        Path(recipe.bags.folder), Path(recipe.table), task=recipe.task, target=recipe.target, classes=[str(c) for c in recipe.classes],
        file_column=recipe.file_column, split_column=recipe.bags.split_column, patient_column=recipe.bags.patient_column,
    )  # fmt: skip
    cases = found.cases
    dealt = deals(cases, recipe.folds, seeds, training_rows)
    counts = [recipe.labels or fewest(dealt)] if counts is None else list(counts)
    refuse_counts(dealt, counts, training_rows)
    out = Path(recipe.out)
    names = {number: case_name(number) for number in found.files}
    cells = plan({ARM: None}, counts, seeds, recipe.folds)
    batches = BagBatches(found.files, recipe.bags.tokens, torch.device(settings.device))
    start(batches, dealt[cells[0].seed, cells[0].fold], settings, labels=cells[0].labels, seed=cells[0].seed)
    shared = {
        "kind": "finetune",
        "task": recipe.task,
        "target": recipe.target,
        "folds": recipe.folds,
        "classes": list(cases.classes),
        "cases": "",
        "settings": same_settings(asdict(settings)),
        "views": {"kind": "bag", "tokens": recipe.bags.tokens},
        "encoder": {"name": found.made_by or "not stated", "width": found.dim},
        "weights": {ARM: None},
        "without_features": found.without_features,
        "leakage_check": "not possible: feature files do not say which slides their encoder was pretrained on",
        "forced": [],
    }
    private_folder(out)
    shared["cases"] = _digest(found, folder_key(out / "private" / "cohort.key"))
    claim(out, shared)
    _keep_slides(out, found, names)
    if found.values and not recipe.classes:
        keep_names(out, cases.classes, found.values)

    def compute(folder: Path, cell: Cell) -> dict[str, Any]:
        result, network = finetune_targets(
            BagEncoder(found.dim), batches, dealt[cell.seed, cell.fold], settings, labels=cell.labels, seed=cell.seed,
            pretrained=True, arm=ARM, on_step=on_step,
        )  # fmt: skip
        facts = {"encoder": {"name": "bag", "args": {"dim": found.dim}}, "views": shared["views"], "made_by": found.made_by}
        facts |= {"axis_order": "none: features", "channels": found.dim}
        return write_targets(folder, cell, result, network, facts, cases, names)

    return fill(out, cells, shared, compute, lambda results, _: summarise(results), on_cell)


def _keep_slides(out: Path, found: LabelledBags, names: dict[int, str]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("case", "file"), *((name, found.files[number].name) for number, name in names.items())])
    write_private(out / "private" / "slides.csv", text.getvalue().encode())


def _digest(found: LabelledBags, key: bytes) -> str:
    """Tell one set of labelled features from another; of no use to whoever does not have the key."""
    cases = found.cases
    digest = hashlib.blake2b(key=key, digest_size=16)
    digest.update(json.dumps([cases.targets.tolist(), cases.split.tolist(), cases.groups, found.dim]).encode())
    for path in found.files.values():
        digest.update(path.name.encode() + _ends(path))
    return digest.hexdigest()


def _ends(path: Path, count: int = 1 << 16) -> bytes:
    """Return size, beginning and end of a file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        begin = stream.read(count)
        stream.seek(max(0, size - count))
        return str(size).encode() + begin + stream.read(count)


def refuse_weights(weights: Any) -> None:
    """Refuse weights: the features were made by an encoder already.

    Raises:
        RequestError: There are weights.
    """
    if weights is not None and str(weights) != "scratch":
        raise RequestError(
            "bags hold features that an encoder made before; leave --weights out, and name what made them in the files"
        )
