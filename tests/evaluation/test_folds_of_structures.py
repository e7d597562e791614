"""Folds of segmentation: what only some patients have is in the training part of every fold where that can be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import RequestError
from medssl.evaluation.cohort import Case, Cohort
from medssl.evaluation.finetune import reader_of
from medssl.evaluation.label_curve import claim, deals, presence, uneven
from medssl.evaluation.scores import patient_folds, presence_folds
from medssl.evaluation.segmentation_settings import FinetuneSettings
from tests.evaluation.tiny_cohort import TINY_ENCODER, tiny_volume, write_nifti


@pytest.mark.parametrize(("owners", "folds"), [(2, 4), (2, 5), (3, 3), (3, 5), (4, 5), (7, 5)])
def test_presence_folds__leave_a_rare_structure_in_every_training_part(owners: int, folds: int) -> None:
    patients = [f"p{k:02d}" for k in range(23)]
    for seed in range(20):
        present = [{1, 2} if k < owners else {1} for k in np.random.default_rng(seed).permutation(23)]
        found = presence_folds(patients, present, folds=folds, seed=seed)
        for k in range(folds):
            train = ~np.isin(found, (k, (k + 1) % folds))
            assert any(2 in own for own, inside in zip(present, train, strict=True) if inside)
        sizes = np.bincount(found, minlength=folds)
        held = np.bincount(found[[2 in own for own in present]], minlength=folds)
        assert sizes.max() - sizes.min() <= 1 and held.max() - held.min() <= 1


def test_presence_folds__keep_patients_whole_and_are_drawn_anew() -> None:
    patients = [f"p{k // 2}" for k in range(24)]
    present = [{1} if k < 20 else {1, 2 + k % 2} for k in range(24)]
    one, again, other = (presence_folds(patients, present, folds=4, seed=seed) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any() and (one[::2] == one[1::2]).all()


def test_presence_folds__of_patients_alike_are_those_of_before() -> None:
    patients = [f"p{k // 2}" for k in range(20)]
    found = presence_folds(patients, [{1, 2}] * 20, folds=5, seed=3)
    assert (found == patient_folds(np.zeros(20), patients, folds=5, seed=3)).all()


@pytest.fixture
def few(tmp_path: Path) -> Cohort:
    """Eight volumes, of which three have the second structure; any two folds that do not train hold two volumes each."""
    cases = []
    for number in range(8):
        image, label = tiny_volume(number, (16, 16, 16))
        if number not in (1, 4, 6):
            label[label == 2] = 0
        write_nifti(tmp_path / "images" / f"v{number}.nii.gz", image)
        write_nifti(tmp_path / "labels" / f"v{number}.nii.gz", label)
        path = Path("images") / f"v{number}.nii.gz"
        cases.append(
            Case(f"case{number:04d}", tmp_path / path, tmp_path / "labels" / path.name, f"p{number}", "train", patient_known=True)
        )
    return Cohort("few", tuple(cases))


def test_deals__have_every_structure_in_each_training_part(few: Cohort) -> None:
    reader = reader_of(FinetuneSettings(encoder=TINY_ENCODER))
    present = presence(few, reader)
    assert uneven(few, present) == [2] and uneven(few, None) == []
    seeds = range(12)

    def lacking(dealt: dict[tuple[int, int | None], Cohort]) -> int:
        return sum(all(2 not in present[case.id] for case in one.split("train")) for one in dealt.values())

    assert lacking(deals(few, 4, seeds, present)) == 0 < lacking(deals(few, 4, seeds))


def test_claim__refuses_folds_that_an_earlier_version_dealt(few: Cohort, tmp_path: Path) -> None:
    settings, out = FinetuneSettings(encoder=TINY_ENCODER), tmp_path / "out"
    claim(out, few, settings, {"scratch": None}, 4)
    cell = out / "cells" / "scratch_n2_s0_f0" / "results.json"
    cell.parent.mkdir(parents=True)
    cell.write_text(json.dumps({}))
    with pytest.raises(RequestError, match="folds dealt without regard to structures"):
        claim(out, few, settings, {"scratch": None}, 4, balanced_by=[2])
    claim(out, few, settings, {"scratch": None}, 4)
