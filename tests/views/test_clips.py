"""Views of clips: the formula against plain NumPy, and what must never change."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from medssl.errors import RequestError
from medssl.types import ClipBatch, DrawKey, Views, ViewsMeta
from medssl.views.clips import ClipFrames, ClipViews, SectorPlace, sector_place, tube_masks

STATS = {"mean": 80.0, "std": 25.0, "p00_5": 4.0, "p99_5": 180.0, "min": 0.0, "max": 255.0}
NEUTRAL: dict[str, Any] = {
    "scale": 1.0, "centre": [0.5, 0.5], "tilt_deg": 0.0, "depth": 1.0, "flip": False, "gain": 0.0, "tgc": 0.0, "gamma": None,
    "speckle": None, "mask": None,
}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "scales": [1, 0.875, 0.75, 0.66], "tilt_deg": 12, "depth": (0.8, 1.25), "gain": 0.4, "tgc": 0.4, "gamma": (0.8, 1.2),
    "speckle": 0.3, "mask": {"ratio": 0.9, "patch": 8, "count": 3},
}  # fmt: skip


def fan(shape: tuple[int, int], apex: tuple[float, float], reach: float, half_deg: float, first: float = 0.0) -> np.ndarray:
    """Return a sector (H, W) bool: pixel centres between two radii and within half an angle of straight down."""
    row, column = (np.arange(n)[:, None] + 0.5 if k == 0 else np.arange(n)[None] + 0.5 for k, n in enumerate(shape))
    radius = np.hypot(row - apex[0], column - apex[1])
    angle = np.degrees(np.arctan2(column - apex[1], row - apex[0]))
    inside: np.ndarray = (radius >= first) & (radius <= reach) & (np.abs(angle) <= half_deg)
    return inside


def clip(
    image: np.ndarray,
    sector: np.ndarray | None = None,
    *,
    pixel_mm: Any = None,
    order: Any = None,
    position: int = 0,
    count: int = 1,
) -> ClipFrames:
    order = np.arange(len(image)) if order is None else np.asarray(order)
    order = np.broadcast_to(order, (count, order.shape[-1]))
    sector = np.ones(image.shape[2:], bool) if sector is None else sector
    seen = np.arange(order.shape[1])[None] < len(image)
    valid = np.broadcast_to(seen, order.shape)
    return ClipFrames(
        image, sector, pixel_mm, order, valid, order * 0.04, order + 10, np.ones(count), STATS, DrawKey(0, 0, position), 7
    )


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


def show(views: ClipViews, item: ClipFrames, **changes: Any) -> dict[str, torch.Tensor]:
    out = views.apply([item], [[{**NEUTRAL, **changes}]], "cpu")
    return {key: value[0, 0] for key, value in out.items()}


def test_all_off__is_the_clip() -> None:
    image = noise((5, 1, 12, 16))
    out = show(ClipViews(size=(12, 16), frames=5, fps=25, normalize="none"), clip(image))
    assert {key: tuple(value.shape) for key, value in out.items()} == {
        "clip": (5, 1, 12, 16), "clip_valid": (5,), "clip_sector": (1, 12, 16), "clip_time_s": (5,), "clip_frame": (5,),
        "clip_speed": (), "clip_map": (2, 3), "spacing_mm": (2,),
    }  # fmt: skip
    np.testing.assert_allclose(out["clip"].numpy(), image, atol=1e-4)
    assert out["clip_valid"].all() and out["clip_sector"].all() and torch.isnan(out["spacing_mm"]).all()
    assert out["clip_frame"].tolist() == [10, 11, 12, 13, 14]


def test_view__is_the_box_of_the_sector_and_not_the_screen() -> None:
    """16 x 24 pixels of a screen of 60 x 80, in pixels half as wide as high: a square of 16 x 12 mm-equal sides and padding."""
    image = noise((2, 1, 60, 80), 1)
    sector = np.zeros((60, 80), bool)
    sector[20:36, 30:62] = True
    out = show(ClipViews(size=8, frames=2, fps=25, normalize="none"), clip(image, sector, pixel_mm=(2.0, 1.0)))
    assert out["clip_sector"].all() and out["spacing_mm"].tolist() == [4.0, 4.0]
    blocks = image[:, :, 20:36, 30:62].reshape(2, 1, 8, 2, 8, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(out["clip"].numpy(), blocks, rtol=1e-5)
    wide = show(ClipViews(size=8, frames=2, fps=25, normalize="none"), clip(image, sector))
    assert wide["clip_sector"][0, 2:6].all() and not wide["clip_sector"][0, :2].any() and not wide["clip_sector"][0, 6:].any()
    cut = show(ClipViews(size=8, frames=2, fps=25, fit="crop", normalize="none"), clip(image, sector))
    np.testing.assert_allclose(cut["clip"].numpy(), image[:, :, 20:36, 38:54].reshape(2, 1, 8, 2, 8, 2).mean((3, 5)), rtol=1e-5)


def test_scale__equals_torch_interpolate_of_the_crop() -> None:
    image = noise((3, 1, 16, 16), 2)
    views = ClipViews(size=16, frames=3, fps=25, normalize="none")
    out = show(views, clip(image), scale=0.5, centre=[0.25, 1.0])
    wanted = F.interpolate(torch.from_numpy(image[:, :, 2:10, 8:16]).float(), size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out["clip"][:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1], rtol=1e-5, atol=1e-3)


def test_normalisation__uses_the_sector_and_leaves_one_value_outside() -> None:
    image = noise((4, 1, 40, 60), 3)
    sector = fan((40, 60), (2, 30), 36, 40)
    image[:, :, ~sector] = 255
    inside = image[:, 0][:, sector].astype(np.float64)
    stats = {**STATS, "mean": inside.mean(), "std": inside.std(), "p00_5": 3.0, "min": 0.0}
    item = clip(image, sector)
    item.stats = stats
    box = sector_place(sector)
    size = (int(box.high[0] - box.low[0]), int(box.high[1] - box.low[1]))
    out = show(ClipViews(size=size, frames=4, fps=25), item)
    shown = out["clip_sector"][0].numpy()
    rows, columns = slice(int(box.low[0]), int(box.high[0])), slice(int(box.low[1]), int(box.high[1]))
    np.testing.assert_array_equal(shown, sector[rows, columns])
    values = out["clip"][:, 0].numpy()[:, shown]
    np.testing.assert_allclose(values, (image[:, 0, rows, columns][:, shown] - inside.mean()) / inside.std(), atol=1e-5)
    assert abs(values.mean()) < 1e-5 and abs(values.std() - 1) < 1e-5
    outside = out["clip"][:, 0].numpy()[:, ~shown]
    np.testing.assert_allclose(outside, (3 - inside.mean()) / inside.std(), rtol=1e-6)


@pytest.mark.parametrize("pixel", [None, (0.5, 1.0)])
def test_tilt_and_depth__turn_and_scale_about_the_apex(pixel: Any) -> None:
    """A clip whose values are its own coordinates shows, at each point, where that point came from."""
    height, width = 120, 160
    row, column = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    sector = fan((height, width), (6.0, 80.0), 108, 38) if pixel is None else np.ones((height, width), bool)
    views = ClipViews(size=48, frames=1, fps=25, normalize="none", channels="keep")
    item = clip(np.stack([row, column])[None].astype(np.float32), sector, pixel_mm=pixel)
    angle, zoom = 9.0, 1.2
    apex = np.array(sector_place(sector).apex)
    plain = show(views, item)
    out = show(views, item, tilt_deg=angle, depth=zoom)
    unit = np.ones(2) if pixel is None else np.array(pixel)
    # Interpolation mixes in what lies outside along the border.
    seen = ndimage.binary_erosion((out["clip_sector"][0] & plain["clip_sector"][0]).numpy(), iterations=3)
    at = (plain["clip"][0].numpy()[:, seen].T - apex) * unit  # (n, row and column) from the apex, mm
    found = (out["clip"][0].numpy()[:, seen].T - apex) * unit
    # Polar coordinates: the same point lies nearer by the zoom, and at an angle smaller by the tilt.
    radius = np.hypot(*at.T)
    far = radius > 0.2 * radius.max()
    np.testing.assert_allclose(np.hypot(*found.T)[far], radius[far] / zoom, atol=0.6)
    turned = np.degrees(np.arctan2(found[:, 1], found[:, 0]) - np.arctan2(at[:, 1], at[:, 0]))[far]
    assert np.median(np.abs(np.abs(turned) - angle)) < 0.3 and np.ptp(np.sign(turned)) == 0
    assert seen.sum() > 300


@pytest.mark.parametrize(("apex", "first"), [((8.0, 90.0), 0.0), ((-30.0, 75.5), 45.0), ((20.0, 60.0), 5.0)])
def test_apex__of_a_known_sector(apex: tuple[float, float], first: float) -> None:
    place = sector_place(fan((160, 180), apex, 130, 35, first))
    assert np.hypot(place.apex[0] - apex[0], place.apex[1] - apex[1]) < 2.0


def test_apex__of_a_linear_probe_or_nothing_is_the_middle_of_the_top() -> None:
    sector = np.zeros((50, 60), bool)
    sector[10:40, 20:50] = True
    assert sector_place(sector) == SectorPlace((10, 20), (40, 50), (10, 35))
    assert sector_place(sector[::-1, ::-1]).apex == (10, 25)
    assert sector_place(np.zeros((50, 60), bool)) == SectorPlace((0, 0), (50, 60), (0, 30))
    assert sector_place(fan((160, 180), (8, 90), 130, 35)[::-1]).apex[0] == 22  # upside down: the upper borders are an arc


def test_gain_and_gamma__end_at_black_and_white() -> None:
    image = noise((2, 1, 8, 8), 4)
    views = ClipViews(size=8, frames=2, fps=25, normalize="none")
    out = show(views, clip(image), gain=3.0)["clip"].numpy()
    np.testing.assert_allclose(out, np.clip(image + 75.0, 0, 255), atol=1e-3)
    np.testing.assert_allclose(show(views, clip(image), gamma=1.3)["clip"].numpy(), (image / 255.0) ** 1.3 * 255, atol=1e-2)
    item = clip(image)
    item.stats = {"mean": 1.0}
    with pytest.raises(RequestError, match="no statistics std, min, max"):
        show(views, item, gain=1.0)


def test_tgc__grows_from_the_apex_to_the_far_end() -> None:
    sector = fan((100, 120), (0.0, 60.0), 95, 45)
    item = clip(np.full((1, 1, 100, 120), 100, np.uint8), sector)
    views = ClipViews(size=64, frames=1, fps=25, normalize="none")
    out = show(views, item, tgc=0.8)
    place = sector_place(sector)
    y, x = np.meshgrid((np.arange(64) + 0.5) / 32 - 1, (np.arange(64) + 0.5) / 32 - 1, indexing="ij")
    share = np.einsum("ij,jhw->ihw", out["clip_map"].numpy(), np.stack([x, y, np.ones_like(x)]))
    radius = np.hypot(share[0] * 100 - place.apex[0], share[1] * 120 - place.apex[1])
    wanted = 100 + 0.8 * 25 * np.clip(2 * radius / (place.high[0] - place.apex[0]) - 1, -1, 1)
    seen = ndimage.binary_erosion(out["clip_sector"][0].numpy(), iterations=3)
    np.testing.assert_allclose(out["clip"][0, 0].numpy()[seen], wanted[seen], atol=1e-2)
    assert np.ptp(wanted[seen]) > 30


def test_speckle__multiplies_and_differs_from_frame_to_frame() -> None:
    item = clip(np.full((6, 1, 96, 96), 100, np.uint8), order=[0, 1, 2, 3, 4, 5, 4, 3])
    views = ClipViews(size=96, frames=8, fps=25, normalize="none")
    out = show(views, item, speckle={"std": 0.2, "seed": 5})["clip"].numpy()
    assert abs(out.mean() - 100) < 0.5 and abs(out.std() - 20) < 0.6
    assert np.corrcoef(out[0].ravel(), out[1].ravel())[0, 1] < 0.1
    neighbours = np.corrcoef(out[:, 0, :, :-1].ravel(), out[:, 0, :, 1:].ravel())[0, 1]
    assert 0.3 < neighbours < 0.8  # grains, not single pixels
    np.testing.assert_array_equal(out[6], out[4])  # a frame that fills in is that frame
    dark = show(views, clip(np.zeros((6, 1, 96, 96), np.uint8), order=item.order[0]), speckle={"std": 0.2, "seed": 5})
    assert not dark["clip"].any()  # black stays black: nothing scatters there


def test_flip__never_unless_asked() -> None:
    image = noise((1, 1, 8, 8), 5)
    views = ClipViews(size=8, frames=1, fps=25, normalize="none", **{**EVERYTHING, "mask": None})
    assert not any(views.draw(DrawKey(0, step, 0), 0)["flip"] for step in range(200))
    flipped = show(views, clip(image), flip=True)["clip"][0, 0].numpy()
    np.testing.assert_allclose(flipped, image[0, 0, :, ::-1], atol=1e-3)
    half = ClipViews(size=8, frames=1, fps=25, flip=0.5)
    assert 60 < sum(half.draw(DrawKey(0, step, 0), 0)["flip"] for step in range(200)) < 140


def test_frames_of_a_view__share_everything_but_speckle() -> None:
    still = np.repeat(noise((1, 1, 40, 40), 6), 5, axis=0)
    views = ClipViews(size=32, frames=5, fps=25, **{**EVERYTHING, "speckle": 0, "mask": None})
    data, _, _ = views.batch([clip(still)], "cpu")
    assert torch.equal(data["clip"][0, 0, 0], data["clip"][0, 0, 4])


def test_view__does_not_depend_on_batch_thread_or_global_generator() -> None:
    views = ClipViews(size=32, frames=4, fps=25, count=2, **EVERYTHING)
    sector = fan((50, 64), (2, 32), 46, 40)
    items = [clip(noise((4, 1, 50, 64), seed), sector, position=seed, count=2) for seed in range(3)]
    torch.manual_seed(1)
    together, valid, spacing = views.batch(items, "cpu")
    torch.manual_seed(2)
    with ThreadPoolExecutor(3) as pool:
        alone = list(pool.map(lambda item: views.batch([item], "cpu")[0], items))
    for key, value in together.items():
        assert torch.equal(value, torch.cat([each[key] for each in alone])), key
    assert together["clip"].shape == (3, 2, 4, 1, 32, 32) and set(spacing) == {"clip"}
    assert torch.equal(valid["clip"], together["clip_valid"][..., None, None] & together["clip_sector"])
    assert not torch.equal(together["clip"][:, 0], together["clip"][:, 1])


def test_tube_masks__count_is_exact_and_inside_is_shown_first() -> None:
    sector = torch.from_numpy(fan((112, 112), (0, 56), 108, 38))
    inside = F.avg_pool2d(sector[None].float(), 16)[0] >= 0.5
    assert 15 < int(inside.sum()) < 35
    masks = tube_masks(sector, (16, 16), 0.9, 40, seed=3)
    assert masks.shape == (40, 7, 7) and (masks.flatten(1).sum(1) == math.floor(0.9 * 49)).all()
    assert not (~masks & ~inside).any()  # 5 of 49 are shown, all of them inside
    shown = (~masks).float().mean(0)[inside]
    assert shown.min() > 0 and len({tuple(mask.flatten().tolist()) for mask in masks}) > 30
    few = tube_masks(sector, (16, 16), 0.2, 1, seed=3)[0]
    assert (~few)[inside].all() and int((~few).sum()) == 49 - math.floor(0.2 * 49)
    assert torch.equal(tube_masks(sector, (16, 16), 0.9, 40, seed=3), masks)
    assert not torch.equal(tube_masks(sector, (16, 16), 0.9, 40, seed=4), masks)


def test_clip_batch__takes_one_view_or_all() -> None:
    views = ClipViews(size=16, frames=3, fps=25, count=2, normalize="none")
    items = [clip(noise((3, 1, 20, 20), seed), position=seed, count=2) for seed in range(2)]
    data, valid, spacing = views.batch(items, "cpu")
    made = Views(data, ViewsMeta("a", "ultrasound", torch.arange(2), spacing, {}, valid, tuple(item.key for item in items)))
    one, every = ClipBatch.of(made, v=1), ClipBatch.of(made, v=None)
    assert one.video.shape == (2, 1, 3, 16, 16) and every.video.shape == (4, 1, 3, 16, 16) and len(every) == 4
    assert (one.valid.shape, one.sector.shape, one.frame_time_s.shape) == ((2, 3), (2, 1, 16, 16), (2, 3))
    assert torch.equal(every.video[1::2], one.video) and torch.equal(one.video[:, 0, 2], data["clip"][:, 1, 2, 0])
    half = one.to(torch.float16)
    assert half.video.dtype == torch.float16 and half.valid.dtype == torch.bool


def test_spec_and_timing() -> None:
    views = ClipViews(size=112, frames=64, clip_seconds=3.84, count=3)
    assert views.spec.kind == "clip" and views.spec.size == (64, 112, 112) and views.spec.count == 3
    assert views.spec.fps == pytest.approx(50 / 3)
    assert ClipViews(size=112, fps=25, clip_seconds=2).frames == 50
    with pytest.raises(RequestError, match="two of the three"):
        ClipViews(size=112, frames=64)
    with pytest.raises(RequestError, match="two of the three"):
        ClipViews(size=112, frames=64, fps=25, clip_seconds=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fill": "freeze"}, "fill: found 'freeze'; accepted is pingpong or loop"),
        ({"scales": []}, "scales: found"),
        ({"scales": [1.5]}, "scales: found 1.5"),
        ({"depth": (2, 1)}, "depth: found"),
        ({"mask": {"ratio": 0.9}}, "mask: found"),
        ({"mask": {"ratio": 0.9, "patch": 15}}, "does not divide the size"),
        ({"mask": {"ratio": 1, "patch": 16}}, "hides everything"),
        ({"mask": {"ratio": 0.5, "patch": 16, "tube": 2}}, "unknown key"),
        ({"flip": 2}, "flip: found 2"),
    ],
)
def test_arguments__are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        ClipViews(size=112, frames=8, fps=25, **options)


def test_channels__mean_or_one_number_in_a_batch() -> None:
    colour = clip(noise((2, 3, 16, 16), 8))
    grey = clip(noise((2, 1, 16, 16), 9))
    mean = ClipViews(size=16, frames=2, fps=25, normalize="none").batch([colour, grey], "cpu")[0]["clip"]
    np.testing.assert_allclose(mean[0, 0].numpy(), colour.image.mean(1, keepdims=True), atol=1e-3)
    with pytest.raises(RequestError, match="needs one number of channels"):
        ClipViews(size=16, frames=2, fps=25, channels="keep").batch([colour, grey], "cpu")
    with pytest.raises(RequestError, match="check the reader"):
        ClipViews(size=16, frames=3, fps=25).batch([grey], "cpu")
