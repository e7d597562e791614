"""Ultrasound: frame times, sector, regions and colour; frames against pydicom and PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive.headers.dicom_extras import read_planar_header
from medssl.archive.headers.image_scale import frame_step, frame_times
from medssl.domains.planar import luma
from medssl.domains.ultrasound import Ultrasound, frames_at
from medssl.errors import ImageError, RequestError
from medssl.types import Sample
from tests.synthetic_planar import fan, us_loop, us_region, write_gif, write_planar_dicom, write_video

SERIES = "ab" * 16


def read(path: Path, part: Any = None, **args: Any) -> Sample:
    return Ultrasound(**args).read([path], series_id=SERIES, part=part)


def loop(tmp_path: Path, frames: np.ndarray | None = None, **extra: Any) -> Path:
    return write_planar_dicom(tmp_path / "u.dcm", us_loop() if frames is None else frames, modality="US", **extra)


@pytest.mark.parametrize(
    ("tags", "step", "source", "flags"),
    [
        ({"FrameTimeVector": [0, 30, 50, 40], "FrameTime": 40, "CineRate": 25}, 40, "vector", ()),
        ({"FrameTime": 40, "CineRate": 25}, 40, "frame_time", ()),
        ({"FrameTime": 40, "CineRate": 27}, 40, "frame_time", ()),
        ({"FrameTime": 40, "CineRate": 30}, 40, "frame_time", ("frame_time_conflict",)),
        ({"FrameTimeVector": [0, 40, 40], "FrameTime": 50}, 50, "frame_time", ()),
        ({"CineRate": 50, "RecommendedDisplayFrameRate": 50}, 20, "cine_rate", ()),
        ({"RecommendedDisplayFrameRate": 20}, 50, "recommended", ()),
        ({"FrameTime": 0, "CineRate": 0}, None, "unknown", ("frame_time_unknown",)),
    ],
)
def test_frame_times__order_of_trust(
    tmp_path: Path, tags: dict[str, Any], step: float | None, source: str, flags: tuple[str, ...]
) -> None:
    header = read_planar_header(loop(tmp_path, us_loop(4), **tags))
    times, found, flagged = frame_times(header, 4)
    assert (found, flagged) == (source, flags)
    assert frame_step(header, 4)[1] == (None if step is None else pytest.approx(step))
    if step is None:
        assert times is None
    else:
        assert times is not None and times[0] == 0 and times[-1] == pytest.approx(3 * step)


def test_frame_times__variable_rate_is_kept(tmp_path: Path) -> None:
    vector = [0, 20, 20, 60, 20, 20, 20, 20, 20, 20, 20, 20]
    sample = read(loop(tmp_path, FrameTimeVector=vector))
    assert sample.meta.frame_times_ms == tuple(np.cumsum(vector))
    part = read(tmp_path / "u.dcm", {"frames": [[2, 6]]})
    assert part.meta.frame_times_ms == (0, 60, 80, 100)
    np.testing.assert_array_equal(luma(part.image[:, [0, 0, 0]]), part.image)
    assert len(part.image) == 4


def test_frames_at__by_time() -> None:
    fifty = np.arange(192) * 20.0
    np.testing.assert_array_equal(frames_at(fifty, 50 / 3), np.arange(0, 192, 3))  # the published stride of 3
    np.testing.assert_array_equal(frames_at(fifty, 50 / 3, count=5, start_ms=40), [2, 5, 8, 11, 14])
    np.testing.assert_array_equal(frames_at(fifty, 50), np.arange(192))
    np.testing.assert_array_equal(frames_at([0, 40, 80], 50), [0, 0, 1, 1, 2, 2])  # a tie goes to the earlier frame
    np.testing.assert_array_equal(frames_at([0.0], 10), [0])
    rng = np.random.default_rng(0)
    times = np.concatenate([[0], np.cumsum(rng.uniform(5, 60, 99))])
    wanted = np.arange(0, times[-1], 1000 / 17)
    nearest = np.abs(times[None] - wanted[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(frames_at(times, 17)[: len(wanted)], nearest)
    with pytest.raises(RequestError, match="above 0"):
        frames_at(fifty, 0)


def test_sector__is_what_moves_without_banner_ruler_and_ecg(tmp_path: Path) -> None:
    frames = us_loop()
    sample = read(loop(tmp_path, FrameTime=40))
    assert sample.valid is not None and sample.meta.facts["sector_source"] == "motion"
    overlap = (sample.valid & fan()).sum() / (sample.valid | fan()).sum()
    assert overlap > 0.95
    assert not sample.image[:, 0, :9, :60].any() and not sample.image[:, 0, :, -3:].any() and not sample.image[:, 0, -9:].any()
    np.testing.assert_array_equal(sample.image[:, 0], np.where(sample.valid, frames, 0))
    whole = read(tmp_path / "u.dcm", sector=False)
    np.testing.assert_array_equal(whole.image[:, 0], frames)
    assert whole.valid is None


def test_regions__tissue_box_gives_scale_and_others_are_dropped(tmp_path: Path) -> None:
    regions = [us_region((0, 100, 0, 160)), us_region((60, 70, 70, 90), data=2), us_region((110, 120, 0, 160), space=3, data=3)]
    sample = read(loop(tmp_path, FrameTime=40, SequenceOfUltrasoundRegions=regions, HeartRate=72))
    assert sample.spacing_mm == pytest.approx((0.4, 0.5))
    assert sample.valid is not None and not sample.valid[60:70, 70:90].any() and not sample.valid[100:].any()
    assert sample.valid[40:58, 75:85].all()
    assert (sample.meta.facts["n_regions"], sample.meta.facts["heart_rate"]) == (3, 72)


def test_still__has_the_region_box_or_everything(tmp_path: Path) -> None:
    still = us_loop()[0]
    sample = read(loop(tmp_path, still, SequenceOfUltrasoundRegions=[us_region((10, 100, 20, 140))]))
    assert (sample.meta.kind, sample.image.shape, sample.meta.frame_times_ms) == ("image", (1, 120, 160), None)
    expected = np.zeros((120, 160), bool)
    expected[10:100, 20:140] = True
    assert sample.valid is not None
    np.testing.assert_array_equal(sample.valid, expected)
    bare = read(loop(tmp_path, still))
    np.testing.assert_array_equal(bare.image[0], still)
    assert bare.valid is None and bare.spacing_mm is None


@pytest.mark.parametrize(
    ("region", "shape"),
    [(us_region((0, 100, 0, 160), delta_cm=None), (120, 160)), (us_region((0, 300, 0, 400)), (120, 160))],
)
def test_spacing__none_without_centimetres_or_with_a_region_of_another_picture(
    tmp_path: Path, region: Any, shape: tuple[int, int]
) -> None:
    sample = read(loop(tmp_path, FrameTime=40, SequenceOfUltrasoundRegions=[region], PixelSpacing=[0.3, 0.3]))
    assert sample.spacing_mm is None
    assert ("region_outside" in sample.meta.flags) == (region.RegionLocationMaxX1 > shape[1])


@pytest.mark.parametrize(
    "region",
    [us_region((0, 120, 0, 160), space=2), us_region((0, 120, 0, 160), data=2), us_region((0, 120, 0, 160), space=3, data=4)],
)
def test_no_tissue__refused(tmp_path: Path, region: Any) -> None:
    with pytest.raises(ImageError, match="without a two-dimensional tissue image") as caught:
        read(loop(tmp_path, FrameTime=40, SequenceOfUltrasoundRegions=[region]))
    assert caught.value.reason == "no_tissue"


def coloured_loop() -> np.ndarray:
    """Grey speckle with a box that flickers red and blue, and a coloured logo that stands still."""
    rng = np.random.default_rng(1)
    frames = np.repeat(us_loop()[..., None], 3, axis=-1)
    for frame in frames:
        red = rng.random((24, 24)) < 0.5
        frame[50:74, 66:90] = np.where(red[..., None], (200, 30, 20), (20, 40, 210))
    frames[:, 4:10, 140:150] = (250, 200, 0)
    return frames


def test_colour_doppler__box_dropped_or_kept(tmp_path: Path) -> None:
    frames = coloured_loop()
    sample = read(loop(tmp_path, frames, FrameTime=40))
    assert sample.image.shape == (12, 1, 120, 160) and "colour_doppler" in sample.meta.flags
    assert sample.valid is not None and not sample.valid[50:74, 66:90].any()
    assert sample.valid[30:48, 75:85].all() and not sample.valid[4:10, 140:150].any()
    np.testing.assert_array_equal(sample.image[:, 0][:, sample.valid], frames[..., 0][:, sample.valid])
    kept = read(tmp_path / "u.dcm", doppler="keep")
    assert kept.image.shape == (12, 3, 120, 160) and kept.valid is not None and kept.valid[50:74, 66:90].all()
    np.testing.assert_array_equal(kept.image[:, :, 50:74, 66:90], frames[:, 50:74, 66:90].transpose(0, 3, 1, 2))


def test_tint__carries_nothing(tmp_path: Path) -> None:
    grey = us_loop()
    tinted = np.stack([grey, (grey * 0.8).astype(np.uint8), (grey * 0.5).astype(np.uint8)], -1)
    sample = read(loop(tmp_path, tinted, FrameTime=40), doppler="keep")
    assert sample.image.shape[1] == 1 and "colour_doppler" not in sample.meta.flags
    with pytest.raises(RequestError, match="accepted: drop, keep"):
        Ultrasound(doppler="maybe")


def test_echo_loop__has_no_spacing_and_stays_without(shared_data: Path) -> None:
    """Palette with 16-bit tables, RLE: frames equal pydicom's, 76 ms apart."""
    import pydicom
    from pydicom.pixels import apply_color_lut

    path = shared_data / "dicom_multiframe" / "us_echo_10frames_palette_rle.dcm"
    ds = pydicom.dcmread(path)
    colours = apply_color_lut(ds.pixel_array, ds)
    assert not (colours & 255).any()  # 8 bits, stored in the upper half of 16
    raw = read(path, sector=False, doppler="keep")
    np.testing.assert_array_equal(raw.image, (colours >> 8).transpose(0, 3, 1, 2))
    assert raw.image.dtype == np.uint8 and raw.spacing_mm is None
    sample = read(path)
    assert sample.spacing_mm is None and sample.affine is None
    assert sample.meta.frame_times_ms == tuple(76.0 * k for k in range(10))
    assert (sample.image.shape, sample.meta.facts["fps_source"]) == ((10, 1, 430, 600), "frame_time")
    assert "colour_doppler" in sample.meta.flags
    assert sample.valid is not None
    # The machine's text lies in the left quarter above the sector, the ECG in the lowest rows.
    assert not sample.valid[:60, :100].any() and not sample.valid[370:].any()


