"""Echo phantoms: the ejection fraction against counted pixels, files against pydicom, PyAV and our own index and domain."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.index import index
from medssl.archive.table import Archive
from medssl.domains.ultrasound import Ultrasound
from medssl.errors import RequestError
from medssl.phantoms.echo import (
    ED,
    ES,
    SEGMENTS,
    EchoClip,
    EchoHeart,
    draw_clip,
    draw_heart,
    make_echo_cohort,
    write_echo_avi,
    write_echo_dicom,
)

SIZE = (96, 120)


def discs_ml(mask: np.ndarray, clip: EchoClip, width_mm: float = 2.0) -> float:
    """Count pixels: slice the mask across its long axis, stack discs of the widths found (single-plane Simpson)."""
    (row, column), (down, across) = clip.axis
    at = np.argwhere(mask) + 0.5 - (row, column)
    along = (at @ (down, across)) * clip.pixel_mm
    area = np.bincount(((along - along.min()) / width_mm).astype(int)) * clip.pixel_mm**2
    return float((math.pi / 4 * (area / width_mm) ** 2 * width_mm).sum() / 1000)


def heart_of(segment: str = "none", motion: str = "normal", **changes: float) -> EchoHeart:
    given = {
        "half_width_mm": 24.0,
        "length_mm": 85.0,
        "wall_mm": 10.0,
        "shorten_width": 0.3,
        "shorten_length": 0.15,
        "heart_rate": 72.0,
    }
    return EchoHeart(**{**given, **changes}, wall_motion=motion, segment=segment, right_mm=16, atrium_mm=35, wall_db=-10, seed=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clips() -> list[EchoClip]:
    return [draw_clip(draw_heart(seed, anomaly=0.5), seed, size=(160, 200), seconds=1.3) for seed in (1, 9, 12)]


def test_volume__is_the_half_ellipsoid_and_area_length() -> None:
    heart = heart_of()
    assert heart.volume_ml(ED) == pytest.approx(2 / 3 * math.pi * 24**2 * 85 / 1000, rel=1e-4)
    area = math.pi / 4 * 2 * 24 * 85
    assert heart.volume_ml(ED) == pytest.approx(8 * area**2 / (3 * math.pi * 85) / 1000, rel=1e-4)
    assert heart.ejection_fraction == pytest.approx(100 * (1 - 0.7**2 * 0.85), abs=0.01)


@pytest.mark.parametrize("segment", SEGMENTS[1:])
def test_anomaly__holds_its_wall_back_and_lowers_the_fraction(segment: str) -> None:
    normal, sick = heart_of(), heart_of(segment, "akinetic")
    assert sick.volume_ml(ED) == pytest.approx(normal.volume_ml(ED))
    assert normal.ejection_fraction - sick.ejection_fraction > 5
    assert sick.ejection_fraction < heart_of(segment, "hypokinetic").ejection_fraction < normal.ejection_fraction
    side, u = (-1.0 if segment.startswith("septal") else 1.0), np.array([0.3 if segment.endswith("apical") else 0.72])
    assert sick.held_back(u, np.array([side]))[0] == pytest.approx(0) and sick.held_back(u, np.array([-side]))[0] == 1


def test_contraction__empties_then_fills_in_three_parts() -> None:
    heart = heart_of()
    phase = np.linspace(0, 1, 2001)
    state = heart.contraction(phase)
    assert state[0] == 0 and state[-1] == 0 and state.max() == pytest.approx(1, abs=1e-4)
    assert phase[state.argmax()] == pytest.approx(heart.systole, abs=1e-3)
    rising = phase < heart.systole
    assert (np.diff(state[rising]) >= 0).all() and (np.diff(state[~rising]) <= 1e-12).all()
    plateau = heart.contraction(heart.systole + np.array([0.5, 0.7]) * (1 - heart.systole))
    assert plateau[0] == pytest.approx(plateau[1]) == pytest.approx(0.3)
    np.testing.assert_allclose(heart.contraction(phase + 3), state, atol=1e-9)
    assert heart_of(heart_rate=110).systole > heart.systole


def test_ejection_fraction__is_what_the_masks_give(clips: list[EchoClip]) -> None:
    for clip in clips:
        counted = np.array([discs_ml(frame == 1, clip) for frame in clip.labels])
        np.testing.assert_allclose(counted, clip.volumes_ml, rtol=0.06)
        ed, es = counted[list(clip.ed_frames)].mean(), counted[list(clip.es_frames)].mean()
        assert 100 * (1 - es / ed) == pytest.approx(clip.heart.ejection_fraction, abs=2)


def test_marks__are_the_extremes_of_the_volume(clips: list[EchoClip]) -> None:
    for clip in clips:
        volumes = clip.volumes_ml
        assert clip.ed_frames and clip.es_frames
        heart = clip.heart
        for frame in clip.ed_frames:
            assert volumes[frame] > heart.volume_ml(ED) - 0.1 * (heart.volume_ml(ED) - heart.volume_ml(ES))
        for frame in clip.es_frames:
            assert volumes[frame] < heart.volume_ml(ES) + 0.1 * (heart.volume_ml(ED) - heart.volume_ml(ES))
        beat_ms = 60000 / heart.heart_rate
        for frames in (clip.ed_frames, clip.es_frames):
            np.testing.assert_allclose(np.diff(clip.frame_times_ms[list(frames)]), beat_ms, atol=45)


def test_labels__lie_in_the_sector_and_in_order(clips: list[EchoClip]) -> None:
    for clip in clips:
        assert set(np.unique(clip.labels)) == {0, 1, 2, 3}
        assert not clip.labels[:, ~clip.sector].any()
        assert clip.box[0] < clip.box[1] < clip.ecg_box[0] and 0.2 < clip.sector.mean() < 0.6
        (row, column), (down, across) = clip.axis
        along = [((np.argwhere(clip.labels[0] == part) - (row, column)) @ (down, across)).mean() for part in (1, 3)]
        assert along[0] < along[1]  # the atrium lies below the ventricle


def test_speckle__moves_with_the_wall() -> None:
    """A patch of the wall is found again where the wall went, and not where it was: followed by correlation alone."""
    clip = draw_clip(heart_of(shorten_width=0.35, shorten_length=0.2), 3, size=(192, 240), seconds=1.2)
    frames, ed = clip.frames.astype(float), clip.ed_frames[0]
    (row, column), direction = clip.axis
    axis = np.array(direction)
    normal = np.array([-axis[1], axis[0]])

    def base(frame: int) -> float:
        """Place of the mitral plane along the axis, in pixels."""
        return float(((np.argwhere(clip.labels[frame] == 1) - (row, column)) @ axis).max())

    walls = np.argwhere(clip.labels[ed] == 2)
    along, off = (walls - (row, column)) @ axis, (walls - (row, column)) @ normal
    patch = walls[(np.abs(along - 0.8 * base(ed)) < 12) & (off > 0)]
    assert len(patch) > 150
    for later in (6, 8):

        def likeness(shift: float, across: float, later: int = later) -> float:
            to = np.round(patch - axis * shift - normal * across).astype(int)
            return float(np.corrcoef(frames[ed][tuple(patch.T)], frames[ed + later][tuple(to.T)])[0, 1])

        moved = 0.8 * (base(ed) - base(ed + later))  # the wall four fifths of the way down goes four fifths as far as the base
        best, shift = max((likeness(s, a), s) for s in range(-4, 20) for a in range(-3, 10))
        assert moved > 3 and shift == pytest.approx(moved, abs=2)
        assert best > 0.55 and abs(likeness(0, 0)) < 0.3


def test_gain_and_place__differ_and_brightness_does_not_tell() -> None:
    hearts = [draw_heart(seed) for seed in range(200)]
    fractions = np.array([heart.ejection_fraction for heart in hearts])
    assert fractions.min() < 22 and fractions.max() > 66
    assert abs(np.corrcoef(fractions, [heart.volume_ml(ED) for heart in hearts])[0, 1]) < 0.2
    assert 0.15 < np.mean([heart.wall_motion != "normal" for heart in hearts]) < 0.45
    shown = [draw_clip(hearts[k], k, size=(64, 80), seconds=0.1) for k in range(12)]
    means = [clip.frames[:, clip.sector].mean() for clip in shown]
    assert max(means) > 2 * min(means) and 20 < np.median(means) < 160
    assert np.ptp([clip.pixel_mm for clip in shown]) > 0.3


def test_same_seed_same_clip_another_another() -> None:
    heart = draw_heart(5)
    first, again, other = (draw_clip(heart, seed, size=SIZE, seconds=0.3) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.frames.shape != other.frames.shape or (first.frames != other.frames).any()


def test_dicom__equals_pydicom_and_our_domain(tmp_path: Path, clips: list[EchoClip]) -> None:
    import pydicom

    for steady in (True, False):
        clip = clips[0] if steady else draw_clip(draw_heart(1), 4, size=SIZE, seconds=0.6, steady=False)
        path = tmp_path / f"{steady}.dcm"
        write_echo_dicom(path, clip, patient_id="echo_0001", steady=steady)
        ds = pydicom.dcmread(path)
        np.testing.assert_array_equal(ds.pixel_array, clip.frames)
        assert ds.HeartRate == round(clip.heart.heart_rate)
        sample = Ultrasound().read([path], series_id="0" * 32)
        assert sample.spacing_mm == pytest.approx((clip.pixel_mm, clip.pixel_mm))
        np.testing.assert_allclose(sample.meta.frame_times_ms or (), clip.frame_times_ms, atol=2e-3)
        assert sample.meta.facts["fps_source"] == ("frame_time" if steady else "vector")
        assert sample.valid is not None
        overlap = (sample.valid & clip.sector).sum() / (sample.valid | clip.sector).sum()
        assert overlap > 0.9
        np.testing.assert_array_equal(sample.image[:, 0], np.where(sample.valid, clip.frames, 0))


def test_avi__equals_pyav_and_our_domain(tmp_path: Path, clips: list[EchoClip]) -> None:
    av = pytest.importorskip("av")
    clip = clips[1]
    write_echo_avi(tmp_path / "a.avi", clip)
    with av.open(str(tmp_path / "a.avi")) as container:
        decoded = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
    whole = Ultrasound(sector=False).read([tmp_path / "a.avi"], series_id="0" * 32)
    np.testing.assert_array_equal(whole.image[:, 0], decoded)
    assert np.abs(decoded.astype(int) - clip.frames)[:, clip.sector].mean() < 4  # Motion JPEG
    sample = Ultrasound().read([tmp_path / "a.avi"], series_id="0" * 32)
    assert sample.spacing_mm is None and sample.valid is not None
    np.testing.assert_allclose(sample.meta.frame_times_ms or (), clip.frame_times_ms, rtol=1e-3, atol=1e-2)
    assert (sample.valid & clip.sector).sum() / (sample.valid | clip.sector).sum() > 0.9
    assert not sample.valid[:6, :16].any()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    out = tmp_path_factory.mktemp("echo") / "cohort"
    return make_echo_cohort(out, patients=4, clips=2, seed=3, size=(64, 80), seconds=0.3)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "split.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_cohort__same_seed_same_bytes(cohort: Path, tmp_path: Path) -> None:
    again = make_echo_cohort(tmp_path / "c", patients=4, clips=2, seed=3, size=(64, 80), seconds=0.3)

    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(again) == digests(cohort) and len(digests(again)) == 2 + 2 * 8
    assert make_echo_cohort(cohort, patients=4, clips=2, seed=3, size=(64, 80), seconds=0.3) == cohort
    with pytest.raises(RequestError, match="holds something else"):
        make_echo_cohort(cohort, patients=7, size=(64, 80))


def test_cohort__one_heart_per_patient_and_splits_by_patient(cohort: Path) -> None:
    rows = rows_of(cohort)
    assert len(rows) == 8
    for patient in {row["patient"] for row in rows}:
        own = [row for row in rows if row["patient"] == patient]
        assert len({(row["ef"], row["split"], row["wall_motion"]) for row in own}) == 1 and len(own) == 2
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    assert sum(row["file"].endswith(".dcm") for row in rows) == 4
    for row in rows:
        with np.load(cohort / "labels" / row["label"]) as found:
            assert found["labels"].shape[1:] == (64, 80) == found["sector"].shape
            assert len(found["volumes_ml"]) == len(found["frame_times_ms"]) == len(found["labels"])


def test_cohort__goes_through_the_index(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("phantoms have no patients to protect\n")
    (tmp_path / "key").chmod(0o600)
    done = index([cohort / "images"], tmp_path / "a", modality="US", key_file=tmp_path / "key")
    rows = Archive.open(tmp_path / "a").select(None)
    assert done.n_files_used == 8 and {row.kind for row in rows} == {"cine"} and {row.domain for row in rows} == {"ultrasound"}
    assert all(row.frame_time_ms is not None and row.status != "rejected" for row in rows)
    assert sum(row.spacing_mm is not None for row in rows) == 4
    dicom = [row for row in rows if row.spacing_mm is not None]
    assert {row.fps_source for row in dicom} <= {"frame_time", "vector"} and all(row.heart_rate for row in dicom)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"patients": 2}, "3 or more"),
        ({"dicom_fraction": 2}, "shares from 0 to 1"),
        ({"size": (63, 80)}, "even numbers"),
        ({"clips": 0}, "a clip of each"),
    ],
)
def test_arguments__are_checked(options: dict[str, object], match: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=match):
        make_echo_cohort(tmp_path / "c", **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_fraction__is_in_the_outlines_and_not_in_the_pixels() -> None:
    """Ridge across 60 patients: areas of the masks give the ejection fraction, small clips and intensity statistics do not."""
    import torch

    from medssl.evaluation.controls import intensity_statistics, small_images
    from medssl.evaluation.linear_probe import linear_predict
    from medssl.evaluation.scores import r2
    from medssl.sampling.clips import pick_frames

    rows: dict[str, list[np.ndarray]] = {"raw": [], "statistics": [], "areas": []}
    fractions = []
    for seed in range(60):
        clip = draw_clip(draw_heart(seed), 1000 + seed, size=(64, 80), seconds=1.05)
        chosen = pick_frames(clip.frame_times_ms, 16, 16).frames
        top, bottom, left, right = clip.box
        shown = torch.from_numpy((clip.frames * clip.sector)[chosen, top:bottom, left:right].astype(np.float32))[None, None]
        inside = clip.frames[:, clip.sector]
        shown = (shown - float(inside.mean())) / float(inside.std())
        areas = (clip.labels == 1).sum(axis=(1, 2)) ** 1.5
        rows["raw"].append(small_images(shown).numpy()[0])
        rows["statistics"].append(intensity_statistics(shown).numpy()[0])
        rows["areas"].append(np.array([areas.min() / areas.max()]))
        fractions.append(clip.heart.ejection_fraction)
    truth = np.array(fractions)
    found = {
        name: r2(np.stack([truth, linear_predict(np.array(features), truth, None, task="regression")], axis=1))
        for name, features in rows.items()
    }
    assert found["areas"] > 0.9 and found["raw"] < 0.3 and found["statistics"] < 0.3, found
