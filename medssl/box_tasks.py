"""Fine-tuning to find boxes: the road around `evaluation.finetune_boxes`, from pictures of an index or volumes of a labelled cohort.

out/target_curve.json              what the cells have in common; a folder never mixes two settings
out/cells/<arm>_n<labels>_s<seed>/ results.json (last: it says that the cell is done), network.safetensors with its manifest
out/summary.json, out/table.md     rewritten after every cell; intervals come with the last
out/private/cases.csv, structures.csv   of a cohort: which file a case is, and what its files call structures that it does not list
out/private/classes.csv            what class_1, class_2, ... are called in the file of boxes, where the recipe does not list them
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl import build, data_sources
from medssl.archive.table import SeriesRow
from medssl.build import load_recipe
from medssl.cards.named import card_facts
from medssl.cards.schema import find_card, load_card
from medssl.errors import RequestError
from medssl.evaluation.bootstrap import Statistic, bootstrap_interval
from medssl.evaluation.boxes import BoxTable, PictureBoxes, read_boxes
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.detection import Matches, match_classes, mean_average_precision, over_images
from medssl.evaluation.finetune import structures_of
from medssl.evaluation.finetune_boxes import (
    ENCODER,
    BoxCases,
    BoxResult,
    BoxSettings,
    WholeCase,
    finetune_boxes,
    image_boxes,
    start,
    training_rows,
)
from medssl.evaluation.label_curve import SCRATCH, Cell, folder_key, plan
from medssl.evaluation.segmentation_results import write_case_names, write_label_counts
from medssl.evaluation.volume_boxes import VolumeBoxes, extent, volume_boxes
from medssl.evaluation.volumes import CaseReader, TrainingCrops, Volume, known_values, whole_image
from medssl.leakage import refuse_pretraining_images, refuse_pretraining_patients
from medssl.recipe import FinetuneBoxesRecipe, SourceSection
from medssl.sampling.items import Item
from medssl.seeding import counter_rng
from medssl.target_tasks import Arm, arms_of, claim, keep_names, read_cell, section_of, write_summary
from medssl.training.run_folder import facts_of_machine, now
from medssl.types import DrawKey
from medssl.weights import load_part, private_folder, save_part, write_atomic

NAME = "source"
SHOWN = 0.3
"""An object of which a training view shows less than this share counts neither way there: nobody could tell what it is."""
OnCell = Callable[[int, int, Cell, dict[str, Any]], None]
OnStep = Callable[[int, int, Mapping[str, float]], None]


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
    _drawn: tuple[tuple[int, ...], Any] | None = field(default=None, repr=False)

    @property
    def size(self) -> tuple[int, ...]:
        """Size (H, W) of the views."""
        return tuple(data_sources.make_views(self.section.views).size)

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Draw a batch of `ids` with augmentation, a function of (ids, step, seed); boxes follow the views."""
        wanted = tuple(ids)
        if self._drawn is None or self._drawn[0] != wanted:
            items = [Item(number, self.shelf.name, "", self.series[number], "", "train") for number in ids]
            section = self.section.model_copy(update={"views": {**self.section.views, **self.augment}})
            self._drawn = (wanted, data_sources.training_source(self.shelf, section, items, batch))
        source = self._drawn[1]
        views = source.views(source.fetch([DrawKey(seed, step, place) for place in range(batch)]), self.device)
        name = source.view_maker.name
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


def target_of(
    boxes: np.ndarray, labels: np.ndarray, ignore: np.ndarray, size: Sequence[int], device: torch.device
) -> dict[str, Tensor]:
    """Return boxes of a view, clipped to it, as a detector takes them; what is mostly outside counts neither way."""
    limit = np.array([*size, *size], dtype=np.float64)
    dims = len(size)
    inside = np.clip(boxes, 0, limit)
    area, seen = ((b[:, dims:] - b[:, :dims]).clip(min=0).prod(axis=1) for b in (boxes, inside))
    there = seen > 0
    sure = there & ~ignore & (seen >= SHOWN * area)
    return {
        "boxes": torch.from_numpy(inside[sure]).float().to(device),
        "labels": torch.from_numpy(labels[sure]).to(device),
        "ignore": torch.from_numpy(inside[there & ~sure]).float().to(device),
    }