def test_real_ycbr_loop__equals_pydicom_and_ignores_the_region_of_another_size(shared_data: Path) -> None:
    import pydicom
    from pydicom.pixels import pixel_array

    path = shared_data / "dicom_odd" / "pydicom" / "examples_ybr_color.dcm"
    raw = read(path, sector=False, doppler="keep")
    expected = luma(pixel_array(path).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(raw.image, expected)
    sample = read(path)
    # The region names rows and columns of a 640x480 picture, the frames are 320x240: its scale is not theirs.
    region = pydicom.dcmread(path).SequenceOfUltrasoundRegions[0]
    assert region.RegionLocationMaxX1 > 320
    assert sample.spacing_mm is None and "region_outside" in sample.meta.flags
    assert len(sample.meta.frame_times_ms or ()) == 30 and sample.meta.facts["sector_source"] == "motion"


def test_real_two_frames__region_in_centimetres(shared_data: Path) -> None:
    import pydicom

    path = shared_data / "dicom_odd" / "pydicom-data" / "OBXXXX1A_rle_2frame.dcm"
    region = pydicom.dcmread(path).SequenceOfUltrasoundRegions[0]
    sample = read(path)
    assert sample.spacing_mm == pytest.approx((region.PhysicalDeltaY * 10, region.PhysicalDeltaX * 10))
    assert sample.meta.frame_times_ms is None and "frame_time_unknown" in sample.meta.flags
    assert sample.valid is not None and not sample.valid[:60].any() and not sample.valid[519:].any()


def test_real_stills__equal_pillow(shared_data: Path) -> None:
    from PIL import Image

    paths = sorted(path for path in (shared_data / "us_breast_busi").rglob("*.png") if "mask" not in path.name)
    assert len(paths) == 20
    for path in paths[::5]:
        sample = read(path)
        np.testing.assert_array_equal(sample.image[0], np.asarray(Image.open(path))[..., 0])
        assert (sample.meta.kind, sample.spacing_mm, sample.valid) == ("image", None, None)


@pytest.mark.parametrize(
    ("name", "n_frames", "step_ms"),
    [
        ("Reg_pat3Image_134811.mpeg", 207, 40.0),
        ("Reg_Image_182106_crop.mp4", 206, 1653e3 / 51500),
        ("Cov_recommendations_likebutterfly_mov5.mov", 138, 3e3 / 68),
    ],
)
def test_real_clips__equal_pyav(shared_data: Path, name: str, n_frames: int, step_ms: float) -> None:
    av = pytest.importorskip("av")
    path = shared_data / "us_lung_video" / "cc-by" / name
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    raw = read(path, sector=False)
    assert len(frames) == n_frames == len(raw.image)
    np.testing.assert_array_equal(raw.image[:, 0], np.stack(frames))
    times = raw.meta.frame_times_ms
    assert times is not None and times[-1] == pytest.approx((n_frames - 1) * step_ms, rel=1e-4)
    assert raw.spacing_mm is None and "lossy" in raw.meta.flags


@pytest.mark.slow
def test_every_real_clip__frames_of_the_manifest(shared_data: Path) -> None:
    import csv

    pytest.importorskip("av")
    with open(shared_data / "manifest.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["file"].startswith("us_lung_video/cc-by/")]
    assert len(rows) == 21
    for row in rows:
        sample = read(shared_data / row["file"])
        assert str((len(sample.image), *sample.image.shape[-2:])) == row["shape_or_object_count"]
        assert 0.7 < sample.meta.facts["sector_fraction"] < 1


@pytest.mark.parametrize(("codec", "pixels"), [("mpeg4", "yuv420p"), ("mjpeg", "yuvj422p"), ("ffv1", "gray"), ("ffv1", "yuv444p")])
def test_grey_video__equals_pyav(tmp_path: Path, codec: str, pixels: str) -> None:
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "g.avi", np.repeat(us_loop(5)[..., None], 3, axis=-1), codec=codec, pixels=pixels)
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
    np.testing.assert_array_equal(read(path, sector=False).image[:, 0], expected)


def test_video__colour_and_rates(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "c.avi", coloured_loop(), fps=20)
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    raw = read(path, sector=False, doppler="keep")
    np.testing.assert_array_equal(raw.image, frames.transpose(0, 3, 1, 2))
    assert raw.meta.frame_times_ms == pytest.approx([50.0 * k for k in range(12)])
    part = read(path, {"frames": [[3, 5]]}, sector=False, doppler="keep")
    np.testing.assert_array_equal(part.image, raw.image[3:5])
    dropped = read(path)
    assert dropped.image.shape[1] == 1 and dropped.valid is not None and not dropped.valid[54:70, 70:86].any()


def test_video__damaged_or_without_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    path = write_video(tmp_path / "c.mp4", coloured_loop())
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:400])
    with pytest.raises(ImageError, match="could not be decoded") as caught:
        read(tmp_path / "cut.mp4")
    assert caught.value.reason == "unreadable" and str(tmp_path) not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImageError, match=r'pip install "medssl\[video\]"'):
        read(path)


