"""Hashes of pixels, near duplicates and quality flags."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive.pixels.checks import (
    NEAR_DISTANCE,
    QUALITY_FLAGS,
    bit_count,
    content_hash,
    intensity_statistics,
    near_duplicate_groups,
    near_pairs,
    perceptual_hash,
    quality_flags,
)
from tests.synthetic import oblique_volume


def picture(shape: tuple[int, ...] = (40, 56), *, seed: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    """Return a smooth, asymmetric picture with some noise; the last axis may hold channels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.linspace(0, 1, shape[0]), np.linspace(0, 1, shape[1]), indexing="ij")
    base = 0.2 + 0.5 * rows * (1 - columns) + 0.2 * np.exp(-((rows - 0.3) ** 2 + (columns - 0.6) ** 2) * (20 + seed))
    base = base.reshape(*base.shape, *[1] * (len(shape) - 2)) + rng.normal(0, 0.01, shape)
    if np.dtype(dtype).kind == "f":
        return np.asarray(base.astype(dtype))
    return np.asarray((np.clip(base, 0, 1) * np.iinfo(dtype).max).astype(dtype))


def flags_of(array: np.ndarray, bits: int | None = None) -> tuple[str, ...]:
    return quality_flags(array, intensity_statistics(array), bits)


def distance(a: int, b: int) -> int:
    return bin(a ^ b).count("1")


# --- content hash


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "int64", "float32", "float64", ">i2", ">f8"])
def test_content_hash__same_values_in_any_type(dtype: str) -> None:
    array = oblique_volume((9, 8, 7))[0]
    assert content_hash(array.astype(dtype)) == content_hash(array)
    assert content_hash(np.asfortranarray(array.astype(dtype))) == content_hash(array)


def test_content_hash__differs_with_values_shape_and_order() -> None:
    array = oblique_volume((9, 8, 7))[0]
    changed = array.copy()
    changed[4, 4, 4] += 1
    others = [
        changed,
        array.reshape(9, 56),
        array[::-1],
        array.transpose(2, 1, 0),
        array + 0.5,
        -array,
        array.astype(np.int32) * 1000,
    ]
    assert len({content_hash(array), *map(content_hash, others)}) == len(others) + 1


def test_content_hash__edges_of_types() -> None:
    assert content_hash(np.array([0.0, 1.5])) == content_hash(np.array([-0.0, 1.5], np.float32))
    nan = np.array([np.nan, 1.0]), np.array([-np.nan, 1.0], np.float32)
    assert content_hash(nan[0]) == content_hash(nan[1]) != content_hash(np.array([np.inf, 1.0]))
    assert content_hash(np.array([1 << 20])) == content_hash(np.array([float(1 << 20)], np.float32))
    assert content_hash(np.array([3_000_000_000])) == content_hash(np.array([3e9], np.float32))
    assert content_hash(np.array([0.1])) != content_hash(np.array([0.1], np.float32))
    assert content_hash(np.array([True, False])) == content_hash(np.array([1, 0]))
    assert content_hash(np.zeros((0, 3))) != content_hash(np.zeros((3, 0)))
    assert len(content_hash(np.float64(3))) == 32


def test_content_hash__blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    array = picture((50, 40), dtype=np.float32)
    whole = content_hash(array)
    monkeypatch.setattr("medssl.archive.pixels.checks.BLOCK_VALUES", 64)
    assert content_hash(array) == whole


@pytest.mark.data
def test_content_hash__ten_orientations_are_one_image(shared_data: Path) -> None:
    import nibabel as nib

    hashes = set()
    for path in sorted((shared_data / "nifti_orientations").glob("*.nii.gz")):
        hashes.add(content_hash(np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)))
    assert len(hashes) == 1


# --- perceptual hash


def test_perceptual_hash__brute_force_cosine_transform() -> None:
    image = picture((64, 96)).astype(np.float64)
    low, high = np.percentile(image, [0.5, 99.5])
    small = np.clip(image, low, high).reshape(32, 2, 32, 3).mean(axis=(1, 3))
    values = []
    for total in range(32):
        for i in range(total + 1):
            basis = np.outer(
                np.cos(np.pi * (2 * np.arange(32) + 1) * i / 64), np.cos(np.pi * (2 * np.arange(32) + 1) * (total - i) / 64)
            )
            values.append(float((basis * small).sum()))
    bits = "".join("1" if value > 0 else "0" for value in values[1:65])
    assert perceptual_hash(image) == int(bits, 2)


def test_perceptual_hash__scale_offset_and_type_do_not_matter() -> None:
    image = picture((90, 70), dtype=np.uint16).astype(np.float64)
    base = perceptual_hash(image)
    assert {perceptual_hash(value) for value in (image * 3.7, image - 5000, (image * 0.01).astype(np.float32), image[None])} == {
        base
    }
    assert distance(base, perceptual_hash(image[:, ::-1])) > 10
    assert distance(base, perceptual_hash(-image)) > 50