@dataclass
class VolumeBatches:
    """Volumes of a cohort with boxes from their label maps, read once, cropped as segmentation crops them.

    Args:
        reader: Reads and keeps volumes.
        cases: id -> case.
        structures: Values whose boxes are looked for.
        views: size (crop), normalize, spacing_mm.
        settings: `split`, `min_voxels`, `foreground`, `augment`, `device`.
    """

    reader: CaseReader
    cases: Mapping[int, Case]
    structures: Sequence[int]
    views: Mapping[str, Any]
    settings: BoxSettings

    def __post_init__(self) -> None:
        self.device = torch.device(self.settings.device)
        self.kept: dict[int, VolumeBoxes] = {}
        self.maker: Any = data_sources.make_views(self.views)

    @property
    def size(self) -> tuple[int, ...]:
        """Size (X, Y, Z) of the crops."""
        return tuple(self.maker.size)

    def boxes(self, number: int) -> VolumeBoxes:
        """Return the boxes of a case.

        Raises:
            RequestError: Its map labels some structures only.
        """
        if number not in self.kept:
            case = self.cases[number]
            try:
                found = volume_boxes(
                    self.reader(case), self.structures, split=self.settings.split, min_voxels=self.settings.min_voxels
                )
            except RequestError as err:
                raise RequestError(f"case {case.id}: {err}") from None
            self.kept[number] = found
        return self.kept[number]

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Cut a batch of crops, a function of (ids, step, seed); boxes are those of the warped parts."""
        crops = TrainingCrops(
            size=self.size,
            spacing_mm=self.views.get("spacing_mm"),
            normalize=self.views["normalize"],
            augment=self.settings.augment,
            foreground=self.settings.foreground,
            seed=seed,
            device=self.device,
        )
        chosen = [self._drawn(ids, seed, step * batch + place) for place in range(batch)]
        images, parts = crops.batch([self._with_parts(number) for number in chosen], step)
        return images, [self._target(number, part[0].cpu().numpy()) for number, part in zip(chosen, parts)]

    @staticmethod
    def _drawn(ids: Sequence[int], seed: int, place: int) -> int:
        """Every case once before any twice, in another order each time."""
        order = counter_rng(seed, "finetune", "order", place // len(ids)).permutation(len(ids))
        return ids[int(order[place % len(ids)])]

    def _with_parts(self, number: int) -> Volume:
        """Return the volume with its parts in the place of its label map, so that crops carry them along."""
        volume, own = self.reader(self.cases[number]), self.boxes(number)
        return replace(volume, label=own.parts, points=own.points, labelled=None, raters=())

    def _target(self, number: int, parts: np.ndarray) -> dict[str, Tensor]:
        own = self.boxes(number)
        spacing = self.views.get("spacing_mm")
        wanted = own.spacing_mm if spacing is None else np.broadcast_to(np.asarray(spacing, dtype=np.float64), (3,))
        expected = own.voxels * np.prod(np.asarray(own.spacing_mm) / np.asarray(wanted))
        boxes, labels, ignore = [], [], []
        for row in range(len(own.boxes)):
            seen = parts == row + 1
            if seen.any():
                boxes.append(extent(seen))
                labels.append(own.labels[row])
                ignore.append(bool(own.ignore[row]) or seen.sum() < SHOWN * expected[row])
        plain = np.array(boxes, dtype=np.float64).reshape(-1, 6)
        return target_of(plain, np.array(labels, dtype=np.int64), np.array(ignore, dtype=bool), parts.shape, self.device)

    def whole(self, number: int) -> WholeCase:
        """Return a whole volume."""
        volume, own = self.reader(self.cases[number]), self.boxes(number)
        given = self.views.get("spacing_mm")
        spacing = None if given is None else np.broadcast_to(np.asarray(given, dtype=np.float64), (3,)).tolist()
        image, padding = whole_image(volume, self.views["normalize"], spacing, self.device)
        scale = np.asarray(volume.image.shape[1:]) / np.asarray(image.shape[2:])
        return WholeCase(image, scale, np.zeros(3), own.boxes, own.labels, own.ignore, padding, own.region)


@dataclass(frozen=True)
class _Road:
    """What both roads come down to.

    Args:
        cases: Labelled cases.
        batches: Their images.
        names: id -> how results call a case.
        patients: id -> how results call its patient; None where unknown.
        counts: What reading the boxes counted.
        digest: Of cases and boxes; that of a cohort needs a key in the folder of results, made when missing.
        leakage: What was checked.
        facts: Further facts for the folder.
        file_names: What the file of boxes calls the classes, where the recipe does not list them; for `private/` alone.
        write_names: Writes what cases and structures are called in the files, for the owner alone, and what was counted in label maps.
    """

    cases: BoxCases
    batches: PictureBatches | VolumeBatches
    names: Mapping[int, str]
    patients: Mapping[int, str | None]
    counts: Mapping[str, int]
    digest: Callable[[], str]
    leakage: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    file_names: Sequence[str] = ()
    write_names: Callable[[Path], None] = lambda _: None


def box_curve(
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
        recipe: YAML path or `FinetuneBoxesRecipe`.
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
        RequestError: Recipe, boxes and weights do not go together; nothing was trained.
        LeakageError: A patient or image to be scored was pretrained on.
    """
    recipe = load_recipe(recipe, overrides, kind="finetune")
    if not isinstance(recipe, FinetuneBoxesRecipe):
        raise RequestError("this recipe is of another task; set task: detection")
    pretrained = weights is not None and str(weights) != SCRATCH
    manifest = load_part(weights)[1] if pretrained else None  # type: ignore[arg-type]
    section, forced = _section(recipe, manifest)
    settings = build.box_settings(recipe)
    out = Path(recipe.out)
    arms = arms_of(recipe, weights if pretrained else None, manifest, section, twin)
    if recipe.source is not None:
        road = _pictures(recipe, section, settings, weights if pretrained else None)
    else:
        road = _volumes(recipe, section, settings, weights if pretrained else None)
    counts = [recipe.labels or len(road.cases.where("train"))] if counts is None else list(counts)
    cells = plan(arms, counts, seeds)
    encoder = next(iter(arms.values())).build(0)
    if isinstance(road.batches, PictureBatches):
        data_sources.check_items(road.batches.shelf, section, [encoder])
    for cell in cells:
        training_rows(road.cases, cell.labels, cell.seed)
    start(encoder, road.batches.size, road.cases, settings, labels=cells[0].labels, seed=cells[0].seed)
    private_folder(out)
    if road.file_names:
        keep_names(out, road.cases.classes, road.file_names)
    shared = {
        "kind": "finetune",
        "task": recipe.task,
        "classes": list(road.cases.classes),
        "cases": road.digest(),
        "boxes": dict(road.counts),
        "settings": json.loads(json.dumps(asdict(replace(settings, device="")))),
        "views": section.views,
        "encoder": next(iter(arms.values())).encoder,
        "weights": {name: arm.hash for name, arm in arms.items()},
        "leakage_check": road.leakage,
        "forced": forced,
        **road.facts,
    }
    claim(out, shared)
    road.write_names(out)
    for number, cell in enumerate(cells, start=1):
        folder = out / "cells" / cell.name
        content = read_cell(folder)
        if content is None:
            arm = arms[cell.arm]
            result, network = finetune_boxes(
                arm.build(cell.seed), road.batches, road.cases, settings, labels=cell.labels, seed=cell.seed,
                pretrained=arm.weights is not None, arm=cell.arm, on_step=on_step,
            )  # fmt: skip
            content = _write_cell(folder, result, network, arm, section, road)
            if number < len(cells):
                write_summary(out, cells, shared, partial(summarise, intervals=False))
        if on_cell is not None:
            on_cell(number, len(cells), cell, content)
    return write_summary(out, cells, shared, summarise)


