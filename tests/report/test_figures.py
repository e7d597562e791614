from __future__ import annotations

import io

import numpy as np
import pytest

from medssl.report import figures

SPACING = (1.0, 2.0, 4.0)


def decode(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")


def test_upright__shows_right_on_the_left_and_anterior_and_superior_on_top() -> None:
    volume = np.zeros((5, 6, 7))
    volume[4, :, :] = 1  # the patient's right
    volume[:, 5, :] += 10  # anterior
    volume[:, :, 6] += 100  # superior
    cuts = figures.cut_volume(volume, {}, SPACING, {"axial": 3, "coronal": 2, "sagittal": 1})
    axial, coronal, sagittal = (figures.upright(cuts[plane].image) for plane in ("axial", "coronal", "sagittal"))
    assert axial.shape == (6, 5) and coronal.shape == (7, 5) and sagittal.shape == (7, 6)
    assert (axial[:, 0] % 10 == 1).all() and (axial[:, -1] % 10 == 0).all()
    assert (axial[0] >= 10).all() and (axial[-1] < 10).all()
    assert (coronal[:, 0] % 10 == 1).all() and (coronal[0] >= 100).all() and (coronal[-1] < 100).all()
    assert (sagittal[0] >= 100).all() and (sagittal[:, 0] % 100 >= 10).all() and (sagittal[:, -1] % 100 < 10).all()
    assert cuts["sagittal"].spacing_mm == (2.0, 4.0)


def test_busiest_slices__finds_the_weight_and_falls_back_to_the_middle() -> None:
    weight = np.zeros((5, 6, 8))
    weight[1, 4, 7] = 3
    assert figures.busiest_slices(weight) == {"axial": 7, "coronal": 4, "sagittal": 1}
    assert figures.busiest_slices(np.zeros((5, 6, 8))) == {"axial": 4, "coronal": 3, "sagittal": 2}


def test_structure_weight__counts_small_structures_as_much_as_large_ones() -> None:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0] = 1
    labels[3, 3, 3] = 2
    weight = figures.structure_weight(labels)
    assert weight[labels == 1].sum() == pytest.approx(1) and weight[3, 3, 3] == 1 and weight[1].sum() == 0


def test_reconstruction_png__pixels_are_to_scale_and_hidden_blocks_are_painted() -> None:
    image = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    hidden = np.ones((8, 8, 8), bool)
    picture = decode(figures.reconstruction_png(image, hidden, image, SPACING))
    flat = picture[..., :3].reshape(-1, 3)
    painted = np.abs(flat - np.asarray(figures.HIDDEN)).max(axis=1) < 0.02
    assert 0.1 < painted.mean() < 0.3  # the second of four columns, on a black page
    # 8 x 16 mm, 8 x 32 mm and 16 x 32 mm: the page is about as high as 80 mm and as wide as 4 x 16 mm
    assert picture.shape[0] / picture.shape[1] == pytest.approx(80 / 64, rel=0.12)


def test_reconstruction_png__perfect_output_has_no_error_colour() -> None:
    image = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    hidden = np.zeros((8, 8, 8), bool)
    hidden[:4] = True

    def coloured(output: np.ndarray) -> float:
        picture = decode(figures.reconstruction_png(image, hidden, output, (1, 1, 1)))[..., :3]
        last = picture[60:-10, int(picture.shape[1] * 0.76) :]
        return float((np.ptp(last, axis=-1) > 0.1).mean())

    assert coloured(image) == 0
    assert coloured(image + 0.5) > 0.2


def test_segmentation_png__draws_every_map_and_survives_nan_and_empty_maps() -> None:
    image = np.full((8, 9, 10), np.nan, np.float32)
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:5, 3:6, 4:8] = 1
    maps = {"label": labels, "scratch": np.zeros_like(labels), "pre_trained $x$": labels}
    cuts = figures.cut_volume(image, maps, (1, 1, 1), figures.busiest_slices(figures.structure_weight(labels)))
    picture = decode(figures.segmentation_png(cuts, ["liver"]))[..., :3]
    orange = (picture[..., 0] > 0.3) & (picture[..., 2] < 0.2) & (picture[..., 0] > picture[..., 1] * 1.2)
    quarter = picture.shape[1] // 4
    shares = [orange[30:-40, k * quarter : (k + 1) * quarter].mean() for k in range(4)]
    assert shares[0] == shares[2] == 0 and shares[1] > 0.05
    assert shares[3] == pytest.approx(shares[1], rel=0.1)


def test_charts_png__same_bytes_and_gaps_for_what_is_not_finite() -> None:
    x = np.arange(100.0)
    y = np.where(x % 7 == 0, np.nan, x)
    y[50], y[51] = np.inf, 1e300
    chart = figures.Chart("loss $x_1", [figures.Line("_a", x, y)], smooth=True)
    first = figures.charts_png([chart], figures.LIGHT)
    assert first == figures.charts_png([chart], figures.LIGHT)
    assert first != figures.charts_png([chart], figures.DARK)
    assert decode(first).shape[2] == 4
    nothing = figures.Chart("loss", [figures.Line("", x, np.full(100, np.nan))], smooth=True)
    assert decode(figures.charts_png([nothing], figures.LIGHT)).size > 0


def test_charts_png__label_curve_with_one_point_and_open_intervals() -> None:
    nan = np.array([np.nan])
    line = figures.Line("scratch", np.array([5.0]), np.array([0.7]), nan, nan, 1)
    assert decode(figures.charts_png([figures.Chart("dice", [line], log_x=True)], figures.DARK)).size > 0


def test_running_mean__equals_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    x, y = np.arange(30.0), rng.random(30)
    y[4] = np.nan
    kept, smooth = figures.running_mean(x, y, window=5)
    finite = y[np.isfinite(y)]
    expected = [finite[max(0, i - 2) : i + 3].mean() for i in range(len(finite))]
    assert smooth == pytest.approx(np.array(expected)) and 4.0 not in kept
