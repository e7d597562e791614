"""Spacing, regions and frame times: what the index says is what the reader delivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
import pytest

from medssl.archive.headers.dicom_extras import read_planar_header
from medssl.archive.headers.image_scale import planar_spacing, region_spacing, us_regions
from medssl.archive.index import index
from medssl.archive.table import Archive, SeriesRow
from medssl.errors import ImageError
from medssl.registry import lookup
from medssl.types import Sample
from tests.synthetic_planar import radiograph, us_loop, us_region, write_planar_dicom

PLANAR = ("xray", "ultrasound", "microscopy")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"detector_spacing": [0.2, 0.2], "magnification": 1.25}, ((0.16, 0.16), "magnification")),
        ({"detector_spacing": [0.2, 0.2], "magnification": 0.0}, ((0.2, 0.2), "detector")),
        ({"detector_spacing": [0.2, 0.2], "pixel_spacing": [0.2, 0.2]}, ((0.2, 0.2), "detector")),
        ({"detector_spacing": [0.2, 0.2], "pixel_spacing": [0.2, 0.2], "magnification": 2.0}, ((0.1, 0.1), "magnification")),
        ({"detector_spacing": [0.2, 0.2], "pixel_spacing": [0.15, 0.15]}, ((0.15, 0.15), "calibration")),
        ({"pixel_spacing": [0.15, 0.1], "spacing_calibration": "GEOMETRY"}, ((0.15, 0.1), "calibration")),
        ({"scanned_spacing": [0.1, 0.1]}, ((0.1, 0.1), "detector")),
        ({"pixel_spacing": [0.15, 0.15]}, ((0.15, 0.15), "header")),
        ({"pixel_spacing": [0.0, 0.15]}, (None, "unknown")),
    ],
)
def test_planar_spacing__is_that_in_the_patient_where_it_can_be(header: dict[str, Any], expected: Any) -> None:
    spacing, source = planar_spacing(header)
    assert source == expected[1]
    assert spacing == (None if expected[0] is None else pytest.approx(expected[0]))


@pytest.mark.parametrize("syntax", ["explicit", "big", "rle"])
def test_us_regions__as_pydicom_reads_them(tmp_path: Path, syntax: str) -> None:
    items = [us_region((5, 100, 2, 150)), us_region((101, 110, 0, 160), data=10, delta_cm=None), us_region((0, 9, 0, 9), space=2)]
    path = write_planar_dicom(tmp_path / "u.dcm", us_loop(3), modality="US", syntax=syntax, SequenceOfUltrasoundRegions=items)
    regions = us_regions(read_planar_header(path))
    expected = pydicom.dcmread(path).SequenceOfUltrasoundRegions
    assert [region.kind for region in regions] == ["tissue_2d", "ecg", "m_mode"]
    for region, item in zip(regions, expected):
        corners = item.RegionLocationMinY0, item.RegionLocationMaxY1 + 1, item.RegionLocationMinX0, item.RegionLocationMaxX1 + 1
        assert region.box == corners
        deltas = item.get("PhysicalDeltaY"), item.get("PhysicalDeltaX")
        assert region.spacing_mm == (None if None in deltas else pytest.approx([10 * delta for delta in deltas]))
    assert region_spacing(regions) == regions[0].spacing_mm


def compare(row: SeriesRow, sample: Sample) -> None:
    """Compare a row with what was read: equal, but for rounding of the row's frame time to a nanosecond."""
    size = sample.image.shape[-2:]
    assert row.shape == (size if sample.meta.kind == "image" else (len(sample.image), *size))
    assert row.kind == ("image" if sample.meta.kind == "image" else "cine")
    assert row.n_slices == (1 if row.kind == "image" else len(sample.image))
    assert row.spacing_mm == sample.spacing_mm
    times = sample.meta.frame_times_ms
    step = None if not times or len(times) < 2 else times[-1] / (len(times) - 1)
    assert row.frame_time_ms == (None if step is None else pytest.approx(step, abs=1e-4))
    source = str(sample.meta.facts.get("fps_source", "unknown"))
    # The index believes a container's rate without looking at the time stamps of its packets, which the reader prefers.
    assert row.fps_source == ("container" if source == "timestamps" else source)
    # What only the pixels show is found by the reader alone.
    pixels = {"colour_doppler", "padding", "nan_voxels", "float32_rounded", "channels_assumed"}
    assert set(sample.meta.flags) - pixels <= set(row.quality_flags)
    if "view" in sample.meta.facts:
        assert (row.view, row.laterality) == (sample.meta.facts["view"], sample.meta.facts["laterality"])
    if "heart_rate" in sample.meta.facts:
        assert row.heart_rate == sample.meta.facts["heart_rate"]
    if "n_regions" in sample.meta.facts:
        assert row.n_regions == sample.meta.facts["n_regions"]
    assert row.units == sample.meta.units


