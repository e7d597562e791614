from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl.errors import RequestError
from medssl.types import DrawKey
from medssl.views.planes import Planes, PlaneViews, gaussian_blur

STATS = {"mean": 80.0, "std": 25.0, "p00_5": 20.0, "p99_5": 180.0, "min": 3.0, "max": 250.0}
NEUTRAL: dict[str, Any] = {
    "area": 1.0, "aspect": 1.0, "centre": [0.5, 0.5], "flip": [False, False], "rotate_deg": 0.0, "contrast": 1.0, "brightness": 0.0,
    "gamma": None, "blur": None, "noise": None,
}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "area": (0.2, 1), "aspect": (0.75, 4 / 3), "flip": (0.5, 0.5), "rotate_deg": 20, "noise_std": 0.1, "gamma": (0.7, 1.5),
    "brightness": 0.2, "contrast": (0.8, 1.25), "blur": {"sigma": [0.5, 1.5]},
}  # fmt: skip


def planes(
    image: np.ndarray, valid: np.ndarray | None = None, pixel_mm: Any = None, position: int = 0, stats: Any = STATS
) -> Planes:
    n = len(image)
    valid = np.ones((n, *image.shape[2:]), bool) if valid is None else valid
    depth = np.arange(n) * 2.5
    return Planes(image, valid, pixel_mm, depth, depth / max(depth[-1], 1), stats, DrawKey(0, 0, position), 7)


