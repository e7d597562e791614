"""Ultrasound cines that are cut short, or damaged in the middle: the sound start is used, and flagged, from the scan to the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from medssl.archive.index import index
from medssl.archive.table import Archive
from medssl.domains.ultrasound import Ultrasound
from medssl.domains.xray import XRay
from medssl.errors import ImageError
from medssl.types import Sample
from tests.synthetic_planar import us_loop, write_planar_dicom

FRAMES, SIZE = 12, (48, 64)


def read(path: Path) -> Sample:
    return Ultrasound(sector=False).read([path], series_id="0" * 32)


def cine(path: Path, syntax: str = "explicit", **extra: object) -> tuple[Path, np.ndarray]:
    frames = us_loop(FRAMES, SIZE)
    return write_planar_dicom(path, frames, modality="US", syntax=syntax, FrameTime=40, **extra), frames


def cut(path: Path, frames: float) -> None:
    """Leave so many frames of uncompressed pixels."""
    content = path.read_bytes()
    lost = int((FRAMES - frames) * SIZE[0] * SIZE[1])
    path.write_bytes(content[: len(content) - lost])


def test_cut_cine__keeps_whole_frames_and_their_times(tmp_path: Path) -> None:
    path, frames = cine(tmp_path / "a.dcm")
    assert "prefix_only" not in read(path).meta.flags
    cut(path, 7.5)
    sample = read(path)
    assert "prefix_only" in sample.meta.flags and sample.image.shape == (7, 1, *SIZE)
    np.testing.assert_array_equal(sample.image[:, 0], frames[:7])
    assert sample.meta.frame_times_ms == tuple(40.0 * n for n in range(7))


def test_cut_cine__with_less_than_two_frames_is_truncated(tmp_path: Path) -> None:
    path, _ = cine(tmp_path / "a.dcm")
    cut(path, 1.9)
    with pytest.raises(ImageError) as caught:
        read(path)
    assert caught.value.reason == "truncated"


def test_cut_radiographs__are_refused_as_before(tmp_path: Path) -> None:
    path = write_planar_dicom(tmp_path / "a.dcm", us_loop(FRAMES, SIZE), modality="DX")
    cut(path, 7)
    with pytest.raises(ImageError) as caught:
        XRay().read([path], series_id="0" * 32)
    assert caught.value.reason == "truncated"


def test_damaged_frame__ends_a_compressed_cine(tmp_path: Path) -> None:
    path, _ = cine(tmp_path / "a.dcm", syntax="rle")
    whole = read(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"\xfe\xff\x00\xe0", 256)  # the offset table, then one item per frame
    for _ in range(8):
        start = content.index(b"\xfe\xff\x00\xe0", start + 8)
    content[start + 8 : start + 72] = b"\xff" * 64  # header of its segments
    path.write_bytes(bytes(content))
    sample = read(path)
    assert "prefix_only" in sample.meta.flags and len(sample.image) == 7
    np.testing.assert_array_equal(sample.image, whole.image[:7])
    assert sample.meta.frame_times_ms == (whole.meta.frame_times_ms or ())[:7]


def test_cut_cine__stays_in_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, left in (("whole", FRAMES), ("some", 7.5), ("none", 1.5)):
        path, _ = cine(folder / f"{name}.dcm", PatientID=name, StudyInstanceUID=f"1.2.{left}", SeriesInstanceUID=f"1.3.{left}")
        cut(path, left)
    index([folder], tmp_path / "index")
    archive = Archive.open(tmp_path / "index")
    rows = {archive.files(row.series_id)[0].stem: row for row in archive.select(None)}
    assert set(rows) == {"whole", "some"}
    for name, row in rows.items():
        assert ("prefix_only" in row.quality_flags) == (name == "some")
    sample = Ultrasound(sector=False).read([folder / "some.dcm"], series_id="0" * 32, part=archive.part(rows["some"].series_id))
    assert len(sample.image) == 7


def test_whole_cine_of_halved_colour__is_not_taken_for_a_cut_one(tmp_path: Path) -> None:
    """Uncompressed YBR_FULL_422 holds two bytes a pixel."""
    folder = tmp_path / "images"
    folder.mkdir()
    frames = us_loop(FRAMES, SIZE)
    grey = np.full_like(frames[..., ::2], 128)
    colour = np.repeat(frames[..., None], 3, axis=-1)
    path = write_planar_dicom(folder / "a.dcm", colour, modality="US", photometric="YBR_FULL_422", FrameTime=40, PatientID="a")
    data = pydicom.dcmread(path)
    data.PixelData = np.stack([frames[..., ::2], frames[..., 1::2], grey, grey], axis=-1).tobytes()
    data.save_as(path)
    index([folder], tmp_path / "index")
    (row,) = Archive.open(tmp_path / "index").select(None)
    sample = read(path)
    assert "prefix_only" not in row.quality_flags and "prefix_only" not in sample.meta.flags
    np.testing.assert_array_equal(sample.image[:, 0], frames)
