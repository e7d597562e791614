"""Labelled cases of detection: their boxes as a network takes them, which cases train, and what is refused before any does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl.errors import RequestError
from medssl.evaluation.detection import ImageBoxes
from medssl.evaluation.folds import few_label_rows
from medssl.evaluation.outside import Look
from medssl.seeding import counter_rng

SHOWN = 0.3
"""An object of which a training view shows less than this share counts neither way there: nobody could tell what it is."""


@dataclass(frozen=True)
class BoxCases:
    """Labelled cases.

    Args:
        ids: (N,) int64.
        split: (N,) `train`, `val` or `test`.
        groups: Patient of each case, or None.
        classes: Names of the classes.
        present: (N, K) boxes of every class in each case, without those that count neither way.
        ranks: (N,) place in a few-label order of the cohort's own, from 1, NaN for none; None draws one by seed.
        looks: Voxel size and vendor of each case where they are known, or empty.
        facts: What the index says of person and scanner of each case, or empty.
        one_fold: Whether the test cases are one fold of several, which may hold no box: all folds are scored together.
        orders: Seed -> `few_label_order` of these cases, where it was asked for.
    """

    ids: np.ndarray
    split: np.ndarray
    groups: Sequence[str] | None
    classes: Sequence[str]
    present: np.ndarray
    ranks: np.ndarray | None = None
    looks: Sequence[Look] = ()
    facts: Sequence[Mapping[str, str]] = ()
    one_fold: bool = False
    orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def balance(self) -> np.ndarray:
        """(N,) number in which folds are to be alike: which classes are there, the rarest first, then how many boxes.

        The rarest has the lowest number: patients are dealt from there, and the last ones, of whom some folds get none, are the commonest.
        """
        there = self.present > 0
        order = np.argsort(there.sum(axis=0), kind="stable")
        places = 0.5 ** np.arange(1, len(order) + 1)
        boxes = self.present.sum(axis=1)
        found: np.ndarray = there[:, order] @ places + 0.5 ** len(order) * boxes / (1 + boxes.max(initial=0))
        return -found

    def where(self, split: str) -> np.ndarray:
        """Return the rows of a split."""
        return np.flatnonzero(self.split == split)

    def patients(self, rows: np.ndarray) -> list[str] | None:
        """Return the patients of rows, or None when they are unknown."""
        return None if self.groups is None else [str(self.groups[int(row)]) for row in rows]


@dataclass(frozen=True)
class WholeCase:
    """A whole case as the network sees it, and what is in it.

    Args:
        image: (1, C, *size).
        scale: (D,) pixels of the case per pixel of the image.
        offset: (D,) where the image begins in the case, in pixels of the case.
        boxes: (N, 2 D) in pixels of the case.
        labels: (N,).
        ignore: (N,).
        padding: Value of the image where there is nothing.
        region: (N,) as in `detection.ImageBoxes`.
        spacing_mm: (D,) pixel size of the case; empty where pixels are as wide as high.
    """

    image: Tensor
    scale: np.ndarray
    offset: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    padding: float = 0.0
    region: np.ndarray | None = None
    spacing_mm: tuple[float, ...] = ()


class BoxBatches(Protocol):
    """Where pictures and their boxes come from.

    Attributes:
        size: Of the training images.
    """

    @property
    def size(self) -> tuple[int, ...]:
        """Size of the training images."""
        ...

    def training(self, ids: Sequence[int], step: int, seed: int, batch: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return augmented images (B, C, *size) and {boxes, labels, ignore} of each; equal arguments give equal images."""
        ...

    def whole(self, number: int) -> WholeCase:
        """Return a case without augmentation."""
        ...


@dataclass(frozen=True)
class BoxSource:
    """What pictures of an index and volumes of a cohort come down to.

    Args:
        cases: Labelled cases.
        batches: Their images.
        names: id -> how results call a case.
        patients: id -> how results call its patient; None where unknown.
        counts: What reading the boxes counted.
        digest: Of cases and boxes; that of a cohort needs a key in the folder of results, made when missing.
        leakage: What was checked.
        name_key: Under which key results name a case: `series_id`, or `case` of a cohort.
        facts: Further facts for the folder.
        file_names: What the file of boxes calls the classes, where the recipe does not list them; for `private/` alone.
        write_names: Writes what cases and structures are called in the files, for the owner alone, and what was counted in label maps.
    """

    cases: BoxCases
    batches: BoxBatches
    names: Mapping[int, str]
    patients: Mapping[int, str | None]
    counts: Mapping[str, int]
    digest: Callable[[], str]
    leakage: str
    name_key: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    file_names: Sequence[str] = ()
    write_names: Callable[[Path], None] = lambda _: None


