"""Volumes of a labelled cohort with boxes from their label maps, cropped as segmentation crops them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl import data_sources
from medssl.cards.named import card_facts
from medssl.cards.schema import find_card, load_card
from medssl.errors import RequestError
from medssl.evaluation.box_cases import SHOWN, BoxCases, BoxSource, WholeCase, present_of, target_of
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.finetune import structures_of
from medssl.evaluation.finetune_boxes import BoxSettings
from medssl.evaluation.label_curve import folder_key
from medssl.evaluation.outside import Look
from medssl.evaluation.segmentation_results import write_case_names, write_label_counts
from medssl.evaluation.volume_boxes import VolumeBoxes, extent, volume_boxes
from medssl.evaluation.volumes import CaseReader, TrainingCrops, Volume, known_values, whole_image
from medssl.leakage import refuse_pretraining_images
from medssl.recipe import FinetuneBoxesRecipe, SourceSection
from medssl.seeding import counter_rng


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
        return WholeCase(image, scale, np.zeros(3), own.boxes, own.labels, own.ignore, padding, own.region, own.spacing_mm)


def volume_source(
    recipe: FinetuneBoxesRecipe, section: SourceSection, settings: BoxSettings, weights: Path | str | None
) -> BoxSource:
    """Make boxes of the label maps of a cohort."""
    assert recipe.cohort is not None
    dealt = recipe.folds is not None
    cohort = Cohort.load(recipe.cohort.path, every=dealt)
    if cohort.channels > 1:
        raise RequestError(
            f"cohort {cohort.name}: its volumes have {cohort.channels} channels; detection takes volumes of one channel: make a set of one of "
            "the channels (segmentation takes several)"
        )
    if dealt:
        cohort.refuse_folds_of_some_unknown()
    facts: dict[str, Any] = {"cohort": cohort.name, "domain": recipe.cohort.domain.model_dump()}
    if recipe.cohort.card is not None:
        facts["data_cards"] = [card_facts(load_card(find_card(recipe.cohort.card)))]
    leakage = "no weights"
    if weights is not None:
        leakage = refuse_pretraining_images(weights, cohort, every=dealt)
    labelled = {number: case for number, case in enumerate(c for c in cohort.cases if c.label is not None)}
    reader = CaseReader(recipe.cohort.domain.name, recipe.cohort.domain.args)
    structures = structures_of(cohort, reader, every=dealt)
    for case in labelled.values():
        known_values(reader(case), structures, case)
    batches = VolumeBatches(reader, labelled, list(structures), section.views, settings)
    own = [batches.boxes(number) for number in labelled]
    known = all(case.patient_known for case in labelled.values())
    ranks = [float("nan") if case.rank is None else float(case.rank) for case in labelled.values()]
    cases = BoxCases(
        ids=np.array(list(labelled)),
        split=np.array([case.split for case in labelled.values()]),
        groups=[case.patient_id for case in labelled.values()] if known else None,
        classes=tuple(structures.values()),
        present=present_of([(boxes.labels, boxes.ignore) for boxes in own], len(structures)),
        ranks=None if dealt else np.array(ranks),  # folds draw their order by seed: ranks are of the given split
        looks=[Look(boxes.spacing_mm, case.facts.get("vendor")) for boxes, case in zip(own, labelled.values())],
        facts=[case.facts for case in labelled.values()],
    )

    def write_names(out: Path) -> None:
        write_case_names(out / "private" / "cases.csv", list(labelled.values()))
        write_label_counts(out, reader, cohort)

    counts = {
        "boxes": int(sum(len(boxes.boxes) for boxes in own)),
        "ignored": int(sum(boxes.ignore.sum() for boxes in own)),
        "too_small": sum(boxes.left_out for boxes in own),
    }
    return BoxSource(
        cases,
        batches,
        {number: case.id for number, case in labelled.items()},
        {number: case.patient_id if known else None for number, case in labelled.items()},
        counts,
        lambda: cohort.digest(folder_key(Path(recipe.out) / "private" / "cohort.key")),
        leakage,
        "case",
        facts,
        write_names=write_names,
    )