def _section(recipe: FinetuneBoxesRecipe, manifest: Mapping[str, Any] | None) -> tuple[SourceSection, list[str]]:
    """Return the views as those of a source, those of a cohort too; see `section_of`."""
    if recipe.source is not None:
        return section_of(recipe, manifest)
    assert recipe.cohort is not None
    stand_in = SourceSection(index="", domain=recipe.cohort.domain, views=recipe.views)
    try:
        section, forced = section_of(recipe.model_copy(update={"source": stand_in}), manifest)
    except RequestError as err:
        raise RequestError(str(err).replace("source.views", "views")) from None
    return section.model_copy(update={"views": {"normalize": "zscore", **section.views}}), forced


def _pictures(recipe: FinetuneBoxesRecipe, section: SourceSection, settings: BoxSettings, weights: Path | str | None) -> _Road:
    """Join boxes to the pictures of an index, by file name."""
    assert recipe.boxes is not None
    table = read_boxes(recipe.boxes.path, classes=recipe.boxes.classes, drop_empty=recipe.boxes.drop_empty)
    shelf = data_sources.fill_shelf(NAME, section)
    listed = _listed(shelf, table)
    found = []
    for row, name in listed:
        boxes = table.of(name, shelf.reader.record(row.series_id).shape[-2:])
        assert boxes is not None
        found.append((row, boxes))
    if not found:
        raise RequestError(
            f"none of the {len(shelf.rows)} selected pictures is listed in {table.path.name}; names are compared with the image file's name"
        )
    table.counts["unmatched"] = len(table.pictures) - len(found)
    named = recipe.boxes.classes is not None
    known = not any("patient_unknown" in row.quality_flags for row, _ in found)
    cases = BoxCases(
        ids=np.arange(len(found)),
        split=np.array([row.split for row, _ in found]),
        groups=[row.patient_id for row, _ in found] if known else None,
        classes=table.classes if named else tuple(f"class_{k}" for k in range(1, len(table.classes) + 1)),
        present=_present([(boxes.labels, boxes.ignore) for _, boxes in found], len(table.classes)),
    )
    leakage = "no weights"
    if weights is not None:
        scored = {row.series_id for row, _ in found if row.split in ("val", "test")}
        leakage = refuse_pretraining_patients(weights, replace(shelf, rows=[row for row in shelf.rows if row.series_id in scored]))
    series = {number: row.series_id for number, (row, _) in enumerate(found)}
    rows = sorted(
        (row.series_id, row.split, *(part.tolist() for part in (boxes.boxes, boxes.labels, boxes.ignore, boxes.region)))
        for row, boxes in found
    )
    return _Road(
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
        {"domain": section.domain.model_dump(), "sampler": section.sampler.model_dump()},
        file_names=() if named else table.classes,
    )