def few_label_order(cases: BoxCases, seed: int) -> np.ndarray:
    """Return the rows of the training cases: the cohort's own order, or one drawn by seed that begins with all classes.

    Patients stay together. Of the drawn order the first patients are the first that have the rarest class, then the next rarest not yet
    seen, so that few cases have an object of each.

    Args:
        cases: The cases.
        seed: Another seed draws other patients first.
    """
    rows = cases.where("train")
    if cases.ranks is not None and np.isfinite(cases.ranks[rows]).any():
        return rows[np.argsort(np.nan_to_num(cases.ranks[rows], nan=np.inf), kind="stable")]
    return few_label_rows(cases, seed, lambda of_patient: _drawn(cases, of_patient, seed))


def _drawn(cases: BoxCases, of_patient: Mapping[str, list[int]], seed: int) -> list[str]:
    names = sorted(of_patient)
    shuffled = [names[int(k)] for k in counter_rng(seed, "few labels", "boxes").permutation(len(names))]
    has = {name: cases.present[members].sum(axis=0) > 0 for name, members in of_patient.items()}
    first: list[str] = []
    for k in np.argsort(cases.present[cases.where("train")].sum(axis=0), kind="stable"):
        if not any(has[name][k] for name in first):
            first += [name for name in shuffled if has[name][k]][:1]
    begun = set(first)
    return first + [name for name in shuffled if name not in begun]


def training_rows(cases: BoxCases, labels: int | None, seed: int) -> np.ndarray:
    """Return the rows of the first training cases, after checking that they can be learnt from, and the test cases scored.

    Raises:
        RequestError: There are fewer, a split is empty, a class has no box among them, or no test case has one where there are no folds.
    """
    train = few_label_order(cases, seed)[:labels]
    if labels is not None and len(train) < labels:
        raise RequestError(f"{labels} labels are asked for, and {len(train)} training cases have boxes; ask for fewer")
    for split, rows in (("train", train), ("test", cases.where("test"))):
        if not len(rows):
            raise RequestError(f"no case with boxes is marked {split}; mark some, and run again")
    where = f"the {len(train)} training cases" + (" of a fold" if cases.one_fold else "")
    absent = [name for name, n in zip(cases.classes, cases.present[train].sum(axis=0)) if n == 0]
    if absent or not len(cases.classes):
        raise RequestError(
            f"class {', '.join(absent) or '(none at all)'} has no box among {where}; give more labels"
            f"{', ask for fewer folds' if cases.one_fold else ''}, or leave the class out"
        )
    if not cases.one_fold and not cases.present[cases.where("test")].any():
        raise RequestError("no test case has a box, so nothing can be scored; mark other cases as test")
    return train


def present_of(found: Sequence[tuple[np.ndarray, np.ndarray]], n_classes: int) -> np.ndarray:
    """Return (N, K) boxes of every class in each case, of the labels and the flags `ignore` of its boxes."""
    return np.array([np.bincount(labels[~ignore], minlength=n_classes) for labels, ignore in found]).reshape(-1, n_classes)


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


def plain_boxes(image: ImageBoxes) -> dict[str, list[Any]]:
    """Return boxes for JSON, `real` and `found`; hundredths of a pixel are kept."""
    real = zip(image.boxes.round(2).tolist(), image.labels.tolist(), image.ignore.tolist(), image.regions.tolist())
    found = zip(image.found.round(2).tolist(), image.found_labels.tolist(), image.scores.tolist())
    return {"real": [list(row) for row in real], "found": [list(row) for row in found]}


def image_boxes(case: Mapping[str, Any]) -> ImageBoxes:
    """Read what `plain_boxes` made."""
    dims = len((case["real"] or case["found"] or [[[0.0] * 4]])[0][0])

    def columns(rows: Sequence[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes = np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, dims)
        return boxes, np.array([row[1] for row in rows], dtype=np.int64), np.array([row[2] for row in rows])

    boxes, labels, ignore = columns(case["real"])
    found, found_labels, scores = columns(case["found"])
    region = np.array([len(row) > 3 and row[3] for row in case["real"]], dtype=bool)  # older results have no regions
    return ImageBoxes(boxes, labels, ignore.astype(bool), found, found_labels, scores.astype(np.float64), region)
