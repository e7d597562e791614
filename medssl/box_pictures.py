"""Pictures of an index with boxes from a file: joined by path or name, shown as pretraining shows them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl import data_sources
from medssl.archive.table import SeriesRow, group_facts
from medssl.errors import RequestError
from medssl.evaluation.box_cases import BoxCases, BoxSource, WholeCase, present_of, target_of
from medssl.evaluation.boxes import BoxTable, PictureBoxes, read_boxes
from medssl.evaluation.finetune_boxes import BoxSettings
from medssl.evaluation.outside import Look
from medssl.finetune_cells import refuse_some_unknown
from medssl.leakage import refuse_pretraining_patients
from medssl.recipe import FinetuneBoxesRecipe, SourceSection
from medssl.types import DrawKey

NAME = "source"


@dataclass
class PictureBatches:
    """Pictures of an index with their boxes, from the store, as pretraining shows them.

    Args:
        shelf: The cached series.
        section: Their source, with the views of the weights.
        augment: What is added to the views in training.
        series: id -> series_id.
        boxes: id -> boxes.
        device: Where views are made.
    """

    shelf: data_sources.Shelf
    section: SourceSection
    augment: Mapping[str, Any]
    series: Mapping[int, str]
    boxes: Mapping[int, PictureBoxes]
    device: torch.device

    def __post_init__(self) -> None:
        self._draws = data_sources.LabelledDraws(self.shelf, self.section, self.augment, self.series)

    @property
    def size(self) -> tuple[int, ...]:
        """Size (H, W) of the views."""
        return tuple(data_sources.make_views(self.section.views).size)

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Draw a batch of `ids` with augmentation, a function of (ids, step, seed); boxes follow the views."""
        views, name = self._draws.batch(ids, step, seed, batch, self.device)
        maps = views[f"{name}_map"][:, 0].double().cpu().numpy()
        targets = []
        for number, shown in zip(views.meta.ids.tolist(), maps):
            own = self.boxes[number]
            corners = in_view(own.boxes, shown, self.shape(number), self.size)
            targets.append(target_of(corners, own.labels, own.ignore, self.size, self.device))
        return views[name][:, 0], targets

    def whole(self, number: int) -> WholeCase:
        """Return a whole picture, resized to the views."""
        source = data_sources.evaluation_source(self.shelf.name, self.shelf, self.section, [self.series[number]])
        views = source.views(source.fetch([DrawKey(0, 0, 0)]), self.device)
        name = source.view_maker.name
        shown = views[f"{name}_map"][0, 0].double().cpu().numpy() * np.array(self.shape(number), dtype=np.float64)[:, None]
        offset = shown @ np.array([-1.0, -1.0, 1.0])
        scale = (shown @ np.array([1.0, 1.0, 1.0]) - offset) / np.array(self.size)
        own = self.boxes[number]
        return WholeCase(views[name][0], scale, offset, own.boxes, own.labels, own.ignore, region=own.region)

    def shape(self, number: int) -> tuple[int, int]:
        """Return (rows, columns) of a picture."""
        rows, columns = self.shelf.reader.record(self.series[number]).shape[-2:]
        return int(rows), int(columns)