def _listed(shelf: data_sources.Shelf, table: BoxTable) -> list[tuple[SeriesRow, str]]:
    """Return the selected pictures that a file of boxes lists, each with its file name.

    Raises:
        RequestError: Two of them have the same name there, or one is a volume or a cine.
    """
    found = [(row, files[0].name) for row in shelf.rows if (files := shelf.archive.files(row.series_id))]
    found = [(row, name) for row, name in found if table.listed(name) is not None]
    others = Counter(row.kind for row, _ in found if row.kind != "image")
    if others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        raise RequestError(
            f"{table.path.name} lists selected series that are no pictures ({kinds}), and its boxes would be those of one frame; add kind = "
            "'image' to source.where"
        )
    double = sum(n for n in Counter(table.listed(name) for _, name in found).values() if n > 1)
    if double:
        raise RequestError(
            f"{double} of the {len(found)} selected pictures that {table.path.name} lists share a file name with another, and boxes are "
            "joined by file name; narrow source.where to one folder, or rename the files and index them again"
        )
    return found


def _volumes(recipe: FinetuneBoxesRecipe, section: SourceSection, settings: BoxSettings, weights: Path | str | None) -> _Road:
    """Make boxes of the label maps of a cohort."""
    assert recipe.cohort is not None
    cohort = Cohort.load(recipe.cohort.path)
    facts: dict[str, Any] = {"cohort": cohort.name, "domain": recipe.cohort.domain.model_dump()}
    if recipe.cohort.card is not None:
        facts["data_cards"] = [card_facts(load_card(find_card(recipe.cohort.card)))]
    leakage = "no weights"
    if weights is not None:
        refuse_pretraining_images(weights, cohort)
        leakage = "no test image was pretrained on, as far as run folder and index are at hand"
    labelled = {number: case for number, case in enumerate(c for c in cohort.cases if c.label is not None)}
    reader = CaseReader(recipe.cohort.domain.name, recipe.cohort.domain.args)
    structures = structures_of(cohort, reader)
    for case in labelled.values():
        known_values(reader(case), structures, case)
    batches = VolumeBatches(reader, labelled, list(structures), section.views, settings)
    own = [batches.boxes(number) for number in labelled]
    ranks = [float("nan") if case.rank is None else float(case.rank) for case in labelled.values()]
    cases = BoxCases(
        ids=np.array(list(labelled)),
        split=np.array([case.split for case in labelled.values()]),
        groups=[case.patient_id for case in labelled.values()],
        classes=tuple(structures.values()),
        present=_present([(boxes.labels, boxes.ignore) for boxes in own], len(structures)),
        ranks=np.array(ranks),
    )

    def write_names(out: Path) -> None:
        write_case_names(out / "private" / "cases.csv", list(labelled.values()))
        write_label_counts(out, reader, cohort)

    counts = {
        "boxes": int(sum(len(boxes.boxes) for boxes in own)),
        "ignored": int(sum(boxes.ignore.sum() for boxes in own)),
        "too_small": sum(boxes.left_out for boxes in own),
    }
    return _Road(
        cases,
        batches,
        {number: case.id for number, case in labelled.items()},
        {number: case.patient_id for number, case in labelled.items()},
        counts,
        lambda: cohort.digest(folder_key(Path(recipe.out) / "private" / "cohort.key")),
        leakage,
        facts,
        write_names=write_names,
    )