@pytest.mark.parametrize(("codec", "suffix"), [("mpeg4", "avi"), ("mpeg4", "mp4"), ("ffv1", "avi")])
def test_video__corrupt_middle_keeps_the_prefix_and_says_so(tmp_path: Path, codec: str, suffix: str) -> None:
    av = pytest.importorskip("av")
    frames = np.repeat(us_loop(40)[..., None], 3, axis=-1)
    path = write_video(tmp_path / f"c.{suffix}", frames, codec=codec)
    with av.open(str(path)) as container:
        good = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
    whole = read(path, sector=False)
    assert len(whole.image) == len(good) and "prefix_only" not in whole.meta.flags
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place : place + 2000] = np.random.default_rng(0).bytes(2000)
    path.write_bytes(content)
    sample = read(path, sector=False)
    assert "prefix_only" in sample.meta.flags and 10 < len(sample.image) < 25
    np.testing.assert_array_equal(sample.image[:, 0], good[: len(sample.image)])
    assert sample.meta.frame_times_ms == (whole.meta.frame_times_ms or ())[: len(sample.image)]


def test_video__turned_by_its_container_is_read_upright(tmp_path: Path) -> None:
    """A phone held sideways writes a matrix (ISO 14496-12, `tkhd`) instead of turning pixels: a quarter turn clockwise here."""
    pytest.importorskip("av")
    path = write_video(tmp_path / "r.mp4", np.repeat(us_loop(4)[..., None], 3, axis=-1))
    lying = read(path, sector=False)
    content = bytearray(path.read_bytes())
    identity, quarter = ((1, 0, 0, 0, 1, 0), (0, 1, 0, -1, 0, 0))
    words = [b"".join((value << 16).to_bytes(4, "big", signed=True) for value in matrix) for matrix in (identity, quarter)]
    place = content.index(words[0], content.index(b"tkhd"))
    content[place : place + 24] = words[1]
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path, sector=False).image, np.rot90(lying.image, -1, axes=(2, 3)))


