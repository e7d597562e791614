"""Fine-tuning to find boxes: the road around `evaluation.finetune_boxes`, from pictures of an index or volumes of a labelled cohort.

What a folder holds, and what all roads share, is in `finetune_cells`; where images and boxes come from in `box_pictures` and `box_volumes`.
Besides that:

out/cells/<cell>/figures/worst.npz  the worst test cases, as pictures with their boxes (`settings.figures`)
out/private/cases.csv, structures.csv   of a cohort: which file a case is, and what its files call structures that it does not list
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from medssl import build, data_sources
from medssl.box_pictures import PictureBatches, picture_source
from medssl.box_volumes import volume_source
from medssl.evaluation.box_cases import BoxCases, training_rows
from medssl.evaluation.box_summary import summarise
from medssl.evaluation.finetune_boxes import ENCODER, BoxResult, finetune_boxes, start
from medssl.evaluation.label_curve import Cell
from medssl.evaluation.worst_boxes import worst_npz
from medssl.finetune_cells import Arm, OnStep, keep_names, same_settings, write_cell
from medssl.recipe import FinetuneBoxesRecipe, SourceSection
from medssl.weights import write_atomic


class BoxRoad:
    """The road of detection; see `finetune_cells.Road`.

    Args:
        recipe: The recipe.
        section: Its source or cohort, with the views of the weights.
        weights: Where they lie; None is from scratch.

    Raises:
        RequestError: Images, boxes and settings do not go together.
        LeakageError: A patient or image to be scored was pretrained on.
    """

    def __init__(self, recipe: FinetuneBoxesRecipe, section: SourceSection, weights: Path | str | None) -> None:
        self.section, self.settings = section, build.box_settings(recipe)
        open_source = volume_source if recipe.source is None else picture_source
        self.source = open_source(recipe, section, self.settings, weights)

    @property
    def cases(self) -> BoxCases:
        """All labelled cases."""
        return self.source.cases

    def training_rows(self, cases: BoxCases, labels: int | None, seed: int) -> np.ndarray:
        """Return the rows of the first training cases."""
        return training_rows(cases, labels, seed)

    def refuse(self, arms: Mapping[str, Arm], cell: Cell, cases: BoxCases) -> None:
        """Refuse images of other channels than the encoder takes, and a detector that does not fit it."""
        encoder, batches = next(iter(arms.values())).build(0), self.source.batches
        if isinstance(batches, PictureBatches):
            data_sources.check_items(batches.shelf, self.section, [encoder])
        start(encoder, batches.size, cases, self.settings, labels=cell.labels, seed=cell.seed)

    def facts(self) -> dict[str, Any]:
        """Return what the cells share."""
        return {
            "cases": self.source.digest(),
            "boxes": dict(self.source.counts),
            "settings": same_settings(asdict(self.settings), ("figures",)),
            "leakage_check": self.source.leakage,
            **self.source.facts,
        }

    def keep(self, out: Path) -> None:
        """Write what classes, cases and structures are called in the files."""
        if self.source.file_names:
            keep_names(out, self.cases.classes, self.source.file_names)
        self.source.write_names(out)

    def compute(self, folder: Path, cell: Cell, arm: Arm, cases: BoxCases, on_step: OnStep | None) -> dict[str, Any]:
        """Train and score a cell."""
        result, network = finetune_boxes(
            arm.build(cell.seed), self.source.batches, cases, self.settings, labels=cell.labels, seed=cell.seed,
            pretrained=arm.weights is not None, arm=cell.arm, on_step=on_step,
        )  # fmt: skip
        content = json.loads(json.dumps(asdict(result), default=str))
        place = {self.source.names[case["id"]]: case["id"] for case in content["cases"]}
        for case in content["cases"]:
            number = case.pop("id")
            case |= {self.source.name_key: self.source.names[number], "patient_id": self.source.patients[number]}
        if self.settings.figures:
            pictures = worst_npz(content, lambda name: self.source.batches.whole(place[name]), self.settings.figures)
            write_atomic(folder / "figures" / "worst.npz", pictures)
        return write_cell(folder, content, cell, (network, self._manifest(result, network, arm)))

    def _manifest(self, result: BoxResult, network: nn.Module, arm: Arm) -> dict[str, Any]:
        encoder: Any = network.get_submodule(ENCODER)
        size = self.source.batches.size
        return {
            "encoder": arm.encoder,
            "channels": int(encoder.in_channels),
            "axis_order": "HW" if len(size) == 2 else "XYZ-RAS",
            "detector": json.loads(json.dumps(result.settings["detector"])),
            "classes": list(result.classes),
            "library": "monai.RetinaNet",
            "image_size": list(size),
            "task": result.task,
            "views": self.section.views,
            "pretrained": arm.hash,
            "forced": list(arm.forced),
        }

    def summarise(self, results: Sequence[Mapping[str, Any]], last: bool) -> dict[str, Any]:
        """Return the table of finished cells; intervals come with the last."""
        return summarise(results, intervals=last)