def _present(found: Sequence[tuple[np.ndarray, np.ndarray]], n_classes: int) -> np.ndarray:
    return np.array([np.bincount(labels[~ignore], minlength=n_classes) for labels, ignore in found]).reshape(-1, n_classes)


def _write_cell(
    folder: Path, result: BoxResult, network: nn.Module, arm: Arm, section: SourceSection, road: _Road
) -> dict[str, Any]:
    content = asdict(result)
    for case in content["cases"]:
        number = case.pop("id")
        case["series_id" if isinstance(road.batches, PictureBatches) else "case"] = road.names[number]
        case["patient_id"] = road.patients[number]
    content |= {"when": now(), **{key: facts_of_machine()[key] for key in ("hardware", "versions", "git")}}
    content = json.loads(json.dumps(content, default=str))
    encoder: Any = network.get_submodule(ENCODER)
    manifest = {
        "encoder": arm.encoder,
        "channels": int(encoder.in_channels),
        "axis_order": "HW" if len(road.batches.size) == 2 else "XYZ-RAS",
        "detector": content["settings"]["detector"],
        "classes": content["classes"],
        "library": "monai.RetinaNet",
        "image_size": list(road.batches.size),
        "task": result.task,
        "views": section.views,
        "pretrained": arm.hash,
    }
    save_part(folder, "network", network.state_dict(), manifest)
    write_atomic(folder / "results.json", json.dumps(content, indent=1, allow_nan=False).encode())
    return dict(content)


