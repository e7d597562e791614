"""What a network that draws or finds things must beat: the likeliest class of each pixel, counted, without a network.

`raw_pixels` knows the value of a pixel and its place in the image (a grid of 8 cells per axis), `intensity_statistics` its value alone. Both
are counted over the training cases that the fine-tuned arms have, of images as the network sees them. How much the frequency of a class
counts is chosen on validation cases, on training cases where there are none: with all of it, what is small is never drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from medssl.evaluation.box_cases import BoxCases, BoxSource, WholeCase, plain_boxes, training_rows
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.detection import ImageBoxes, match_classes, mean_average_precision
from medssl.evaluation.finetune import reader_of, structures_of
from medssl.evaluation.folds import deals, finite_mean
from medssl.evaluation.label_curve import deals as deals_of_cohort
from medssl.evaluation.label_curve import presence
from medssl.evaluation.metrics import dice, mean_score
from medssl.evaluation.segmentation_results import CaseScore, FinetuneResult, plain
from medssl.evaluation.segmentation_settings import FinetuneSettings
from medssl.evaluation.volumes import CaseReader, Volume, comparable, whole_channels

BINS, CELLS = 64, 8
"""Values, and places along an axis, that are told apart."""
OFTEN = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Exponents of the frequency of a class; on a tie the first."""
ARMS = {"raw_pixels": True, "intensity_statistics": False}
"""Control -> whether it knows places."""
MOST = 100
"""Boxes that are kept of an image, as of a detector."""
UNKNOWN = -1
Labelled = tuple[np.ndarray, np.ndarray]
"""An image (C, *size) and the class of each pixel (*size), -1 where nobody knows."""