def check_folder(source: Path, out: Path, modality: str, limit: int = 1000) -> tuple[int, int]:
    """Index a folder and read its planar series; return how many were read, and how many have nothing in them."""
    index([source], out, modality=modality)
    archive = Archive.open(out)
    read = empty = 0
    for row in archive.select():
        if row.domain not in PLANAR or row.kind not in ("image", "cine") or read >= limit:
            continue
        files, part = archive.files(row.series_id), archive.part(row.series_id)
        try:
            sample = lookup("domain", row.domain)().read(files, series_id=row.series_id, part=part)
        except ImageError as err:
            if err.reason != "constant":  # no header says that: masks without a lesion
                raise
            empty += 1
            continue
        compare(row, sample)
        read += 1
    return read, empty


def test_index__says_what_the_readers_deliver(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    tissue = us_region((0, 100, 0, 160))
    clips: dict[str, dict[str, Any]] = {
        "vector": {"FrameTimeVector": [0, 20, 60, 40], "FrameTime": 40, "HeartRate": 71},
        "rate": {"CineRate": 30, "RecommendedDisplayFrameRate": 60, "SequenceOfUltrasoundRegions": [tissue]},
        "none": {"SequenceOfUltrasoundRegions": [tissue, us_region((0, 50, 0, 50), delta_cm=(0.1, 0.1))]},
        "cut": {"FrameTime": 33, "SequenceOfUltrasoundRegions": [us_region((0, 300, 0, 400))]},
    }
    for name, tags in clips.items():
        write_planar_dicom(source / f"{name}.dcm", us_loop(4), modality="US", **tags)
    images: dict[str, dict[str, Any]] = {
        "pa": {"ViewPosition": "PA", "Laterality": "R", "ImagerPixelSpacing": [0.15, 0.15]},
        "lld": {"ViewPosition": "LLD", "PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [0.2, 0.1]},
    }
    for name, tags in images.items():
        write_planar_dicom(source / f"{name}.dcm", radiograph(), bits_stored=12, **tags)
    assert check_folder(source, tmp_path / "out", "unknown") == (6, 0)


@pytest.mark.parametrize(
    ("modality", "changes", "reason"),
    [
        ("US", {"SequenceOfUltrasoundRegions": [us_region((0, 99, 0, 99), space=3, data=3)]}, "no_tissue"),
        ("DX", {}, "multiframe"),
        ("DX", {"NumberOfFrames": 1, "PhotometricInterpretation": "RGB"}, "unsupported_pixels"),
        ("DX", {"NumberOfFrames": 1, "PhotometricInterpretation": "PALETTE COLOR"}, "not_scalar"),
        ("DX", {"NumberOfFrames": 1, "PhotometricInterpretation": "ODD"}, "photometric"),
        ("DX", {"NumberOfFrames": 1, "Modality": "OT", "PhotometricInterpretation": "MONOCHROME1"}, None),
    ],
)
def test_index__rejects_what_the_readers_refuse(tmp_path: Path, modality: str, changes: dict[str, Any], reason: str | None) -> None:
    (tmp_path / "src").mkdir()
    path = write_planar_dicom(tmp_path / "src" / "x.dcm", us_loop(4), modality=modality, **changes)
    index([tmp_path / "src"], tmp_path / "out")
    (row,) = Archive.open(tmp_path / "out").select(rejected=True)
    assert row.reason == reason
    domain = lookup("domain", row.domain)()
    if reason is None:  # what the object is (its SOP class) comes before its Modality tag, for index and reader alike
        compare(row, domain.read([path], series_id=row.series_id))
    elif reason != "not_scalar":  # a palette image without its palette is unreadable before it is coloured
        with pytest.raises(ImageError) as caught:
            domain.read([path], series_id=row.series_id)
        assert caught.value.reason == reason


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "modality", "read", "empty"),
    [
        pytest.param("us_lung_video", "US", 28, 0, marks=pytest.mark.slow),
        ("us_breast_busi", "US", 38, 2),
        ("cxr_hannover", "DX", 34, 0),
        ("dicom_odd", "unknown", 9, 0),
        ("dicom_multiframe", "unknown", 1, 0),
        ("fluorescence_ht29", "GM", 3, 0),
        ("histology_tiles_nct_crc", "GM", 9, 0),
        ("wsi_multistain", "GM", 2, 0),
    ],
)
def test_index__says_what_the_readers_deliver_of_real_files(
    shared_data: Path, tmp_path: Path, folder: str, modality: str, read: int, empty: int
) -> None:
    assert check_folder(shared_data / folder, tmp_path / "out", modality) == (read, empty)