def summarise(results: Sequence[Mapping[str, Any]], *, intervals: bool = True) -> dict[str, Any]:
    """Return the mAP over overlaps 0.1 to 0.5 with its interval per (labels, arm), the mean of all scores, and differences to scratch.

    Of several seeds it is the mean; intervals draw patients again with all seeds at once, as in `target_tasks.summarise`.

    Args:
        results: Of finished cells.
        intervals: Whether to draw them: minutes where test cases have many boxes, so that they wait for the last cell.
    """
    estimate = bootstrap_interval if intervals else _without_interval
    if not results:
        return {"metric": "", "rows": [], "differences": []}
    metric, n_classes = "map_10_50", len(results[0]["classes"])
    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for labels in sorted({result["labels"] for result in results}):
        groups: dict[str, dict[int, Mapping[str, Any]]] = {}
        for result in results:
            if result["labels"] == labels:
                groups.setdefault(result["arm"], {})[result["seed"]] = result
        scored = {arm: {seed: _matches(one, n_classes) for seed, one in by_seed.items()} for arm, by_seed in groups.items()}
        names, patients = _tested(results[0])
        places = np.arange(len(names), dtype=np.float64)
        for arm, by_seed in groups.items():
            _same_cases(by_seed.values(), names)
            score = over_images(_mean_of(list(scored[arm].values())), len(names))
            value, low, high = estimate(places, patients, draws=1000, statistic=score)
            scores: dict[str, list[float]] = {}
            for seed in sorted(by_seed):
                for row in by_seed[seed]["rows"]:
                    if row["value"] is not None:
                        scores.setdefault(row["metric"] + (f" {row['class']}" if row["class"] else ""), []).append(row["value"])
            rows.append(
                {"labels": labels, "arm": arm, "seeds": sorted(by_seed), "n_test": len(names), "metric": metric, "value": value}
                | {"low": _finite(low), "high": _finite(high), "seed_means": scores.get(metric, [])}
                | {"scores": {name: float(np.mean(values)) for name, values in scores.items()}}
                | {"seconds": float(np.mean([result["seconds"]["train"] for result in by_seed.values()]))}
            )
        for arm, by_seed in groups.items():
            common = sorted(set(by_seed) & set(groups.get(SCRATCH, {})))
            if arm == SCRATCH or not common:
                continue
            ours, theirs = (_mean_of([scored[name][seed] for seed in common]) for name in (arm, SCRATCH))
            gap = over_images(lambda times, ours=ours, theirs=theirs: ours(times) - theirs(times), len(names))
            value, low, high = estimate(places, patients, draws=1000, statistic=gap)
            differences.append(
                {"labels": labels, "arm": arm, "against": SCRATCH, "seeds": common, "difference": value}
                | {"low": _finite(low), "high": _finite(high), "better": "higher"}
            )
    return {"metric": metric, "rows": rows, "differences": differences}


def _without_interval(
    places: np.ndarray, patients: Sequence[str] | None, *, draws: int, statistic: Statistic
) -> tuple[float, float, float]:
    """Stand in for `bootstrap_interval` while further cells are to come."""
    return float(statistic(places)), float("nan"), float("nan")


def _name(case: Mapping[str, Any]) -> str:
    return str(case.get("series_id") or case["case"])


def _tested(result: Mapping[str, Any]) -> tuple[list[str], list[str] | None]:
    cases = sorted(result["cases"], key=_name)
    patients = [case["patient_id"] for case in cases]
    return [_name(case) for case in cases], None if None in patients else patients


def _same_cases(results: Any, names: Sequence[str]) -> None:
    if any(_tested(result)[0] != list(names) for result in results):
        raise RequestError("cells were scored on different test cases; one table needs the same; remove the cells and run again")


def _matches(result: Mapping[str, Any], n_classes: int) -> list[Matches]:
    return match_classes([image_boxes(case) for case in sorted(result["cases"], key=_name)], n_classes)


def _mean_of(seeds: Sequence[Sequence[Matches]]) -> Callable[[np.ndarray], float]:
    return lambda times: float(np.mean([mean_average_precision(one, times) for one in seeds]))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
