"""The matchers on phantoms: card alice, sections 10.1 and 10.2, and what they share."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssl.domains.mri import MRI
from medssl.errors import RequestError
from medssl.matching.affine import AffineMatcher
from medssl.matching.base import MatchVolume
from medssl.matching.body_axis import BodyAxisMatcher
from medssl.matching.embedding import EmbeddingMatcher
from medssl.types import ImageMeta, Sample
from tests.matching import toy


def errors_mm(matcher: object, seeds: list[int], spacing: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors at organ centres over all ordered pairs, and those of "same coordinates"."""
    made = [toy.phantom(seed, spacing=spacing) for seed in seeds]
    volumes = [MatchVolume.of_sample(sample) for sample, _ in made]
    found, same = [], []
    for i, a in enumerate(volumes):
        for j, b in enumerate(volumes):
            if i != j:
                matches = matcher.match(a, made[i][1], b)  # type: ignore[attr-defined]
                found.append(np.linalg.norm(matches.points_mm - made[j][1], axis=1))
                same.append(np.linalg.norm(made[i][1] - made[j][1], axis=1))
    return np.concatenate(found), np.concatenate(same)


@pytest.mark.slow
def test_trained_embedding__finds_organ_centres(tmp_path: Path) -> None:
    """Card 10.1: under 2 voxels at 2 mm after a few hundred small steps; the same coordinates are off by the spread of the shifts."""
    reader = toy.filled(tmp_path / "store", range(16))
    model = toy.make_objective()
    toy.train(model, toy.pair_source(reader), steps=200)
    run = toy.save(model, tmp_path / "run")
    matcher = EmbeddingMatcher(run)
    found, same = errors_mm(matcher, [100, 101, 102, 103], spacing=2.0)
    assert same.mean() > 2 * toy.SHIFT_MM * 0.8
    assert found.mean() < 2 * toy.SPACING
    sample, centres = toy.phantom(104)
    volume = MatchVolume.of_sample(sample)
    itself = matcher.match(volume, centres, volume)
    assert np.linalg.norm(itself.points_mm - centres, axis=1).max() <= 4.0 / 32
    assert itself.scores.min() > 0.999
    eight = EmbeddingMatcher(run, step_mm=8)
    coarse, _ = errors_mm(eight, [100, 101, 102], spacing=2.0)
    assert coarse.mean() < 2 * toy.SPACING, "8 mm cells with refinement inside them"


@pytest.mark.parametrize("matcher", [BodyAxisMatcher(), AffineMatcher(step_mm=8.0)], ids=["body_axis", "affine"])
def test_untrained_matchers__beat_the_same_coordinates(matcher: object) -> None:
    found, same = errors_mm(matcher, [0, 1, 2])
    assert np.isfinite(found).all()
    assert found.mean() < 0.4 * same.mean()


@pytest.mark.parametrize("matcher", [BodyAxisMatcher(), AffineMatcher(step_mm=8.0)], ids=["body_axis", "affine"])
def test_untrained_matchers__self_match(matcher: object) -> None:
    sample, centres = toy.phantom(0, spacing=4.0)
    volume = MatchVolume.of_sample(sample)
    found = matcher.match(volume, centres, volume)  # type: ignore[attr-defined]
    assert np.linalg.norm(found.points_mm - centres, axis=1).max() < 0.5
    assert found.scores.min() > 0.99
    air = matcher.match(volume, volume.to_world(np.array([[1.0, 1.0, 1.0]])), volume)  # type: ignore[attr-defined]
    assert air.scores.tolist() == [0] and np.isnan(air.points_mm).all()


def stored_otherwise(sample: Sample, path: Path, order: tuple[int, int, int], flips: tuple[int, ...]) -> Path:
    """Write a volume with its axes permuted and flipped, and the affine that says so; nibabel does both."""
    image = nib.Nifti1Image(sample.image[0], sample.affine)  # type: ignore[attr-defined, no-untyped-call]
    orientation = np.array([[axis, -1 if k in flips else 1] for k, axis in enumerate(order)])
    nib.save(image.as_reoriented(orientation), path)  # type: ignore[attr-defined, no-untyped-call]
    return path


