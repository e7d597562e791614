"""Controls of segmentation and detection: counted by hand, and what they can and cannot see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl.evaluation import box_summary, label_curve
from medssl.evaluation.box_cases import BoxSource, WholeCase
from medssl.evaluation.cohort import Cohort
from medssl.evaluation.pixel_controls import (
    BINS,
    CELLS,
    PixelTable,
    box_classes,
    detection_controls,
    segmentation_controls,
)
from medssl.evaluation.segmentation_settings import FinetuneSettings
from tests.evaluation.tiny_cohort import TINY_ENCODER, write_cohort
from tests.evaluation.toy_boxes import Squares


def test_table__equals_counting_by_hand() -> None:
    rng = np.random.default_rng(0)
    images = [rng.uniform(0, 1, size=(1, 12, 10)).astype(np.float32) for _ in range(3)]
    kinds = [(image[0] > 0.6).astype(np.int16) for image in images]
    kinds[0][:2] = -1  # nobody knows: not counted
    table = PixelTable(lambda: zip(images, kinds), 2, places=True)
    value, place = np.ones((2, BINS)), np.ones((2, CELLS * CELLS))
    total = np.zeros(2)
    for image, own in zip(images, kinds):
        for r in range(12):
            for c in range(10):
                if (k := own[r, c]) >= 0:
                    bin_ = min(max(int((image[0, r, c] - table.low) * (BINS / table.width)), 0), BINS - 1)
                    value[k, bin_] += 1
                    place[k, (r * CELLS // 12) * CELLS + c * CELLS // 10] += 1
                    total[k] += 1
    for often in (0.0, 1.0):
        odds = ((total + 1) / (total.sum() + 2)) ** often
        wanted = (
            odds[:, None, None] * (value / value.sum(1, keepdims=True))[:, :, None] * (place / place.sum(1, keepdims=True))[:, None]
        )
        wanted = wanted / wanted.sum(axis=0)
        assert table.chances(often) == pytest.approx(wanted.reshape(2, -1))
    index = table.index(images[1])
    assert index.shape == (12, 10) and index[3, 4] % (CELLS * CELLS) == (3 * CELLS // 12) * CELLS + 4 * CELLS // 10


def test_table__of_a_class_without_a_pixel_never_draws_it() -> None:
    image, kinds = np.arange(16, dtype=np.float32).reshape(1, 4, 4), np.zeros((4, 4), np.int16)
    chances = PixelTable(lambda: [(image, kinds)], 3, places=False).chances(0.0)
    assert (chances[1:] == 0).all() and (chances[0] == 1).all()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_cohort(tmp_path_factory.mktemp("cohort"), train=3, val=1, test=3))


def settings(**changes: Any) -> FinetuneSettings:
    return FinetuneSettings(encoder=TINY_ENCODER, crop=(16, 16, 16), **changes)


def test_segmentation__finds_what_brightness_tells_and_fills_the_table_of_a_curve(cohort: Cohort) -> None:
    found = segmentation_controls(cohort, settings(), counts=[1, 3], seeds=[0, 1], folds=None)
    rows = {(row["arm"], row["labels"]): row for row in label_curve.summarise(found)["rows"]}
    assert set(rows) == {(arm, n) for arm in ("raw_pixels", "intensity_statistics") for n in (1, 3)}
    for row in rows.values():  # 500 and 800 on 200, noise 20: brightness says all
        assert row["dice"] > 0.95 and row["n_test"] == 3 and row["seeds"] == [0]
    assert "1 validation cases" in rows["raw_pixels", 3]["choice"]


def test_segmentation__of_what_brightness_does_not_tell(cohort: Cohort, tmp_path: Path) -> None:
    """Two structures alike in brightness: places alone tell them apart."""
    import nibabel

    folder = write_cohort(tmp_path / "c", train=3, val=1, test=3)
    for path in (folder / "images").iterdir():
        image = nibabel.load(path)
        bright = np.minimum(np.asarray(image.dataobj), 500).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(bright, image.affine), path)
    found = segmentation_controls(Cohort.load(folder), settings(), counts=[3], seeds=[0], folds=None)
    rows = {row["arm"]: row["dice"] for row in label_curve.summarise(found)["rows"]}
    assert rows["raw_pixels"] > rows["intensity_statistics"] + 0.2


def test_segmentation__of_folds_tests_every_patient_once(cohort: Cohort) -> None:
    found = segmentation_controls(cohort, settings(), counts=[2], seeds=[0, 1], folds=3)
    rows = label_curve.summarise(found)["rows"]
    assert len(found) == 2 * 3 * 2 and {row["n_test"] for row in rows} == {7} and rows[0]["seeds"] == [0, 1]


def test_labels_of_test_cases__have_no_part(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other labels the test cases are scored otherwise, and drawn the same."""
    from medssl.evaluation import pixel_controls

    drawn: list[np.ndarray] = []
    draw = pixel_controls._Drawer.draw
    monkeypatch.setattr(pixel_controls._Drawer, "draw", lambda self, *of: drawn.append(draw(self, *of)) or drawn[-1])
    labelled = pixel_controls._Drawer.labelled
    seen: list[int] = []
    monkeypatch.setattr(pixel_controls._Drawer, "labelled", lambda self, volume: seen.append(id(volume)) or labelled(self, volume))
    segmentation_controls(cohort, settings(), counts=[3], seeds=[0], folds=None)
    assert len(set(seen)) == 3  # training cases alone are counted
    assert len(drawn) == 2 * (5 + 3)  # five exponents on one validation case, then the three test cases


