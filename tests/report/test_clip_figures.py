"""Strips of clips and scatters: what is painted where, and files that are not what they should be."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from medssl.report import figures
from medssl.report.clip_figures import (
    NONE,
    ClipStrip,
    prototype_colours,
    read_clips,
    read_regression,
    scatter_png,
    strip_png,
    strip_rows,
)
from medssl.report.collect import collect
from medssl.report.page import report


def decode(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")


def clip(frames: int = 10) -> ClipStrip:
    rng = np.random.default_rng(0)
    sector = np.zeros((32, 48), bool)
    sector[4:28, 8:40] = True
    hidden = np.zeros((4, 6), bool)
    hidden[1, 2] = True
    found = rng.choice([3, 7, 20], (frames, 4, 6))
    found[:, :, 0] = NONE
    return ClipStrip(rng.random((frames, 32, 48)), sector, np.arange(frames) * 0.06, hidden, {"video": found, "frame": found[::-1]})


def arrays() -> dict[str, np.ndarray]:
    one = clip()
    assert one.hidden is not None
    return {
        "frames": one.frames[None], "sector": one.sector[None], "time_s": one.time_s[None], "hidden": one.hidden[None],
        **{f"{name}_prototypes": found[None] for name, found in one.prototypes.items()},
    }  # fmt: skip


def test_strip__paints_what_was_hidden_and_keeps_the_colour_of_a_prototype() -> None:
    one = clip()
    rows, times = strip_rows(one, columns=4)
    assert [heading for heading, _ in rows] == [
        "clip",
        "student sees",
        "video prototypes",
        "frame prototypes",
    ]
    np.testing.assert_allclose(times, [0, 0.18, 0.36, 0.54])
    shown, seen, video, frame = (pictures for _, pictures in rows)
    assert all(pictures.shape == (4, 32, 48, 3) for _, pictures in rows) and not shown[:, ~one.sector].any()
    np.testing.assert_allclose(seen[:, 8:16, 16:24], np.broadcast_to(figures.HIDDEN, (4, 8, 8, 3)), atol=1e-6)
    np.testing.assert_array_equal(seen[:, 16:24, 16:24], shown[:, 16:24, 16:24])
    tint = {}
    for pictures, found in ((video, one.prototypes["video"]), (frame, one.prototypes["frame"])):
        for k, at in enumerate((0, 3, 6, 9)):
            for row, column in ((1, 2), (2, 3)):
                place = np.s_[k, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                colour = ((pictures[place] - 0.35 * shown[place]) / 0.65).reshape(-1, 3)
                assert np.ptp(colour, axis=0).max() < 1e-5
                tint.setdefault(int(found[at, row, column]), []).append(colour[0])
    assert set(tint) == {3, 7, 20} and all(np.ptp(np.array(seen), axis=0).max() < 1e-5 for seen in tint.values())
    np.testing.assert_allclose(video[:, 4:28, 8:8], 0.4 * shown[:, 4:28, 8:8])
    assert len(np.unique(prototype_colours(64).round(3), axis=0)) == 64


def test_strip_png__has_a_row_per_picture_and_a_column_per_frame() -> None:
    picture = decode(strip_png(clip(), columns=5))
    wide, tall = 0.26 + 5 * 1.2, 0.24 + 4 * (1.15 * 32 / 48 + 0.05)
    assert picture.shape[1] / picture.shape[0] == pytest.approx(wide / tall, rel=0.02)
    bare = ClipStrip(clip().frames, clip().sector, clip().time_s, None, {})
    assert decode(strip_png(bare)).shape[0] < picture.shape[0] / 2


def test_scatter__draws_points_of_both_themes() -> None:
    rng = np.random.default_rng(1)
    target = rng.uniform(20, 70, 30)
    light, dark = (decode(scatter_png(target, target + 3, theme)) for theme in (figures.LIGHT, figures.DARK))
    assert light.shape == dark.shape and light[..., 3].max() == 1 and (light != dark).any()


def test_page__shows_clips_and_regressions_and_names_what_is_broken(tmp_path: Path) -> None:
    for name, content in (("a", arrays()), ("b", {**arrays(), "time_s": np.zeros((1, 3))})):
        (tmp_path / name / "figures").mkdir(parents=True)
        np.savez(tmp_path / name / "figures" / "clips.npz", **content)
    np.savez(tmp_path / "a" / "figures" / "regression.npz", target=np.array([40.0, 55, 60]), predicted=np.array([44.0, 50, 61]))
    found = collect(tmp_path)
    assert len(found.clips) == 1 and found.regressions[0][0] == "a"
    assert any("token grids that divide" in fault for fault in found.faults)
    page = report(tmp_path, tmp_path / "page.html").read_text()
    assert "Clip 1: frames over time" in page and "predictions on patients of other folds" in page
    assert "Reconstructions" not in page and "Segmentation" not in page  # there are none of volumes, and nobody would look for them
    shared = report(tmp_path, tmp_path / "shared.html", with_images=False).read_text()
    assert "Clip 1" not in shared and "<img" not in shared


def test_read__says_what_is_missing() -> None:
    assert read_clips({"frames": np.zeros((1, 2, 8, 8))}) == "has no array sector, time_s"
    assert isinstance(read_clips({**arrays(), "video_prototypes": np.zeros((1, 10, 5, 5), int)}), str)
    assert isinstance(read_regression({"target": np.zeros(3)}), str) and isinstance(
        read_regression({"target": np.zeros(3), "predicted": np.zeros(2)}), str
    )


def test_page_of_an_evaluation_alone__has_its_tables_and_predictions_and_no_empty_sections(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    np.savez(tmp_path / "figures" / "regression.npz", target=np.array([40.0, 55, 60]), predicted=np.array([44.0, 50, 61]))
    row = {
        "name": "encoder",
        "probe": "linear",
        "metric": "r2",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n_images": 3,
        "n_patients": 3,
    }
    (tmp_path / "evaluate.json").write_text(json.dumps({"kind": "evaluate", "target": "ef", "rows": [row]}))
    html = report(tmp_path, tmp_path / "page.html").read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert headings == ["Probes and controls", "Predicted numbers", "Before you use this"]