@pytest.mark.parametrize(
    ("order", "flips"),
    [
        pytest.param((0, 1, 2), (0, 1), marks=pytest.mark.slow),
        pytest.param((2, 0, 1), (), marks=pytest.mark.slow),
        ((1, 2, 0), (0, 2)),
    ],
)
def test_frame__permuted_and_flipped_storage_does_not_move_a_match(
    untrained: Path, tmp_path: Path, order: tuple[int, int, int], flips: tuple[int, ...]
) -> None:
    """Card 10.2: by one fine cell (2 x 2 mm) at most; a reader that canonicalises moves nothing at all."""
    a, centres = toy.phantom(0, spacing=4.0)
    b, _ = toy.phantom(1, spacing=4.0)
    path = stored_otherwise(b, tmp_path / "b.nii.gz", order, flips)
    stored = nib.load(path)  # type: ignore[attr-defined]
    assert nib.aff2axcodes(stored.affine) != ("R", "A", "S")  # type: ignore[attr-defined, no-untyped-call]
    again = MRI().read([path], series_id="b" * 32)
    matcher = EmbeddingMatcher(untrained)
    source = MatchVolume.of_sample(a)
    first = matcher.match(source, centres, MatchVolume.of_sample(b))
    second = matcher.match(source, centres, MatchVolume.of_sample(again))
    assert np.isfinite(first.points_mm).all()
    assert np.abs(first.points_mm - second.points_mm).max() <= 4.0
    np.testing.assert_allclose(first.points_mm, second.points_mm, atol=1e-3)


@pytest.mark.parametrize("matcher", ["embedding", "body_axis", "affine"])
def test_frame__a_turned_world_turns_the_match_with_it(untrained: Path, matcher: str) -> None:
    """The voxels stay, the affine of B is turned by 8 degrees and moved: world points must follow it."""
    angle = np.deg2rad(8.0)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = (30, -20, 55)
    a, centres = toy.phantom(0, spacing=4.0)
    b, _ = toy.phantom(1, spacing=4.0)
    assert b.affine is not None
    turned = Sample(b.image, b.spacing_mm, turn @ b.affine, b.valid, b.meta)
    tool = {
        "embedding": lambda: EmbeddingMatcher(untrained),
        "body_axis": BodyAxisMatcher,
        "affine": lambda: AffineMatcher(step_mm=8.0),
    }[matcher]()
    source = MatchVolume.of_sample(a)
    first = tool.match(source, centres, MatchVolume.of_sample(b)).points_mm
    second = tool.match(source, centres, MatchVolume.of_sample(turned)).points_mm
    expected = first @ turn[:3, :3].T + turn[:3, 3]
    assert np.linalg.norm(second - expected, axis=1).max() < (4.0 if matcher == "affine" else 0.01)


def test_volumes_of_different_length__score_low_on_the_body_axis() -> None:
    sample, centres = toy.phantom(0, spacing=4.0)
    half = Sample(sample.image[..., :16], sample.spacing_mm, sample.affine, None, sample.meta)
    whole = MatchVolume.of_sample(sample)
    found = BodyAxisMatcher().match(whole, centres, MatchVolume.of_sample(half))
    assert found.scores.max() < 0.6


def box_body(low: tuple[int, ...], high: tuple[int, ...]) -> MatchVolume:
    """A body that is a box of voxels of 2 mm, in air."""
    image = np.zeros((32, 32, 32), dtype=np.int16)
    image[tuple(slice(a, b) for a, b in zip(low, high))] = 1000
    meta = ImageMeta("a" * 32, "mri", "MR", "arbitrary", 2, {"min": 500.0})
    return MatchVolume.of_sample(Sample(image[None], (2.0,) * 3, np.diag([2.0, 2.0, 2.0, 1.0]), None, meta))


def test_body_axis__formula() -> None:
    """A quarter, a half and three quarters of the way through one box lie as far through the other; the edges' worst ratio is the score."""
    a, b = box_body((4, 6, 2), (20, 22, 26)), box_body((8, 6, 4), (28, 22, 20))
    point = a.to_world(np.array([[8 + 0.25 * 32, 12 + 0.5 * 32, 4 + 0.75 * 48]]))
    found = BodyAxisMatcher(step_mm=2.0).match(a, point, b)
    np.testing.assert_allclose(b.to_item(found.points_mm), [[16 + 0.25 * 40, 12 + 0.5 * 32, 8 + 0.75 * 32]])
    assert found.scores.tolist() == [pytest.approx(32 / 48)]


def test_affine__too_few_voxels_is_a_sentence() -> None:
    sample, centres = toy.phantom(0, spacing=4.0)
    volume = MatchVolume.of_sample(sample)
    with pytest.raises(RequestError, match="are too few to register; give the matcher affine a smaller step_mm"):
        AffineMatcher(step_mm=60).match(volume, centres, volume)


def test_images_and_clips__are_no_volumes() -> None:
    sample, _ = toy.phantom(0, spacing=8.0)
    with pytest.raises(RequestError, match="is no volume but of the kind"):
        MatchVolume.of_sample(Sample(sample.image[0], (1.0, 1.0), None, None, sample.meta))