def test_perceptual_hash__constant_is_zero_and_axes_are_checked() -> None:
    assert perceptual_hash(np.full((3, 20, 20), 7)) == 0 == perceptual_hash(np.full((20, 20), np.nan))
    clip = np.stack([picture((3, 40, 30), seed=i) for i in range(5)])
    assert distance(perceptual_hash(clip, "clip"), perceptual_hash(clip.mean(axis=0))) <= 1
    assert perceptual_hash(np.stack([picture()] * 3)) == perceptual_hash(picture())
    with pytest.raises(ValueError, match="volume with 2 axes"):
        perceptual_hash(picture(), "volume")
    for shape in ((1, 1), (1, 500), (5, 3), (31, 33)):
        assert 0 <= perceptual_hash(picture(shape)) < 1 << 64


def pictures(folder: Path, pattern: str) -> list[np.ndarray]:
    from PIL import Image

    found = []
    for path in sorted(folder.glob(pattern)):
        with Image.open(path) as image:
            if image.mode in ("L", "RGB"):
                found.append(np.asarray(image.convert("L")))
    return found


def copies(image: np.ndarray) -> list[np.ndarray]:
    """Return the same picture at half size, as JPEG of quality 60, and 10 % brighter and darker."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=60)
    half = Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2), Image.Resampling.BOX)
    bright = np.clip(image * 1.1, 0, 255).astype(np.uint8)
    return [np.asarray(half), np.asarray(Image.open(stream)), bright, (image * 0.9).astype(np.uint8)]


def separation(hashes: list[int], others: list[list[int]]) -> tuple[int, np.ndarray]:
    """Return the largest distance of copies and all distances of different images."""
    own = max(distance(a, b) for a, row in zip(hashes, others) for b in row)
    every = np.array(hashes, np.uint64)
    rows, columns = np.triu_indices(len(every), 1)
    return own, bit_count(every[rows] ^ every[columns])


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "pattern", "count", "copies_at_most", "pairs_within"),
    [
        # No two chest radiographs are confused. The pairs in the other two sets are the duplicates that their README mentions.
        ("cxr_hannover", "images/*.png", 34, 1, 0),
        ("us_breast_busi", "**/*.png", 22, 2, 1),
        ("bccd", "JPEGImages/*.jpg", 34, 2, 0),
    ],
)
def test_perceptual_hash__real_pictures(
    shared_data: Path, folder: str, pattern: str, count: int, copies_at_most: int, pairs_within: int
) -> None:
    images = pictures(shared_data / folder, pattern)[-34:]
    assert len(images) == count
    own, apart = separation([perceptual_hash(image) for image in images], [[perceptual_hash(c) for c in copies(i)] for i in images])
    assert own <= copies_at_most
    assert int((apart <= NEAR_DISTANCE).sum()) == pairs_within


@pytest.mark.data
def test_perceptual_hash__real_volumes(shared_data: Path) -> None:
    """On the 80 volumes that did not choose the coefficients: crops of one organ, the hardest case there is."""
    import nibabel as nib
    from skimage.transform import resize

    files = sorted(path for path in (shared_data / "msd_hippocampus").rglob("*.nii.gz") if "label" not in str(path))[120:]
    assert len(files) == 80
    volumes = [np.asarray(nib.load(path).dataobj, dtype=np.float64) for path in files]
    rng = np.random.default_rng(0)
    hashes, others = [], []
    for volume in volumes:
        hashes.append(perceptual_hash(volume, "volume"))
        half = resize(volume, [n // 2 for n in volume.shape], anti_aliasing=True)
        noisy = volume + rng.normal(0, 0.02 * np.percentile(volume, 99), volume.shape)
        others.append([perceptual_hash(copy, "volume") for copy in (volume * 1.1, volume * 0.9, noisy, half)])
    own = [[distance(a, b) for b in row] for a, row in zip(hashes, others)]
    assert max(max(row) for row in own) <= NEAR_DISTANCE
    _, apart = separation(hashes, [[value] for value in hashes])
    assert int((apart <= NEAR_DISTANCE).sum()) == 0 and apart.min() >= 5


# --- groups


def brute_force(hashes: list[int], limit: int) -> list[list[int]]:
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, a in enumerate(hashes):
        for j in range(i):
            if a and hashes[j] and distance(a, hashes[j]) <= limit:
                parent[max(root(i), root(j))] = min(root(i), root(j))
    groups: dict[int, list[int]] = {}
    for i, value in enumerate(hashes):
        if value:
            groups.setdefault(root(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


@pytest.mark.parametrize("limit", [0, 2, 4, 9])
def test_near_pairs__equal_brute_force(limit: int) -> None:
    rng = np.random.default_rng(limit)
    one = rng.integers(0, 1 << 63, 50, dtype=np.uint64)
    flips = np.array([[1 << int(bit) for bit in rng.integers(0, 64, 12)] for _ in range(150)], dtype=np.uint64)
    two = rng.choice(one, 150)
    for k in range(150):  # 0 to 12 bits away from one of them
        two[k] ^= np.bitwise_xor.reduce(flips[k, : k % 13])
    plain = {(i, j, distance(int(a), int(b))) for i, a in enumerate(one) for j, b in enumerate(two)}
    found = list(zip(*(column.tolist() for column in near_pairs(one, two, limit))))
    assert found == sorted(triple for triple in plain if triple[2] <= limit) and found
    assert (
        [len(column) for column in near_pairs(one, two[:0], limit)]
        == [0, 0, 0]
        == [len(c) for c in near_pairs(one[:0], two, limit)]
    )


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 7, 12])
def test_groups__equal_brute_force(limit: int) -> None:
    rng = np.random.default_rng(limit)
    base = rng.integers(1, 1 << 63, 60, dtype=np.uint64).tolist()
    hashes = [0, 0]
    for value in base:
        hashes.append(int(value))
        for _ in range(int(rng.integers(0, 4))):
            copy = int(value)
            for bit in rng.choice(64, int(rng.integers(0, 14)), replace=False):
                copy ^= 1 << int(bit)
            hashes.append(copy)
    rng.shuffle(hashes)
    assert near_duplicate_groups(hashes, limit) == brute_force(hashes, limit)


def test_groups__edges() -> None:
    assert near_duplicate_groups([]) == [] == near_duplicate_groups([0, 0, 5])
    assert near_duplicate_groups([5, 255 << 40, 5]) == [[0, 2]]
    with pytest.raises(ValueError, match="0 to 16 bits"):
        near_duplicate_groups([1], 17)


def test_groups__few_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def counting(values: np.ndarray) -> np.ndarray:
        compared.append(len(values))
        return bit_count(values)

    monkeypatch.setattr("medssl.archive.pixels.checks.bit_count", counting)
    shares = []
    for n in (1000, 50_000):
        values = np.random.default_rng(n).integers(1, 1 << 63, n, dtype=np.uint64)
        copies = values[: n // 100] ^ np.uint64(0b1011)
        compared.clear()
        assert len(near_duplicate_groups([*values.tolist(), *copies.tolist()])) == n // 100
        shares.append(sum(compared) / n**2)
    assert shares[0] < 0.01 and shares[1] < 0.001


def test_bit_count__all_positions() -> None:
    values = np.array([0, 1, 1 << 63, (1 << 64) - 1, 0x5555_5555_5555_5555], np.uint64)
    assert bit_count(values).tolist() == [0, 1, 1, 64, 32]


# --- statistics and flags


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_statistics__equal_numpy(offset: float) -> None:
    array = oblique_volume((20, 30, 10))[0].astype(np.float64) + offset
    array[0, 0, :3] = [np.nan, np.inf, -np.inf]
    values = array[np.isfinite(array)]
    found = intensity_statistics(array)
    expected = {"min": values.min(), "max": values.max(), "mean": values.mean(), "std": values.std(), "p50": np.median(values)}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    assert found["finite_fraction"] == len(values) / array.size
    assert intensity_statistics(np.full(3, np.nan)) == {"finite_fraction": 0.0} == intensity_statistics(np.zeros((0, 4)))


def test_flags__each_and_none() -> None:
    rng = np.random.default_rng(0)
    good = rng.integers(0, 200, (100, 120)).astype(np.uint8)
    blank = np.zeros((200, 200), np.uint8)
    blank[:6, :6] = 90
    saturated = np.minimum(good.astype(int) * 2, 255).astype(np.uint8)
    flat = (good // 64 + 100).astype(np.uint8)
    found = [flags_of(array, 8) for array in (good, np.full((9, 9), 3), blank, saturated, flat, np.full((4, 4), np.nan))]
    assert found == [(), ("constant_pixels",), ("blank", "low_contrast"), ("saturated",), ("low_contrast",), ("constant_pixels",)]
    assert {flag for row in found for flag in row} == set(QUALITY_FLAGS)
    # A black background is no saturation, and twelve bits of a wide type use little of sixteen.
    assert flags_of(np.where(good > 100, good, 0), 8) == ()
    assert flags_of(good, 16) == ("low_contrast",)


@pytest.mark.data
def test_flags__real_radiographs_have_none_but_one(shared_data: Path) -> None:
    found = [flags_of(image, 8) for image in pictures(shared_data / "cxr_hannover", "images/*.png")]
    assert len(found) == 34 and sum(bool(row) for row in found) <= 1


def test_imports__no_torch_and_no_monai() -> None:
    heavy = {"torch", "monai", "SimpleITK", "av", "openslide"}
    code = f"""
import sys
import medssl.archive.pixels.burned_in, medssl.archive.pixels.checks, medssl.archive.pixels.found
assert not {heavy} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)
