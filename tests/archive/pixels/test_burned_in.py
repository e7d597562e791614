"""Suspicion of text in pixels: lines, markers, clips; real pictures that were looked at by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.burned_in import OWN_TEXT, draw
from medssl.archive.pixels.burned_in import FEATURES, WEIGHTS, find_text, text_lines

WORDS = ["MUSTERMANN, ERIKA", "03.11.1957  ID 4711852"]


def tissue(shape: tuple[int, int] = (200, 320), seed: int = 0) -> np.ndarray:
    """Return smooth structures with fine noise, uint8, not brighter than 160."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=shape), 12)
    return np.asarray(np.clip(70 + 600 * smooth + rng.normal(0, 4, shape), 0, 160).astype(np.uint8))


def written(array: np.ndarray, size: int = 16, seed: int = 0) -> np.ndarray:
    return draw(array, size, np.random.default_rng(seed), WORDS).array


@pytest.mark.parametrize("size", [12, 20, 32])
def test_text__is_suspected_where_it_is_and_clean_pictures_are_not(size: int) -> None:
    clean = tissue()
    drawn = draw(clean, size, np.random.default_rng(size), WORDS)
    assert not find_text(clean).suspected
    found = find_text(drawn.array)
    assert found.suspected and found.score >= 0.5
    (top, left, bottom, right), *_ = found.boxes
    assert any(top < b[2] and b[0] < bottom and left < b[3] and b[1] < right for b in drawn.boxes)


def test_text__scale_type_polarity_and_channels_do_not_matter() -> None:
    picture = written(tissue())
    forms = [picture.astype(np.float32) * 0.01 - 3, picture.astype(np.int16) * 12 - 1024, 255 - picture, np.stack([picture] * 3)]
    score = find_text(picture).score
    assert [find_text(form).score == pytest.approx(score, abs=0.02) for form in forms] == [True] * 4


def test_one_letter__is_a_marker_and_no_text() -> None:
    picture = draw(tissue((400, 400)) // 2, 40, np.random.default_rng(3), ["L"])
    found = find_text(picture.array)
    assert found.marker and not found.suspected and not find_text(tissue((400, 400)) // 2).marker


def test_clip__only_what_stays_counts() -> None:
    moving = np.stack([tissue(seed=k) for k in range(6)])
    steady = np.stack([written(frame) for frame in moving])
    assert find_text(steady, "clip").suspected and find_text(steady[:, None], "clip").suspected
    passing = moving.copy()
    passing[2] = written(moving[2])
    assert not find_text(moving, "clip").suspected and not find_text(passing, "clip").suspected


def test_edges__constant_tiny_and_malformed() -> None:
    for array in (np.zeros((40, 40)), np.full((40, 40), np.nan), np.arange(100).reshape(10, 10)):
        found = find_text(array)
        assert found.score == 0 and not found.suspected and not found.marker and found.boxes == ()
    with pytest.raises(ValueError, match="image with 4 axes"):
        find_text(np.zeros((2, 2, 20, 20)))
    with pytest.raises(ValueError, match="'volume'; image and clip are accepted"):
        find_text(np.zeros((20, 20, 20)), "volume")


def test_lines__features_are_finite_and_weighted_by_name() -> None:
    lines = text_lines(written(tissue()))
    assert set(WEIGHTS) == set(FEATURES) and lines
    assert all(len(line.features) == len(FEATURES) and np.isfinite(line.features).all() for line in lines)
    assert [line.score for line in lines] == sorted((line.score for line in lines), reverse=True)


@pytest.mark.data
def test_real_pictures__with_words_of_their_own(shared_data: Path) -> None:
    """Looked at by eye: words on two radiographs and two ultrasound images, none on four others with a side marker or a logo."""
    from PIL import Image

    def grey(name: str) -> np.ndarray:
        (path,) = [path for path in shared_data.glob(f"*/**/{name}*.png") if "mask" not in path.name]
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))

    words = ("436a6348", "865336ed", "benign_259", "benign_306")
    assert set(words) <= set(OWN_TEXT)
    assert [find_text(grey(name)).suspected for name in words] == [True] * 4
    assert [find_text(grey(name)).suspected for name in ("90c1e3ef", "8da14fff", "malignant_4", "normal_48")] == [False] * 4