def picture(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def show(views: PlaneViews, item: Planes, **changes: Any) -> dict[str, torch.Tensor]:
    out = views.apply([item], [[{**NEUTRAL, **changes}]], "cpu")
    return {key: value[0, 0] for key, value in out.items()}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_all_off__is_the_picture(dtype: Any) -> None:
    image = picture((1, 2, 12, 9), dtype=dtype)
    out = show(PlaneViews(size=(12, 9), normalize="none"), planes(image))
    assert out["image"].shape == (2, 12, 9) and bool(out["valid"].all())
    np.testing.assert_allclose(out["image"].numpy(), image[0].astype(np.float32), atol=1e-4)


def test_whole_numbers_coarser__is_the_mean_of_blocks() -> None:
    image = picture((1, 1, 24, 32))
    out = show(PlaneViews(size=(6, 8), normalize="none"), planes(image))
    blocks = image[0, 0].reshape(6, 4, 8, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(out["image"][0].numpy(), blocks, rtol=1e-5)


def test_finer__equals_torch_interpolate() -> None:
    image = picture((1, 1, 8, 8))
    out = show(PlaneViews(size=20, normalize="none"), planes(image))
    wanted = F.interpolate(torch.from_numpy(image).float(), size=(20, 20), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(out["image"], wanted, rtol=1e-5, atol=1e-3)


def test_pad__shows_all_and_marks_what_lies_outside() -> None:
    image = picture((1, 1, 8, 16)) + 10
    out = show(PlaneViews(size=16, normalize="none"), planes(image, stats={}))
    assert out["valid"][4:12].all() and not out["valid"][:4].any() and not out["valid"][12:].any()
    np.testing.assert_allclose(out["image"][0, 4:12].numpy(), image[0, 0], atol=1e-4)
    assert (out["image"][0, :4] == 0).all()
    cropped = show(PlaneViews(size=8, fit="crop", normalize="none"), planes(image, stats={}))
    np.testing.assert_allclose(cropped["image"][0].numpy(), image[0, 0, :, 4:12], atol=1e-4)
    assert cropped["valid"].all()


def test_millimetres__keep_the_shape_of_the_body() -> None:
    """Pixels twice as high as wide: 8 x 16 pixels are a square."""
    image = picture((1, 1, 8, 16))
    out = show(PlaneViews(size=8, normalize="none"), planes(image, pixel_mm=(2.0, 1.0)))
    assert out["valid"].all() and out["spacing_mm"].tolist() == [2.0, 2.0]
    np.testing.assert_allclose(out["image"][0].numpy(), image[0, 0].reshape(8, 8, 2).mean(axis=2), rtol=1e-5)
    assert torch.isnan(show(PlaneViews(size=8), planes(image))["spacing_mm"]).all()


def test_flips_and_quarter_turn__equal_numpy() -> None:
    image = picture((1, 1, 10, 10))
    views = PlaneViews(size=10, normalize="none")
    for flip, wanted in (([True, False], image[0, 0, ::-1]), ([False, True], image[0, 0, :, ::-1])):
        np.testing.assert_allclose(show(views, planes(image), flip=flip)["image"][0].numpy(), wanted, atol=1e-3)
    turned = show(views, planes(image), rotate_deg=90.0)["image"][0].numpy()
    assert any(np.abs(turned - np.rot90(image[0, 0], k)).max() < 1e-2 for k in (1, 3))


@pytest.mark.parametrize("seed", range(6))
def test_map__says_where_each_pixel_came_from(seed: int) -> None:
    """A picture whose values are its own rows and columns: the view must show what the map promises, whatever was drawn."""
    height, width = 60, 90
    rows, columns = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    image = np.stack([rows, columns])[None].astype(np.float32)
    views = PlaneViews(size=(16, 12), normalize="none", area=(0.05, 0.3), aspect=(0.7, 1.4), flip=(0.5, 0.5), rotate_deg=40)
    out = show(views, planes(image), **{k: v for k, v in views.draw(DrawKey(seed, 3, 1), 0).items() if k != "noise"})
    y = (torch.arange(16) + 0.5) / 8 - 1
    x = (torch.arange(12) + 0.5) / 6 - 1
    points = torch.stack([x.expand(16, 12), y[:, None].expand(16, 12), torch.ones(16, 12)])
    wanted = torch.einsum("ij,jhw->ihw", out["image_map"], points) * torch.tensor([height, width]).view(2, 1, 1)
    inner = (wanted > 3).all(0) & (wanted[0] < height - 3) & (wanted[1] < width - 3)
    assert inner.sum() > 20
    assert (out["image"] - wanted).abs()[:, inner].max() < 0.51  # averaging moves nothing; half a cell at the border of the crop
    assert (out["image"] - wanted).abs()[:, inner].median() < 0.02


def test_padding__never_bleeds_and_is_the_items_dark() -> None:
    image = picture((1, 1, 20, 20)) + 40
    valid = np.ones((1, 20, 20), bool)
    valid[:, :, 10:] = False
    image[:, :, :, 10:] = 255
    out = show(PlaneViews(size=10, normalize="zscore"), planes(image, valid))
    assert not out["valid"][:, 5:].any() and out["valid"][:, :5].all()
    assert torch.allclose(out["image"][0, :, 5:], torch.tensor((20 - 80.0) / 25))
    assert out["image"][0, :, :5].max() < (255 - 80) / 25


def test_stack__pads_planes_and_keeps_depth() -> None:
    image = picture((3, 1, 8, 8))
    out = show(PlaneViews("stack", size=8, slices=5, normalize="none"), planes(image, stats={}))
    assert out["stack"].shape == (5, 1, 8, 8) and out["valid"].shape == (5, 8, 8)
    assert out["valid"][:3].all() and not out["valid"][3:].any()
    assert out["stack_depth"].tolist() == [0, 2.5, 5, 5, 5] and out["stack_share"].tolist() == [0, 0.5, 1, 1, 1]
    assert (out["stack"][3:] == 0).all()


def test_planes_of_a_stack__share_crop_and_intensities() -> None:
    one = picture((1, 1, 30, 30))
    views = PlaneViews("stack", size=8, slices=4, **{**EVERYTHING, "noise_std": 0})
    data, _, _ = views.batch([planes(np.repeat(one, 4, axis=0))], "cpu")
    assert torch.equal(data["stack"][0, 0, 0], data["stack"][0, 0, 3])


def test_view__does_not_depend_on_its_batch_and_repeats() -> None:
    views = PlaneViews(size=16, count=2, local={"count": 3, "size": 8}, **EVERYTHING)
    items = [planes(picture((1, 1, 40, 30), seed), position=seed) for seed in range(3)]
    together, valid, spacing = views.batch(items, "cpu")
    alone, _, _ = views.batch(items[1:2], "cpu")
    assert set(together) == {
        f"image{end}" for end in ("", "_depth", "_share", "_map", "_local", "_local_depth", "_local_share", "_local_map")
    }
    assert together["image"].shape == (3, 2, 1, 16, 16) and together["image_local"].shape == (3, 3, 1, 8, 8)
    assert set(valid) == set(spacing) == set(views.specs) == {"image", "image_local"}
    for key, value in together.items():
        assert torch.equal(value[1:2], alone[key]) or torch.isnan(value).all()
    assert not torch.equal(together["image"][0, 0], together["image"][0, 1])


def test_draw__is_plain_and_within_what_was_asked() -> None:
    views = PlaneViews(size=8, **EVERYTHING)
    drawn = [views.draw(DrawKey(0, step, 0), 0) for step in range(300)]
    area = np.array([d["area"] for d in drawn])
    assert 0.2 <= area.min() < 0.25 and 0.95 < area.max() <= 1
    assert 0.4 < np.mean([d["flip"][0] for d in drawn]) < 0.6
    assert 0.4 < np.mean([d["blur"] is not None for d in drawn]) < 0.6
    assert max(abs(d["rotate_deg"]) for d in drawn) <= 20


def test_blur__equals_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    image = picture((2, 1, 20, 24)).astype(np.float32)
    ours = gaussian_blur(torch.from_numpy(image), 1.3).numpy()
    theirs = np.stack([gaussian_filter(plane[0], 1.3, mode="mirror", radius=4)[None] for plane in image])
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_grey__is_the_mean_of_channels() -> None:
    image = picture((1, 3, 8, 8))
    out = show(PlaneViews(size=8, channels="mean", normalize="none"), planes(image))
    np.testing.assert_allclose(out["image"][0].numpy(), image[0].mean(axis=0), atol=1e-3)


def test_mixed_channels__are_refused_with_a_way_out() -> None:
    with pytest.raises(RequestError, match=r"\[1, 3\] channels.*channels: mean"):
        PlaneViews(size=8).batch([planes(picture((1, 3, 8, 8))), planes(picture((1, 1, 8, 8)))], "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8, "area": (0.5, 2)}, "area: .*<= 1"),
        ({"size": 8, "fit": "stretch"}, "fit: .*pad or crop"),
        ({"size": (8, 8, 8)}, "size: .*rows, columns"),
        ({"size": 8, "blur": {"sigm": 1}}, 'blur.sigm: unknown key.*"sigma"'),
        ({"size": 8, "slices": 3, "local": {"count": 1, "size": 4}}, "local: .*stack"),
        ({"size": 8, "local": {"count": 1}}, "local: .*accepted"),
    ],
)
def test_bad_arguments__say_what_is_accepted(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PlaneViews(**arguments)