def boxes(n: int = 36, dims: int = 2) -> BoxSource:
    batches = Squares(n, dims)
    cases = batches.box_cases()
    names = {k: f"case{k:03d}" for k in range(n)}
    patients: dict[int, str | None] = {k: str(cases.groups[k]) for k in range(n)}  # type: ignore[index]
    return BoxSource(cases, batches, names, patients, {}, lambda: "", "", "case")


@pytest.mark.parametrize(("dims", "counts", "seeds"), [(2, [6, 12], [0, 1]), (3, [12], [0])])
def test_detection__finds_bright_and_dark_squares_and_fills_the_table_of_a_curve(
    dims: int, counts: list[int], seeds: list[int]
) -> None:
    found = detection_controls(boxes(dims=dims), counts=counts, seeds=seeds, folds=None)
    rows = {(row["arm"], row["labels"]): row for row in box_summary.summarise(found, intervals=False)["rows"]}
    assert set(rows) == {(arm, n) for arm in ("raw_pixels", "intensity_statistics") for n in counts}
    assert rows["intensity_statistics", 12]["value"] > 0.5 and rows["raw_pixels", 12]["seeds"] == seeds
    assert all(0 < score < 1 for case in found[0]["cases"] for _, _, score in case["found"])


def test_detection__of_noise_finds_little() -> None:
    source = boxes()
    batches: Any = source.batches
    rng = np.random.default_rng(0)
    batches.cases = [(rng.normal(size=image.shape).astype(np.float32), b, labels) for image, b, labels in batches.cases]
    found = detection_controls(source, counts=[12], seeds=[0], folds=None)
    assert all(row["value"] < 0.2 for row in box_summary.summarise(found, intervals=False)["rows"])


def test_box_classes__are_of_the_smaller_box_and_in_pixels_of_the_image() -> None:
    real = np.array([[0, 0, 8, 8], [2, 2, 4, 4], [8, 8, 12, 12]], dtype=float)
    case = WholeCase(
        torch.zeros(1, 1, 6, 6), np.array([2.0, 2.0]), np.zeros(2), real, np.array([0, 1, 0]), np.array([False, False, True])
    )
    wanted = np.zeros((6, 6), dtype=int)
    wanted[:4, :4], wanted[1:2, 1:2], wanted[4:, 4:] = 1, 2, -1
    assert box_classes(case).tolist() == wanted.tolist()