def in_view(boxes: np.ndarray, shown: np.ndarray, shape: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Return boxes of a picture as boxes of a view, around their four corners where it is turned.

    Args:
        boxes: (N, 4) in pixels of the picture.
        shown: (2, 3) map of the view: row and column in the picture, 0 to 1, of a point (x, y, 1) of the view, -1 to 1.
        shape: (rows, columns) of the picture.
        size: (H, W) of the view.
    """
    matrix = shown * np.asarray(shape, dtype=np.float64)[:, None]
    inverse = np.linalg.inv(matrix[:, :2])
    corners = np.stack([boxes[:, [row, column]] for row in (0, 2) for column in (1, 3)], axis=1)  # (N, 4 corners, row and column)
    x_y = (corners - matrix[:, 2]) @ inverse.T
    pixels = (x_y[..., ::-1] + 1) / 2 * np.asarray(size, dtype=np.float64)
    return np.concatenate([pixels.min(axis=1), pixels.max(axis=1)], axis=1)


def picture_source(
    recipe: FinetuneBoxesRecipe, section: SourceSection, settings: BoxSettings, weights: Path | str | None
) -> BoxSource:
    """Join boxes to the pictures of an index, by file name."""
    assert recipe.boxes is not None
    table = read_boxes(recipe.boxes.path, classes=recipe.boxes.classes, drop_empty=recipe.boxes.drop_empty)
    shelf = data_sources.fill_shelf(NAME, section)
    listed = listed_pictures(shelf, table)
    found = []
    for row, name in listed:
        boxes = table.of(name, shelf.reader.record(row.series_id).shape[-2:])
        assert boxes is not None
        found.append((row, boxes))
    if not found:
        raise RequestError(
            f"none of the {len(shelf.rows)} selected pictures is listed in {table.path.name}; names are compared with the image file's path, "
            "then with its name"
        )
    table.counts["unmatched"] = len(table.pictures) - len(found)
    named = recipe.boxes.classes is not None
    if recipe.folds is not None:
        refuse_some_unknown([row for row, _ in found])
    known = not any("patient_unknown" in row.quality_flags for row, _ in found)
    cases = BoxCases(
        ids=np.arange(len(found)),
        split=np.array([row.split for row, _ in found]),
        groups=[row.patient_id for row, _ in found] if known else None,
        classes=table.classes if named else tuple(f"class_{k}" for k in range(1, len(table.classes) + 1)),
        present=present_of([(boxes.labels, boxes.ignore) for _, boxes in found], len(table.classes)),
        looks=[Look(row.spacing_mm, row.vendor) for row, _ in found],
        facts=[group_facts(row) for row, _ in found],
    )
    leakage = "no weights"
    if weights is not None:
        scored = {row.series_id for row, _ in found if recipe.folds is not None or row.split in ("val", "test")}
        leakage = refuse_pretraining_patients(weights, replace(shelf, rows=[row for row in shelf.rows if row.series_id in scored]))
    series = {number: row.series_id for number, (row, _) in enumerate(found)}
    rows = sorted(
        (row.series_id, row.split, *(part.tolist() for part in (boxes.boxes, boxes.labels, boxes.ignore, boxes.region)))
        for row, boxes in found
    )
    return BoxSource(
        cases,
        PictureBatches(
            shelf,
            section,
            settings.augment,
            series,
            {n: boxes for n, (_, boxes) in enumerate(found)},
            torch.device(settings.device),
        ),
        series,
        {number: row.patient_id if known else None for number, (row, _) in enumerate(found)},
        table.counts,
        lambda: hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest(),
        leakage,
        "series_id",
        {"domain": section.domain.model_dump(), "sampler": section.sampler.model_dump()},
        file_names=() if named else table.classes,
    )


def listed_pictures(shelf: data_sources.Shelf, table: BoxTable) -> list[tuple[SeriesRow, str]]:
    """Return the selected pictures that a file of boxes lists, each with its name there.

    Raises:
        RequestError: Which of several files a name means cannot be told, or one is a volume or a cine.
    """
    known = shelf.archive.first_paths()  # of all series: a name is not unique because a selection left the others out
    own = {row.series_id: row for row in shelf.rows}
    names = table.names_of(list(known.values()), [series in own for series in known])
    found = [(own[series], name) for series, name in zip(known, names) if name is not None and series in own]
    others = Counter(row.kind for row, _ in found if row.kind != "image")
    if others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        raise RequestError(
            f"{table.path.name} lists selected series that are no pictures ({kinds}), and its boxes would be those of one frame; add kind = "
            "'image' to source.where"
        )
    double = sum(n for n in Counter(name for _, name in found).values() if n > 1)
    if double:
        raise RequestError(
            f"{double} of the {len(found)} selected pictures that {table.path.name} lists share a file name with another, and nothing tells "
            "which one is meant; write paths that end as those of the image files do, or relative to the table, narrow source.where to one "
            "folder, or rename the files and index them again"
        )
    return found