def test_sector__not_found_takes_all_and_says_so(tmp_path: Path) -> None:
    still = np.repeat(us_loop(1), 6, axis=0)
    sample = read(loop(tmp_path, still, FrameTime=40))
    assert sample.valid is None and "sector_unknown" in sample.meta.flags and sample.meta.facts["sector_source"] == "none"
    boxed = read(loop(tmp_path, still, FrameTime=40, SequenceOfUltrasoundRegions=[us_region((10, 100, 20, 140))]))
    assert boxed.valid is not None and "sector_unknown" not in boxed.meta.flags


def test_sector__near_field_beyond_a_shadow_and_faint_flicker_belong_to_it(tmp_path: Path) -> None:
    """A fan whose middle is black, whose right part barely flickers, above a moving ECG strip."""
    frames, sector = us_loop(16).astype(int), fan()
    rng = np.random.default_rng(3)
    frames[:, 34:70] = np.where(sector[34:70], 0, frames[:, 34:70])
    faint = sector & (np.mgrid[:120, :160][1] > 95)
    frames[:, faint] = 4 + (rng.random((16, int(faint.sum()))) < 0.4)
    frames[:, 108:118, 4:60] = 0
    for t in range(16):
        frames[t, 108 + (np.arange(4, 60) * 3 + 5 * t) % 10, np.arange(4, 60)] = 220
    sample = read(loop(tmp_path, frames.astype(np.uint8), FrameTime=40))
    assert sample.valid is not None
    overlap = (sample.valid & sector).sum() / (sample.valid | sector).sum()
    assert overlap > 0.93 and not sample.valid[106:].any()


def test_gif__moving_is_a_clip_and_still_an_image(tmp_path: Path) -> None:
    frames = us_loop(5)
    clip = read(write_gif(tmp_path / "m.gif", frames, [40, 40, 100, 40, 40]), sector=False)
    np.testing.assert_array_equal(clip.image[:, 0], frames)
    assert clip.meta.frame_times_ms == (0, 40, 80, 180, 220)
    still = read(write_gif(tmp_path / "s.gif", frames[:1], [40]))
    assert still.meta.kind == "image"
    np.testing.assert_array_equal(still.image[0], frames[0])
    nobody_knows = read(write_gif(tmp_path / "z.gif", frames, [0] * 5))
    assert nobody_knows.meta.frame_times_ms is None and "frame_time_unknown" in nobody_knows.meta.flags
