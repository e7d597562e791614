from __future__ import annotations

import numpy as np
import pytest

from medssl.phantoms import ORGAN_NAMES, draw_phantom, labelled_toy_phantoms, phantom_volume, toy_phantoms
from medssl.phantoms.body import rotation, smooth_field
from medssl.seeding import counter_rng


@pytest.fixture(scope="module")
def phantoms() -> list:
    return [draw_phantom(seed) for seed in range(16)]


def test_phantom_volume__same_seed_same_voxels() -> None:
    image, labels, spacing = phantom_volume(7)
    again, labels_again, spacing_again = phantom_volume(7)
    other, _, _ = phantom_volume(8)
    assert np.array_equal(image, again) and np.array_equal(labels, labels_again) and spacing == spacing_again
    assert not np.array_equal(image, other)
    assert image.dtype == np.float32 and labels.dtype == np.uint8
    assert image.shape == labels.shape == (64, 56, 48)
    assert np.isfinite(image).all() and image.min() >= 0


def test_draw_phantom__every_organ_is_there_in_every_patient(phantoms: list) -> None:
    for phantom in phantoms:
        counts = np.bincount(phantom.labels.ravel(), minlength=len(ORGAN_NAMES) + 1)
        assert len(counts) == len(ORGAN_NAMES) + 1
        assert (counts[1:] > 50).all()
        voxel_ml = np.prod(phantom.spacing_mm) / 1000
        assert phantom.organ_ml()["liver"] == pytest.approx(counts[1] * voxel_ml)


def test_draw_phantom__organs_lie_on_the_right_side_of_ras_axes(phantoms: list) -> None:
    centres = {
        name: np.mean([np.argwhere(p.labels == k).mean(0) / p.labels.shape for p in phantoms], axis=0)
        for k, name in enumerate(ORGAN_NAMES, start=1)
    }
    assert centres["liver"][0] > 0.55 > 0.45 > centres["spleen"][0]  # right is +X
    assert centres["kidney_right"][0] > 0.55 > 0.45 > centres["kidney_left"][0]
    assert centres["kidney_left"][1] < 0.4 < centres["bladder"][1]  # anterior is +Y
    assert centres["heart"][2] > 0.8 > 0.25 > centres["bladder"][2]  # superior is +Z


def test_draw_phantom__anatomy_varies_between_patients(phantoms: list) -> None:
    liver_ml = np.array([p.organ_ml()["liver"] for p in phantoms])
    assert 0.1 < liver_ml.std() / liver_ml.mean() < 0.6
    middles = np.array([np.argwhere(p.labels == 2).mean(0) * p.spacing_mm for p in phantoms])
    assert (middles.std(axis=0) > 2).all()  # mm
    spacings = np.array([p.spacing_mm for p in phantoms])
    assert ((spacings > 2.0) & (spacings < 3.6)).all()
    assert len(np.unique(spacings[:, 0])) == len(phantoms)
    assert (np.abs(spacings[:, 2] / spacings[:, 0] - 1) > 0.01).mean() > 0.7  # not cubic


def test_draw_phantom__brightness_alone_finds_no_organ(phantoms: list) -> None:
    edges = np.linspace(-4, 4, 81)
    images = [(p.image - p.image[p.image > 0.2].mean()) / p.image[p.image > 0.2].std() for p in phantoms]
    bins = [np.digitize(image.clip(-3.99, 3.99), edges) - 1 for image in images]
    counts = np.zeros((len(ORGAN_NAMES) + 1, 80))
    for phantom, index in list(zip(phantoms, bins))[:12]:
        for k in range(len(counts)):
            counts[k] += np.bincount(index[phantom.labels == k], minlength=80)
    likelihood = counts / counts.sum(axis=1, keepdims=True)
    dice = []
    for phantom, index in list(zip(phantoms, bins))[12:]:
        guess = likelihood[:, index].argmax(axis=0)  # every class equally likely beforehand, or all would be background
        for k in range(1, len(counts)):
            hit, truth = guess == k, phantom.labels == k
            dice.append(2 * (hit & truth).sum() / (hit.sum() + truth.sum()))
    assert np.mean(dice) < 0.2


def test_draw_phantom__attributes_show_in_the_anatomy() -> None:
    ratios = {flag: [] for flag in (False, True)}
    for seed in range(6):
        for flag in (False, True):
            ml = draw_phantom(seed, small_kidney=flag).organ_ml()
            pair = sorted((ml["kidney_left"], ml["kidney_right"]))
            ratios[flag].append(pair[0] / pair[1])
    assert np.mean(ratios[True]) < 0.6 < 0.7 < np.mean(ratios[False])

    def bright_share(fatty: bool) -> float:
        shares = []
        for seed in range(4):
            image = draw_phantom(seed, fatty=fatty).image
            shares.append(float((image > 0.75).mean() / (image > 0.2).mean()))
        return float(np.mean(shares))

    assert bright_share(True) > bright_share(False) + 0.05


def test_draw_phantom__too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 voxels"):
        draw_phantom(0, size=(8, 32, 32))


def test_smooth_field__is_standardised_and_smooth() -> None:
    field = smooth_field(counter_rng("test"), (40, 30, 20), (5, 5, 5))
    assert field.shape == (40, 30, 20) and field.dtype == np.float32
    assert field.mean() == pytest.approx(0, abs=1e-5) and field.std() == pytest.approx(1, abs=1e-4)
    assert np.abs(np.diff(field, axis=0)).max() < 1.0


def test_rotation__turns_x_to_y_about_z() -> None:
    assert rotation(np.array([0, 0, 90.0])) @ [1, 0, 0] == pytest.approx([0, 1, 0])
    matrix = rotation(np.array([10.0, -20.0, 30.0]))
    assert matrix @ matrix.T == pytest.approx(np.eye(3)) and np.linalg.det(matrix) == pytest.approx(1)


def test_toy_phantoms__are_z_scored_and_independent_of_their_number() -> None:
    many, labels = labelled_toy_phantoms(12, seed=3)
    assert many.shape == (12, 1, 32, 32, 32) and many.dtype == np.float32
    assert many.mean(axis=(1, 2, 3, 4)) == pytest.approx(np.zeros(12), abs=1e-4)
    assert many.std(axis=(1, 2, 3, 4)) == pytest.approx(np.ones(12), abs=1e-4)
    assert np.array_equal(toy_phantoms(4, seed=3), many[:4])
    assert not np.array_equal(toy_phantoms(4, seed=4), many[:4])
    assert all(set(np.unique(one)) == {0, 1, 2, 3} for one in labels)


def test_toy_phantoms__mean_atlas_error_is_that_of_the_reference() -> None:
    """Card A10.4: predicting zero costs 1.02, the voxel-wise mean of the training phantoms about 0.18 to 0.20."""
    train, held_out = toy_phantoms(128), toy_phantoms(32, seed=1)
    assert ((held_out - train.mean(axis=0)) ** 2).mean() == pytest.approx(0.19, abs=0.03)
    assert (held_out**2).mean() == pytest.approx(1.0, abs=0.02)