class PixelTable:
    """How often each class has each value, and each place.

    Args:
        images: Gives the training images with their classes, from the first, each time it is called.
        classes: Number of classes, background (0) too.
        places: Whether places count.

    Reference:
        Naive Bayes: value and place are taken as independent in each class, one pixel more of each in every class (Laplace).
    """

    def __init__(self, images: Callable[[], Iterable[Labelled]], classes: int, *, places: bool) -> None:
        ends = np.array([np.percentile(_grey(image), (0.1, 99.9)) for image, _ in images()])
        self.low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        self.width = (high - self.low) or 1.0
        self.places = places
        counts: np.ndarray | None = None
        for image, kinds in images():
            cells = CELLS**kinds.ndim if places else 1
            index, known = self.index(image), kinds >= 0
            own = np.bincount(kinds[known].astype(np.int64) * (BINS * cells) + index[known], minlength=classes * BINS * cells)
            own = own.reshape(classes, BINS, cells)
            counts = own if counts is None else counts + own
        assert counts is not None
        total = counts.sum(axis=(1, 2)).astype(np.float64)
        of_value, of_place = counts.sum(axis=2), counts.sum(axis=1)
        value = np.log((of_value + 1) / (total[:, None] + BINS))
        place = np.log((of_place + 1) / (total[:, None] + of_place.shape[1]))
        evidence = value[:, :, None] + place[:, None, :]
        evidence[total == 0] = -np.inf  # a class without a pixel is never drawn
        self._evidence = evidence.reshape(classes, -1)
        self._often = np.log((total + 1) / (total.sum() + classes))[:, None]

    def index(self, image: np.ndarray) -> np.ndarray:
        """Return (*size) int32 which value and place each pixel of an image (C, *size) has."""
        grey = _grey(image)
        index: np.ndarray = ((grey - self.low) * (BINS / self.width)).clip(0, BINS - 1).astype(np.int32)
        if not self.places:
            return index
        for axis, n in enumerate(grey.shape):
            cell = (np.arange(n, dtype=np.int32) * CELLS // n).reshape([-1 if a == axis else 1 for a in range(grey.ndim)])
            index = index * CELLS + cell
        return index

    def chances(self, often: float) -> np.ndarray:
        """Return (classes, indices) probabilities, the frequency of a class counted with an exponent."""
        scores = self._evidence + often * self._often
        weight = np.exp(scores - scores.max(axis=0))
        found: np.ndarray = weight / weight.sum(axis=0)
        return found


def _grey(image: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.asarray(image, dtype=np.float32).mean(axis=0)
    return found


def segmentation_controls(
    cohort: Cohort, settings: FinetuneSettings, *, counts: Sequence[int], seeds: Sequence[int], folds: int | None
) -> list[FinetuneResult]:
    """Return the results of both controls on the cells of a label curve, as `label_curve.summarise` takes them.

    Given splits have one seed: nothing is drawn, and the first n cases are the same for all.

    Args:
        cohort: The labelled set.
        settings: Of the networks; encoder, domain, normalisation and validation cases are used.
        counts: Numbers of labelled training cases.
        seeds: Of the folds.
        folds: As in `label_curve`.
    """
    reader = reader_of(settings)
    structures = structures_of(cohort, reader, every=folds is not None)
    cohort = replace(cohort, structures=structures)
    found = []
    present = None if folds is None else presence(cohort, reader, settings.raters)  # the folds of the networks
    for (seed, fold), own in deals_of_cohort(cohort, folds, seeds if folds is not None else seeds[:1], present).items():
        for count in counts:
            train, val = own.first(count), own.split("val")[: settings.val_cases]
            for arm, places in ARMS.items():
                drawer = _Drawer(reader, settings, structures, train, places=places)
                often = drawer.choose(val or train)
                found.append(
                    FinetuneResult(
                        arm=arm,
                        labels=len(train),
                        seed=seed,
                        structures=list(structures.values()),
                        cases=[drawer.score(case, often) for case in own.split("test")],
                        curve=[],
                        loaded=None,
                        choice=_choice(often, len(val)),
                        seconds={"train": 0.0, "per_step": 0.0},
                        settings={},
                        fold=fold,
                        of_folds=folds,
                    )
                )
    return found


def _choice(often: float, validation: int) -> str:
    return f"frequency counted {often:g}, chosen on {f'{validation} validation' if validation else 'training'} cases"


class _Drawer:
    """A table of pixels over some training cases, that draws structures."""

    def __init__(
        self, reader: CaseReader, settings: FinetuneSettings, structures: Mapping[int, str], train: Sequence[Case], *, places: bool
    ) -> None:
        self.reader, self.settings, self.structures = reader, settings, structures
        self.values = np.array([0, *sorted(structures)], dtype=np.int16)
        self.table = PixelTable(lambda: (self.labelled(reader(case)) for case in train), len(self.values), places=places)

    def image(self, volume: Volume) -> np.ndarray:
        """Return (C, X, Y, Z) as the network sees it, on the grid of the volume."""
        shown: np.ndarray = whole_channels(volume, self.settings.normalize, None, torch.device("cpu"))[0][0].numpy()
        return shown

    def labelled(self, volume: Volume) -> Labelled:
        """Return the image and its classes; background of a map that labels some structures alone may be the others."""
        assert volume.label is not None
        kinds = np.full(volume.label.shape, UNKNOWN, dtype=np.int16)
        for k, value in enumerate(self.values):
            if value or volume.labelled is None:
                kinds[volume.label == value] = k
        kinds[~volume.valid] = UNKNOWN
        return self.image(volume), kinds

    def draw(self, index: np.ndarray, often: float) -> np.ndarray:
        """Return the label map (X, Y, Z) of what `PixelTable.index` says of an image."""
        found: np.ndarray = self.values[self.table.chances(often).argmax(axis=0)[index]]
        return found

    def dice(self, case: Case, exponents: Sequence[float]) -> list[dict[int, float]]:
        """Return the Dice of each structure that a case labels, for each exponent; the image is read once."""
        volume = self.reader(case)
        index = self.table.index(self.image(volume))
        return [dice(*comparable(self.draw(index, often), volume, self.structures)) for often in exponents]

    def choose(self, cases: Sequence[Case]) -> float:
        """Return how much the frequency counts, by the mean Dice of cases."""
        merits = [[mean_score(scores) for scores in self.dice(case, OFTEN)] for case in cases]
        return _best({often: finite_mean([row[k] for row in merits]) for k, often in enumerate(OFTEN)})

    def score(self, case: Case, often: float) -> CaseScore:
        """Return the Dice of a test case; distances are left to networks."""
        scores = self.dice(case, [often])[0]
        by_name = {name: plain(scores.get(value, float("nan"))) for value, name in self.structures.items()}
        patient = case.patient_id if case.patient_known else None
        return CaseScore(id=case.id, patient=patient, dice=by_name, hd95_mm=dict.fromkeys(by_name), facts=dict(case.facts))


def _best(merits: Mapping[float, float]) -> float:
    """Return what has the highest merit, the first where none is a number."""
    known = {often: merit for often, merit in merits.items() if np.isfinite(merit)}
    return max(known, key=lambda often: known[often]) if known else OFTEN[0]


def detection_controls(
    source: BoxSource, *, counts: Sequence[int], seeds: Sequence[int], folds: int | None
) -> list[dict[str, Any]]:
    """Return the results of both controls on the cells of a label curve, as `box_summary.summarise` takes them.

    A pixel in a box is of its class. What is found are the connected pixels of a class, each in the box around them; the score is
    S / (1 + S), where S is the sum of their probabilities.

    Args:
        source: Labelled cases and their images.
        counts: Numbers of labelled training cases.
        seeds: Of the first cases and of folds.
        folds: As in `folds.deals`.

    Raises:
        RequestError: As `box_cases.training_rows`.
    """
    found = []
    for (seed, fold), cases in deals(source.cases, folds, seeds, training_rows).items():
        for count in counts:
            train, val = training_rows(cases, count, seed), cases.where("val")
            for arm, places in ARMS.items():
                finder = _Finder(source, train, places=places)
                often = finder.choose(val if len(val) else train)
                images = finder.find(cases.where("test"), often)
                value = mean_average_precision(match_classes(images, len(cases.classes)))
                found.append(
                    {
                        "arm": arm,
                        "labels": len(train),
                        "seed": seed,
                        "fold": fold,
                        "of_folds": folds,
                        "task": "detection",
                        "classes": list(cases.classes),
                        "choice": _choice(often, len(val)),
                        "seconds": {"train": 0.0},
                        "rows": [{"metric": "map_10_50", "class": None, "value": plain(value)}],
                        "cases": _cases(source, cases, images),
                    }
                )
    return found


def _cases(source: BoxSource, cases: BoxCases, images: Sequence[ImageBoxes]) -> list[dict[str, Any]]:
    numbers = [int(number) for number in cases.ids[cases.where("test")]]
    return [
        {source.name_key: source.names[number], "patient_id": source.patients[number], **plain_boxes(one)}
        for number, one in zip(numbers, images, strict=True)
    ]


class _Finder:
    """A table of pixels over some training cases, that finds boxes."""

    def __init__(self, source: BoxSource, train: np.ndarray, *, places: bool) -> None:
        self.source, classes = source, 1 + len(source.cases.classes)

        def images() -> Iterable[Labelled]:
            for number in source.cases.ids[train]:
                case = source.batches.whole(int(number))
                yield case.image[0].cpu().numpy(), box_classes(case)

        self.table = PixelTable(images, classes, places=places)

    def choose(self, rows: np.ndarray) -> float:
        """Return how much the frequency counts, by the mAP of cases."""
        n = len(self.source.cases.classes)
        return _best({often: mean_average_precision(match_classes(self.find(rows, often), n)) for often in OFTEN})

    def find(self, rows: np.ndarray, often: float) -> list[ImageBoxes]:
        """Return what is in the cases of rows, and what is found there."""
        chances = self.table.chances(often)
        wholes = (self.source.batches.whole(int(number)) for number in self.source.cases.ids[rows])
        return [_found(case, self.table.index(case.image[0].cpu().numpy()), chances) for case in wholes]


def box_classes(case: WholeCase) -> np.ndarray:
    """Return (*size) int16: 1 + the class of the smallest box around each pixel, 0 outside boxes, -1 in a box that counts neither way."""
    size = tuple(case.image.shape[2:])
    kinds = np.zeros(size, dtype=np.int16)
    dims = len(size)
    boxes = (case.boxes - np.tile(case.offset, 2)) / np.tile(case.scale, 2)
    for row in np.argsort(-(boxes[:, dims:] - boxes[:, :dims]).prod(axis=1), kind="stable"):
        low, high = np.floor(boxes[row, :dims] + 0.5).astype(int), np.floor(boxes[row, dims:] + 0.5).astype(int)
        inside = tuple(slice(max(0, a), max(0, a + 1, b)) for a, b in zip(low, high))
        kinds[inside] = UNKNOWN if case.ignore[row] else 1 + case.labels[row]
    return kinds


def _found(case: WholeCase, index: np.ndarray, chances: np.ndarray) -> ImageBoxes:
    """Return the boxes around connected pixels of each class, the surest first."""
    from scipy import ndimage

    best = chances.argmax(axis=0)[index]
    found: list[tuple[float, int, list[int]]] = []
    for kind in range(1, len(chances)):
        parts, n = ndimage.label(best == kind)
        if not n:
            continue
        sums = ndimage.sum_labels(chances[kind][index], parts, np.arange(1, n + 1))
        extents = ndimage.find_objects(parts)
        for part in np.argsort(-sums, kind="stable")[:MOST]:
            place = extents[part]
            found.append((float(sums[part]), kind - 1, [s.start for s in place] + [s.stop for s in place]))
    found = sorted(found, key=lambda row: -row[0])[:MOST]
    dims = index.ndim
    boxes = np.array([row[2] for row in found], dtype=np.float64).reshape(-1, 2 * dims)
    boxes = boxes * np.tile(case.scale, 2) + np.tile(case.offset, 2)
    sums = np.array([row[0] for row in found], dtype=np.float64)
    labels = np.array([row[1] for row in found], dtype=np.int64)
    return ImageBoxes(case.boxes, case.labels, case.ignore, boxes, labels, sums / (1 + sums), case.region)
