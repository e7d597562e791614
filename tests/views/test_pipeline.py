from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from medssl.errors import RequestError
from medssl.types import Box, DrawKey, ViewSpec
from medssl.views.pipeline import Crop, VolumeViews

from .crops import make_crop, neutral

STATS = {"mean": 80.0, "std": 25.0, "p00_5": 20.0, "p99_5": 180.0, "min": 3.0, "max": 250.0}
EVERYTHING: dict[str, Any] = {
    "flip": 0.5,
    "rotate_deg": 15,
    "scale": (0.8, 1.25),
    "warp": {"amplitude": 0.03},
    "noise_std": 0.1,
    "gamma": (0.7, 1.5),
    "brightness": 0.2,
    "contrast": (0.8, 1.25),
    "bias_field": {"amplitude": 0.3},
}


def random_volume(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def ramp(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """(3, *shape) float32: the position in mm of each voxel centre along X, Y, Z."""
    axes = [(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing_mm)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def run(views: VolumeViews, crop: Crop, **params: Any) -> dict[str, torch.Tensor]:
    """Apply one parameter set to one crop; leading axes dropped."""
    out = views.apply([crop], [[neutral(**params)]], "cpu", points=True)
    return {key: value[0, 0] for key, value in out.items()}


# ---- indexing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_all_off__is_bit_equal_to_the_source(dtype: Any) -> None:
    volume = random_volume((2, 20, 17, 15), dtype=dtype)
    views = VolumeViews(size=(8, 6, 5), normalize="none")
    crop = make_crop(volume, (0.7, 1.0, 2.5), views, centre_mm=(10 * 0.7, 8.0, 7.5 * 2.5))
    data, valid, spacing, positions = views.batch([crop], "cpu")
    assert data["volume"].dtype == torch.float32 and data["volume"].shape == (1, 1, 2, 8, 6, 5)
    assert np.array_equal(data["volume"][0, 0].numpy(), volume[:, 6:14, 5:11, 5:10].astype(np.float32))
    assert bool(valid.all()) and valid.shape == (1, 1, 8, 6, 5)
    assert spacing.dtype == torch.float64 and spacing[0, 0].tolist() == [0.7, 1.0, 2.5]
    assert positions[0, 0].tolist() == pytest.approx([7.0, 8.0, 18.75])


def test_apply__leaves_the_crop_untouched() -> None:
    volume = random_volume((1, 16, 16, 16), dtype=np.float32)
    views = VolumeViews(size=8, normalize="zscore", **EVERYTHING)
    for off in (VolumeViews(size=8, noise_std=1), views):
        crop = make_crop(volume, (1, 1, 1), off, stats=STATS)
        before = crop.image.copy()
        off.batch([crop], "cpu")
        assert np.array_equal(crop.image, before)


def test_flip__equals_numpy_flip_and_is_exact() -> None:
    volume = random_volume((1, 9, 8, 7))
    views = VolumeViews(size=(9, 8, 7), normalize="none", flip=(1, 0, 1))
    crop = make_crop(volume, (1, 2, 3), views)
    data, _, _, _ = views.batch([crop], "cpu")
    assert np.array_equal(data["volume"][0, 0].numpy(), volume[:, ::-1, :, ::-1].astype(np.float32))
    crop.valid[0] = False
    out = run(views, crop, flip=[True, False, False])
    assert not bool(out["valid"][-1].any()) and bool(out["valid"][:-1].all())


def test_crop_with_margin__is_indexed_exactly_when_nothing_moves() -> None:
    volume = random_volume((1, 30, 30, 30))
    views = VolumeViews(size=8, normalize="none", rotate_deg=30)
    crop = make_crop(volume, (1.5, 1.5, 1.5), views)
    assert crop.image.shape[1] > 12
    assert np.array_equal(run(views, crop)["volume"].numpy(), volume[:, 11:19, 11:19, 11:19].astype(np.float32))


def test_read_only_crop__is_accepted_without_a_warning() -> None:
    views = VolumeViews(size=4, normalize="none")
    crop = make_crop(random_volume((1, 6, 6, 6)), (1, 1, 1), views)
    crop.image.flags.writeable = False
    crop.valid = crop.valid[::1]
    crop.valid.flags.writeable = False
    assert views.batch([crop], "cpu")[0]["volume"].shape == (1, 1, 1, 4, 4, 4)


# ---- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "planes"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
def test_rotation_by_90_degrees__equals_rot90(axis: int, planes: tuple[int, int]) -> None:
    volume = random_volume((1, 10, 10, 10))
    views = VolumeViews(size=10, normalize="none", rotate_deg=90)
    angles = [0.0, 0.0, 0.0]
    angles[axis] = 90.0
    out = run(views, make_crop(volume, (1.3, 1.3, 1.3), views), rotate_deg=angles)
    # the view looks along axes turned by +90 degrees, so its content turns by -90
    expected = np.rot90(volume[0].astype(np.float32), k=-1, axes=planes)
    assert np.abs(out["volume"][0].numpy() - expected).max() < 0.02
    assert bool(out["valid"].all())


def test_rotation_with_flip__flips_in_the_frame_of_the_view() -> None:
    volume = random_volume((1, 10, 10, 10))
    views = VolumeViews(size=10, normalize="none", rotate_deg=90)
    crop = make_crop(volume, (1, 1, 1), views)
    both = run(views, crop, rotate_deg=[0.0, 0.0, 90.0], flip=[True, False, False])["volume"]
    turned = run(views, crop, rotate_deg=[0.0, 0.0, 90.0])["volume"]
    assert torch.allclose(both, turned.flip(1), atol=0.02)


@pytest.mark.parametrize("out_mm", [(1.0, 1.0, 1.0), (2.0, 0.5, 1.7), (0.6, 3.0, 4.0)])
def test_spacing__keeps_millimetres(out_mm: tuple[float, float, float]) -> None:
    own = (0.8, 1.25, 3.0)
    volume = ramp((60, 40, 20), own)
    views = VolumeViews(size=(9, 7, 6), spacing_mm=out_mm, normalize="none")
    assert views.box_size_mm(own) == pytest.approx(np.multiply((9, 7, 6), out_mm))
    centre = np.array([23.1, 24.7, 30.3])
    crop = make_crop(volume, own, views, centre_mm=centre)
    out = run(views, crop)
    for axis in range(3):
        offset = (np.arange(views.size[axis]) + 0.5 - views.size[axis] / 2) * out_mm[axis]
        expected = (centre[axis] + offset).reshape([-1 if a == axis else 1 for a in range(3)])
        assert np.abs(out["volume"][axis].numpy() - expected).max() < 1e-4
    assert bool(out["valid"].all())
    assert out["spacing_mm"].tolist() == pytest.approx(out_mm)
    assert torch.allclose(out["points_mm"], out["volume"], atol=1e-3)


def test_points__are_where_the_voxels_come_from_under_every_operation() -> None:
    own = (0.8, 1.0, 2.0)
    volume = ramp((100, 90, 60), own)
    views = VolumeViews(size=(20, 24, 16), spacing_mm=1.1, normalize="none", rotate_deg=30, scale=(0.7, 1.4), warp={})
    crop = make_crop(volume, own, views)
    warp = {"amplitude": 0.03, "exponent": 5.0, "seed": 5}
    out = run(views, crop, rotate_deg=[20.0, -25.0, 30.0], scale=1.3, flip=[False, True, False], warp=warp)
    assert bool(out["valid"].all())
    assert torch.allclose(out["points_mm"], out["volume"], atol=2e-3)
    still = run(views, crop, rotate_deg=[20.0, -25.0, 30.0], scale=1.3, flip=[False, True, False])
    moved = torch.linalg.vector_norm(out["points_mm"] - still["points_mm"], dim=0)
    assert 0.2 < float(moved.mean()) < 3  # mm; the warp does something


def test_spacing_within_tolerance__is_indexed_and_beyond_is_interpolated() -> None:
    volume = random_volume((1, 12, 12, 12))
    own = (1.0, 1.0, 1.0)
    close = VolumeViews(size=6, spacing_mm=1 + 5e-7, normalize="none")
    assert close.margin_mm(own) == (0, 0, 0)
    assert np.array_equal(run(close, make_crop(volume, own, close))["volume"].numpy(), volume[:, 3:9, 3:9, 3:9])
    other = VolumeViews(size=6, spacing_mm=1.01, normalize="none")
    assert other.margin_mm(own) > (0.9, 0.9, 0.9)
    assert not np.array_equal(run(other, make_crop(volume, own, other))["volume"].numpy(), volume[:, 3:9, 3:9, 3:9])


def test_box_between_voxels__is_interpolated() -> None:
    own = (1.0, 1.0, 1.0)
    views = VolumeViews(size=4, normalize="none", rotate_deg=5)
    out = run(views, make_crop(ramp((20, 20, 20), own), own, views, centre_mm=(10.3, 10.0, 10.0)))
    assert out["volume"][0, :, 0, 0].tolist() == pytest.approx([8.8, 9.8, 10.8, 11.8], abs=1e-4)


def test_margin__is_zero_without_geometry() -> None:
    views = VolumeViews(
        size=16, flip=0.5, noise_std=1, gamma=(0.5, 2), contrast=(0.5, 2), bias_field={}, mask={"ratio": 0.5, "cell": 4}
    )
    assert views.margin_mm((1, 2, 3)) == (0.0, 0.0, 0.0)
    assert VolumeViews(size=16, warp={"amplitude": 0}).margin_mm((1, 2, 3)) == (0.0, 0.0, 0.0)
    assert VolumeViews(size=16, warp={"probability": 0}).margin_mm((1, 2, 3)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("rotate", [0, (0, 0, 45), 20])
@pytest.mark.parametrize("amplitude", [0, 0.03, 0.3])
def test_margin__is_enough_for_the_largest_operations(rotate: Any, amplitude: float) -> None:
    own = (1.0, 1.2, 2.5)
    views = VolumeViews(
        size=(16, 12, 8),
        spacing_mm=(1.1, 1.0, 2.0),
        normalize="none",
        rotate_deg=rotate,
        scale=(0.9, 1.3),
        warp={"amplitude": amplitude},
    )
    volume = np.ones((1, 120, 100, 60), dtype=np.uint8)
    crop = make_crop(volume, own, views, centre_mm=(60.2, 59.9, 75.3))
    assert crop.valid.all()
    limits = views.rotate_deg
    rng = np.random.default_rng(0)
    for trial in range(12):
        signs = rng.choice([-1.0, 1.0], 3) if trial < 8 else rng.uniform(-1, 1, 3)
        warp = {"amplitude": amplitude, "exponent": 5.0, "seed": trial} if amplitude else None
        out = run(views, crop, rotate_deg=[float(a * b) for a, b in zip(signs, limits)], scale=1.3, warp=warp)
        assert bool(out["valid"].all())
        low = np.asarray(crop.origin_mm) + np.asarray(own) / 2
        high = np.asarray(crop.origin_mm) + (np.asarray(crop.valid.shape) - 0.5) * own
        points = out["points_mm"].flatten(1).numpy()
        assert (points.min(axis=1) >= low - 1e-3).all() and (points.max(axis=1) <= high + 1e-3).all()


def test_margin_of_one_draw__is_smaller_and_gives_the_same_views() -> None:
    own = (1.0, 1.2, 2.0)
    views = VolumeViews(
        size=16, count=2, normalize="none", spacing_mm=1.1, rotate_deg=30, scale=(0.7, 1.4), warp={"probability": 0.5}
    )
    volume = random_volume((1, 80, 80, 50))
    saved = []
    for position in range(6):
        key = DrawKey(0, 0, position)
        large = make_crop(volume, own, views, key=key, centre_mm=(41.3, 47, 50))
        small = make_crop(volume, own, views, key=key, centre_mm=(41.3, 47, 50), tight=True)
        saved.append(small.valid.size / large.valid.size)
        one, two = views.batch([large], "cpu"), views.batch([small], "cpu")
        assert bool(two[1].all()) and torch.allclose(one[0]["volume"], two[0]["volume"], atol=0.02)
    assert max(saved) <= 1 and np.mean(saved) < 0.6


def test_valid__follows_the_geometry_and_is_false_outside_what_was_fetched() -> None:
    own = (1.0, 1.0, 1.0)
    views = VolumeViews(size=10, normalize="percentile", rotate_deg=45)
    inside_only = make_crop(np.full((1, 12, 12, 12), 100, dtype=np.uint8), own, views, stats=STATS)  # reader pads beyond 12
    out = run(views, inside_only, rotate_deg=[0.0, 0.0, 45.0])
    points = out["points_mm"].numpy()
    expected = ((points > 0) & (points < 12)).all(axis=0)
    assert np.array_equal(out["valid"].numpy(), expected) and not expected.all()
    assert (out["volume"][0].numpy()[~expected] == 0).all() and (out["volume"][0].numpy()[expected] > 0).all()
    # the same image fetched without margin: the view leaves the crop
    bare = Crop(
        np.full((1, 10, 10, 10), 100, dtype=np.uint8),
        np.ones((10, 10, 10), dtype=bool),
        own,
        (1, 1, 1),
        inside_only.box,
        STATS,
        inside_only.key,
        0,
    )
    out = run(views, bare, rotate_deg=[0.0, 0.0, 45.0])
    points = out["points_mm"].numpy()
    assert np.array_equal(out["valid"].numpy(), ((points > 1) & (points < 11)).all(axis=0))
    assert not bool(out["valid"].all())
    # ... with excluded voxels inside it, and with labels: outside stays False and 0
    bare.valid[0] = False
    view = neutral(rotate_deg=[0.0, 0.0, 45.0])
    labelled = views.apply([bare], [[view]], "cpu", labels=[np.ones((10, 10, 10), dtype=np.uint8)])
    assert np.array_equal(labelled["labels"][0, 0].numpy() == 1, ((points > 1) & (points < 11)).all(axis=0))
    expected = ((points > [[[[2]]], [[[1]]], [[[1]]]]) & (points < 11)).all(axis=0)
    assert np.array_equal(labelled["valid"][0, 0].numpy(), expected)


def test_box_beyond_the_crop__is_padded_when_indexed() -> None:
    volume = random_volume((1, 6, 6, 6))
    views = VolumeViews(size=8, normalize="none")
    crop = Crop(
        volume, np.ones((6, 6, 6), dtype=bool), (1, 1, 1), (0, 0, 0), Box((-1, -1, 3), (8, 8, 8)), STATS, DrawKey(0, 0, 0), 0
    )
    out = run(views, crop)
    assert np.array_equal(out["volume"][0, 1:7, 1:7, :3].numpy(), volume[0, :, :, 3:])
    assert int(out["valid"].sum()) == 6 * 6 * 3
    assert set(out["volume"][0].numpy()[~out["valid"].numpy()]) == {20.0}


def test_warp_with_amplitude_zero__is_the_exact_identity() -> None:
    volume = random_volume((1, 24, 24, 24))
    off = VolumeViews(size=12, normalize="none", warp={"amplitude": 0})
    assert off.draw(DrawKey(0, 0, 0), 0)["warp"] is None
    views = VolumeViews(size=12, normalize="none", warp={})
    out = run(views, make_crop(volume, (1, 1, 1), views), warp={"amplitude": 0.0, "exponent": 5.0, "seed": 1})
    assert np.array_equal(out["volume"].numpy(), volume[:, 6:18, 6:18, 6:18])


def test_labels__follow_the_image() -> None:
    own = (1.0, 1.5, 1.0)
    shape = (76, 56, 76)
    x = ramp(shape, own)
    centre = np.asarray(shape) * own / 2
    radius = np.sqrt(((x - centre.reshape(3, 1, 1, 1)) ** 2).sum(axis=0))
    truth = np.digitize(-radius, [-18, -9]).astype(np.uint8)  # 0 outside, 1 shell, 2 core
    views = VolumeViews(size=(40, 30, 40), normalize="none", rotate_deg=30, scale=(0.8, 1.2), warp={"amplitude": 0.03})
    crop = make_crop(truth[None], own, views)
    params = neutral(
        rotate_deg=[10.0, 20.0, -30.0], scale=1.1, flip=[True, False, False], warp={"amplitude": 0.03, "exponent": 5.0, "seed": 9}
    )
    outs = [views.apply([crop], [[params]], "cpu", labels=[crop.image[0]], points=True) for _ in range(2)]
    label = outs[0]["labels"][0, 0]
    assert label.dtype == torch.int64 and set(label.unique().tolist()) == {0, 1, 2}
    assert torch.equal(label, outs[1]["labels"][0, 0])  # Dice 1 with itself
    index = [np.floor(p / s).astype(int) for p, s in zip(outs[0]["points_mm"][0, 0].numpy(), own)]
    assert (label.numpy() == truth[tuple(index)]).mean() > 0.9999  # nearest by hand; ties on a border may fall either way
    core = outs[0]["volume"][0, 0, 0] > 1.5
    dice = 2 * float((core & (label == 2)).sum()) / float(core.sum() + (label == 2).sum())
    assert dice > 0.97  # trilinear image and nearest label describe one body


def test_labels__are_exact_under_flip_and_padding() -> None:
    labels = random_volume((6, 6, 6)).astype(np.int32)
    views = VolumeViews(size=6, normalize="none")
    crop = make_crop(labels[None].astype(np.int16), (1, 1, 1), views)
    out = views.apply([crop], [[neutral(flip=[False, True, False])]], "cpu", labels=[labels])
    assert np.array_equal(out["labels"][0, 0].numpy(), labels[:, ::-1])


# ---- intensities ----------------------------------------------------------------------------------------------------


def test_padding__is_the_same_constant_whatever_the_augmentation() -> None:
    views = VolumeViews(size=16, normalize="zscore", **EVERYTHING)
    crop = make_crop(random_volume((1, 14, 14, 14)), (1, 1, 1), views, stats=STATS)
    data, valid, _, _ = views.batch([crop], "cpu")
    outside = data["volume"][0, 0, 0][~valid[0, 0]]
    assert outside.numel() > 0 and outside.unique().tolist() == pytest.approx([(20 - 80) / 25])


def test_padding__leaves_no_false_edge_after_interpolation() -> None:
    views = VolumeViews(size=12, normalize={"window": [-1000, 1000]}, rotate_deg=20)
    crop = make_crop(np.full((1, 10, 10, 10), -1000, dtype=np.int16), (1, 1, 1), views)  # air; the reader pads with 0 = water
    out = run(views, crop, rotate_deg=[0.0, 0.0, 20.0])
    assert not bool(out["valid"].all()) and float(out["volume"].abs().max()) < 1e-6


def test_normalization__acts_on_resampled_raw_values() -> None:
    volume = random_volume((1, 20, 20, 20))
    for mode, expected in {
        "zscore": lambda x: (x - 80) / 25,
        "percentile": lambda x: np.clip((x - 20) / 160, 0, 1),
    }.items():
        views = VolumeViews(size=8, normalize=mode)
        out = run(views, make_crop(volume, (1, 1, 1), views, stats=STATS))
        assert np.allclose(out["volume"].numpy(), expected(volume[:, 6:14, 6:14, 6:14].astype(float)), atol=1e-5)


def test_bias_field__is_exp_of_a_smooth_field_on_raw_values() -> None:
    views = VolumeViews(size=32, normalize="none", bias_field={})
    crop = make_crop(np.full((1, 32, 32, 32), 100, dtype=np.int16), (1, 1, 1), views)
    gains = []
    for seed in range(12):
        out = run(views, crop, bias_field={"amplitude": 0.3, "exponent": 6.0, "seed": seed})
        gains.append(torch.log(out["volume"] / 100))
    gain = torch.stack(gains)
    assert float(gain.square().mean().sqrt()) == pytest.approx(0.3, rel=0.25)
    assert float(gain.diff(dim=2).abs().mean()) < 0.03  # per voxel: smooth


def test_contrast_brightness_gamma_noise__are_applied_in_this_order() -> None:
    volume = random_volume((1, 8, 8, 8))
    views = VolumeViews(size=8, normalize="zscore")
    crop = make_crop(volume, (1, 1, 1), views, stats=STATS)
    noise = {"std": 0.1, "seed": 11}
    out = run(views, crop, contrast=1.2, brightness=0.3, gamma=0.8, noise=noise)["volume"]
    x = (volume.astype(float) - 80) / 25 * 1.2 + 0.3
    low, width = x.min(), x.max() - x.min()
    x = ((x - low) / width) ** 0.8 * width + low
    x = x + 0.1 * torch.randn((1, 8, 8, 8), generator=torch.Generator().manual_seed(11)).numpy()
    assert np.allclose(out.numpy(), x, atol=1e-4)


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_draw__is_pure_json_and_keyed_by_everything() -> None:
    views = VolumeViews(size=16, count=2, mask={"ratio": 0.75, "cell": 4}, **EVERYTHING)
    key = DrawKey(5, 7, 9)
    params = views.draw(key, 0)
    views.draw(DrawKey(5, 7, 10), 1)
    assert views.draw(key, 0) == params == pickle.loads(pickle.dumps(views)).draw(key, 0)
    assert json.loads(json.dumps(params)) == params
    others = [
        views.draw(DrawKey(6, 7, 9), 0),
        views.draw(DrawKey(5, 8, 9), 0),
        views.draw(DrawKey(5, 7, 10), 0),
        views.draw(key, 1),
        VolumeViews("other", size=16, mask={"ratio": 0.75, "cell": 4}, **EVERYTHING).draw(key, 0),
    ]
    for other in others:
        for operation in ("rotate_deg", "scale", "contrast", "brightness", "gamma", "noise", "mask", "warp", "bias_field"):
            assert other[operation] != params[operation]


def test_draw__one_operation_does_not_disturb_another() -> None:
    key = DrawKey(1, 2, 3)
    everything = VolumeViews(size=16, **EVERYTHING).draw(key, 0)
    alone = VolumeViews(size=16, rotate_deg=15).draw(key, 0)
    assert alone["rotate_deg"] == everything["rotate_deg"]


def test_draw__stays_inside_the_asked_ranges() -> None:
    views = VolumeViews(
        size=16, flip=(0.2, 0, 1), rotate_deg=(5, 0, 30), scale=(0.5, 2), noise_std=0.3, brightness=0.4, warp={"probability": 0.25}
    )
    draws = [views.draw(DrawKey(0, 0, position), 0) for position in range(1500)]
    angles = np.array([d["rotate_deg"] for d in draws])
    assert np.abs(angles).max(axis=0) == pytest.approx([5, 0, 30], rel=0.02) and np.abs(angles.mean(axis=0)).max() < 2
    scales = np.array([d["scale"] for d in draws])
    assert scales.min() >= 0.5 and scales.max() <= 2 and np.log(scales).mean() == pytest.approx(0, abs=0.04)
    flips = np.mean([d["flip"] for d in draws], axis=0)
    assert flips[0] == pytest.approx(0.2, abs=0.04) and flips[1] == 0 and flips[2] == 1
    assert np.mean([d["warp"] is not None for d in draws]) == pytest.approx(0.25, abs=0.05)
    noise = np.array([d["noise"]["std"] for d in draws])
    assert noise.min() >= 0 and noise.max() <= 0.3 and noise.mean() == pytest.approx(0.15, abs=0.01)
    shifts = np.array([d["brightness"] for d in draws])
    assert np.abs(shifts).max() <= 0.4 and abs(shifts.mean()) < 0.02


def test_batch__equals_every_element_alone_bit_by_bit() -> None:
    views = VolumeViews(size=(20, 16, 12), spacing_mm=(1, 1, 2), count=2, mask={"ratio": 0.6, "cell": 4}, **EVERYTHING)
    crops = []
    for item, (shape, own) in enumerate(
        [((1, 40, 40, 20), (1, 1, 2)), ((1, 33, 50, 41), (0.8, 0.6, 1.1)), ((1, 9, 9, 9), (3, 3, 3))]
    ):
        crops.append(make_crop(random_volume(shape, item), own, views, stats=STATS, key=DrawKey(3, 1, item), item=item))
    together = views.batch(crops, "cpu")
    assert together[0]["volume"].shape == (3, 2, 1, 20, 16, 12) and together[0]["volume_mask"].shape == (3, 2, 5, 4, 3)
    backwards = views.batch(crops[::-1], "cpu")
    for b, crop in enumerate(crops):
        alone = views.batch([crop], "cpu")
        for whole, order, single in zip(
            [*together[0].values(), *together[1:]], [*backwards[0].values(), *backwards[1:]], [*alone[0].values(), *alone[1:]]
        ):
            assert torch.equal(whole[b], single[0]) and torch.equal(order[2 - b], single[0])
    assert not torch.equal(together[0]["volume"][0, 0], together[0]["volume"][0, 1])
    assert bool(torch.isfinite(together[0]["volume"]).all())


def test_batch__equals_applying_stored_parameters() -> None:
    views = VolumeViews(size=16, count=2, mask={"ratio": 0.75, "cell": 4}, **EVERYTHING)
    crop = make_crop(random_volume((1, 40, 40, 40)), (1, 1, 1), views, stats=STATS)
    data, valid, _, _ = views.batch([crop], "cpu")
    stored = json.loads(json.dumps([[views.draw(crop.key, v) for v in range(2)]]))
    replayed = views.apply([crop], stored, "cpu")
    assert torch.equal(replayed["volume"], data["volume"]) and torch.equal(replayed["valid"], valid)
    assert torch.equal(replayed["volume_mask"], data["volume_mask"])


def test_mask__hides_the_same_number_in_every_view_of_a_non_cubic_grid() -> None:
    views = VolumeViews(size=(8, 12, 16), count=3, normalize="none", mask={"ratio": 0.75, "cell": (2, 2, 2)})
    volume = random_volume((1, 8, 12, 16))
    crops = [make_crop(volume, (1, 1, 1), views, key=DrawKey(0, 0, position)) for position in range(4)]
    mask = views.batch(crops, "cpu")[0]["volume_mask"]
    assert mask.shape == (4, 3, 4, 6, 8) and mask.dtype == torch.bool
    assert (mask.sum(dim=(2, 3, 4)) == int(0.75 * 4 * 6 * 8)).all()
    assert len({tuple(m.flatten().tolist()) for m in mask.flatten(0, 1)}) == 12


def test_views__have_equal_bits_on_any_number_of_threads() -> None:
    views = VolumeViews(size=(40, 48, 40), **EVERYTHING)
    crop = make_crop(random_volume((1, 80, 60, 60)), (1, 1, 1), views, stats=STATS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = views.batch([crop], "cpu")[0]["volume"]
        torch.set_num_threads(2)
        two = views.batch([crop], "cpu")[0]["volume"]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_spec__tells_an_objective_what_to_expect() -> None:
    assert VolumeViews(size=32, count=2).spec == ViewSpec("volume", (32, 32, 32), None, 2)
    assert VolumeViews(size=(8, 9, 10), spacing_mm=1.5).spec == ViewSpec("volume", (8, 9, 10), (1.5, 1.5, 1.5), 1)
    assert (
        "volume_mask"
        not in VolumeViews(size=4, normalize="none").batch(
            [make_crop(np.zeros((1, 4, 4, 4), np.uint8), (1, 1, 1), VolumeViews(size=4))], "cpu"
        )[0]
    )


# ---- bad arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"size: found 0; accepted is a whole number >= 1; change size"),
        ({"size": (96, 96)}, r"size: found \(96, 96\); accepted is one number, or three \(X, Y, Z\)"),
        ({"size": 3.5}, "size: found 3.5"),
        ({"spacing_mm": 0}, "spacing_mm: found 0; accepted is a number > 0"),
        ({"spacing_mm": (1, 1, float("nan"))}, "spacing_mm: found nan"),
        ({"count": 0}, "count: found 0"),
        ({"normalize": "minmax"}, "normalize: found 'minmax'; accepted is zscore, percentile, none or"),
        ({"normalize": {"window": [5, 5]}}, "lo < hi"),
        ({"flip": 1.5}, "flip: found 1.5; accepted is a number >= 0 and <= 1"),
        ({"rotate_deg": -3}, "rotate_deg: found -3; accepted is a number >= 0 and <= 180"),
        ({"scale": (1.2, 0.8)}, r"scale: found \(1.2, 0.8\); accepted is \[lo, hi\] with 0 < lo <= hi; change scale"),
        ({"scale": 1.2}, "scale: found 1.2"),
        (
            {"warp": {"amplitud": 0.1}},
            r'warp.amplitud: unknown key \(did you mean "amplitude"\?\); accepted are amplitude, exponent',
        ),
        ({"warp": 0.1}, "warp: found 0.1; accepted is a mapping"),
        ({"warp": {"amplitude": -1}}, "warp.amplitude: found -1"),
        ({"bias_field": {"probability": 2}}, "bias_field.probability: found 2"),
        ({"noise_std": "high"}, "noise_std: found 'high'; accepted is a number >= 0"),
        ({"gamma": (0, 1)}, "gamma: found 0; accepted is a number > 0"),
        ({"brightness": True}, "brightness: found True"),
        ({"mask": {"ratio": 0.5}}, r"mask: found .*accepted is \{ratio: 0.75, cell: 16\}"),
        ({"mask": {"ratio": 1, "cell": 4}}, "mask.ratio: found 1.*accepted is 0 <= ratio < 1; lower it"),
        (
            {"mask": {"ratio": 0.5, "cell": 5}},
            r"mask.cell: \[5, 5, 5\] does not divide the size \[16, 16, 16\].*change mask.cell or size",
        ),
        ({"mask": {"ratio": 0.5, "cell": 4, "shape": 1}}, "mask.shape: unknown key"),
    ],
)
def test_bad_arguments__say_what_was_found_what_is_accepted_and_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        VolumeViews(**{"size": 16, **arguments})


def test_bad_batches__are_refused_by_item() -> None:
    views = VolumeViews(size=4, normalize="none")
    crop = make_crop(random_volume((1, 6, 6, 6)), (1, 1, 1), views, item=31)
    two = make_crop(random_volume((2, 6, 6, 6)), (1, 1, 1), views, item=32)
    with pytest.raises(RequestError, match="found no crops"):
        views.batch([], "cpu")
    with pytest.raises(RequestError, match=r"items \[31, 32\] have \[1, 2\] channels"):
        views.batch([crop, two], "cpu")
    with pytest.raises(RequestError, match="one list per crop"):
        views.apply([crop], [], "cpu")
    with pytest.raises(RequestError, match=r"item 31: labels \(3, 3, 3\) on an image"):
        views.apply([crop], [[neutral()]], "cpu", labels=[np.zeros((3, 3, 3), dtype=np.uint8)])
    with pytest.raises(RequestError, match="item 31: no statistics mean, std"):
        VolumeViews(size=4).batch([crop], "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda__agrees_with_the_cpu_where_nothing_is_random_on_the_device() -> None:
    views = VolumeViews(
        size=(24, 20, 16),
        spacing_mm=1.2,
        rotate_deg=20,
        scale=(0.8, 1.2),
        flip=0.5,
        contrast=(0.8, 1.2),
        mask={"ratio": 0.75, "cell": 4},
    )
    crop = make_crop(random_volume((1, 60, 60, 60)), (1, 1, 1), views, stats=STATS)
    cpu, cuda = views.batch([crop], "cpu"), views.batch([crop], "cuda")
    assert torch.allclose(cpu[0]["volume"], cuda[0]["volume"].cpu(), atol=1e-3)
    assert torch.equal(cpu[0]["volume_mask"], cuda[0]["volume_mask"].cpu()) and torch.equal(cpu[1], cuda[1].cpu())
