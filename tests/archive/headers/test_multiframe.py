"""Headers of single frames, against pydicom, and the volumes they form."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.multiframe import describe_multiframe, frame_headers, frame_numbers, ranges
from medssl.archive.scanning.scan import scan_file
from medssl.errors import ImageError
from tests.synthetic import LPS, oblique_affine
from tests.synthetic_multiframe import Writer, write_enhanced

SYNTAXES = {"implicit": "1.2.840.10008.1.2", "explicit": "1.2.840.10008.1.2.1", "big": "1.2.840.10008.1.2.2"}


def times(w: Writer, k: int, n: int) -> bytes:
    """Functional groups of frame k of a series of n slices per time."""
    content = w.element(0x00209128, "UL", k // n + 1) + w.element(0x00209157, "UL", [1, k % n + 1, k // n + 1])
    echo = w.sequence(0x00189114, [w.element(0x00189082, "FD", 30.5)])
    return w.sequence(0x00209111, [content]) + echo + w.sequence(0x00189117, [w.element(0x00189087, "FD", 100.0 * (k // n))])


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", sorted(SYNTAXES))
def test_frames__as_pydicom_reads_them(tmp_path: Path, syntax: str, undefined: bool) -> None:
    import pydicom

    affine = oblique_affine()
    places = [3, 1, 4, 0, 2, *[3, 1, 4, 0, 2]]
    frames = np.arange(10 * 6 * 7, dtype=np.uint16).reshape(10, 6, 7)
    path = write_enhanced(
        tmp_path / "e.dcm",
        frames,
        affine,
        places,
        syntax=SYNTAXES[syntax],
        undefined=undefined,
        extra=lambda w, k: times(w, k, 5),
        rescale=lambda k: (1.0 + k, 0.25 * k),
    )
    ds = pydicom.dcmread(path)
    np.testing.assert_array_equal(ds.pixel_array, frames)
    ours = frame_headers(path)
    shared = ds.SharedFunctionalGroupsSequence[0]
    assert len(ours) == 10
    for k, (header, groups) in enumerate(zip(ours, ds.PerFrameFunctionalGroupsSequence)):
        assert header["position"] == [float(v) for v in groups.PlanePositionSequence[0].ImagePositionPatient]
        assert header["orientation"] == [float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient]
        assert header["pixel_spacing"] == [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
        assert header["slope"] == float(groups.PixelValueTransformationSequence[0].RescaleSlope)
        assert header["intercept"] == float(groups.PixelValueTransformationSequence[0].RescaleIntercept)
        assert header["temporal_position"] == groups.FrameContentSequence[0].TemporalPositionIndex
        assert header["b_value"] == groups.MRDiffusionSequence[0].DiffusionBValue
        assert header["echo_time"] == groups.MREchoSequence[0].EffectiveEchoTime
        assert (header["rows"], header["columns"], header["n_frames"]) == (6, 7, 10)
        assert (header["syntax"], header["instance_number"]) == (SYNTAXES[syntax], k + 1)
    data = path.read_bytes()
    assert data[ours[0]["pixel_offset"] :] == ds.PixelData and ours[0]["pixel_length"] == len(ds.PixelData)


def test_describe__volumes_in_slice_order_as_json(tmp_path: Path) -> None:
    affine = oblique_affine()
    places = [4, 3, 2, 1, 0, 4, 3, 2, 1, 0]
    path = write_enhanced(tmp_path / "e.dcm", np.zeros((10, 6, 7), np.uint16), affine, places, extra=lambda w, k: times(w, k, 5))
    parts = json.loads(json.dumps(describe_multiframe(path)))
    assert [part["frames"] for part in parts] == [[[4, -1, -1]], [[9, 4, -1]]]
    for k, part in enumerate(parts):
        assert frame_numbers(part["frames"]) == [5 * k + place for place in (4, 3, 2, 1, 0)]
        assert (part["shape"], part["volume_index"], part["n_volumes"]) == ([7, 6, 5], k, 2)
        assert part["split_by"] == "temporal_position" and part["faults"] == []
        np.testing.assert_allclose(part["affine"], affine, atol=1e-6)
        assert part["spacing_mm"] == pytest.approx([0.8, 1.1, 2.5])


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([0, 1, 2, 3], [[0, 4]]),
        ([5], [[5, 6]]),
        ([3, 2, 1, 0], [[3, -1, -1]]),
        ([1, 11, 21, 31], [[1, 32, 10]]),
        ([0, 1, 2, 7, 8, 9], [[0, 3], [7, 10]]),
    ],
)
def test_ranges__compact(indices: list[int], expected: list[list[int]]) -> None:
    assert ranges(indices) == expected


def test_ranges__there_and_back() -> None:
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        indices = [int(i) for i in rng.permutation(40)[:n]]
        assert frame_numbers(ranges(indices)) == indices
    for wrong in ([], [[0]], [[-3, 0]], [[0, 5, 0]], [["a", "b"]]):
        with pytest.raises(ImageError, match="index the files again"):
            frame_numbers(wrong)


@pytest.mark.parametrize("undefined", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_twenty_thousand_frames__in_seconds_and_flat_memory(tmp_path: Path, undefined: bool) -> None:
    n, slices = 20_000, 100
    path = write_enhanced(
        tmp_path / "big.dcm",
        np.zeros((n, 2, 3), np.uint16),
        oblique_affine(),
        [k % slices for k in range(n)],
        undefined=undefined,
        extra=lambda w, k: times(w, k, slices),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    header = read_header(path)
    assert time.process_time() - started < 0.5  # pydicom takes 6 s where lengths are undefined
    (row,) = scan_file(str(path))
    assert time.process_time() - started < 3  # 0.6 to 1 s alone
    parts = describe_multiframe(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 120 * 1024
    assert (header["n_frames"], header["pixel_length"]) == (n, 2 * 3 * 2 * n) and row["reason"] is None
    assert [part["frames"] for part in json.loads(row["header"])["parts"]] == [part["frames"] for part in parts]
    assert len(parts) == 200 and parts[7]["frames"] == [[700, 800]] and parts[7]["shape"] == [3, 2, 100]


def test_dose_grid__frames_placed_by_their_offset_vector(shared_data: Path) -> None:
    """Older multi-frame: FrameIncrementPointer names GridFrameOffsetVector."""
    import pydicom
    import SimpleITK as sitk

    for name in ("rtdose.dcm", "rtdose_expb.dcm"):
        path = shared_data / "dicom_odd" / "pydicom" / name
        ds = pydicom.dcmread(path)
        start, offsets = [float(v) for v in ds.ImagePositionPatient], [float(v) for v in ds.GridFrameOffsetVector]
        ours = np.array([header["position"] for header in frame_headers(path)])
        np.testing.assert_allclose(ours, np.array(start) + np.outer(offsets, [0, 0, 1]), atol=1e-9)
        (part,) = describe_multiframe(path)
        image = sitk.ReadImage(str(path))
        assert tuple(part["shape"]) == image.GetSize()
        np.testing.assert_allclose(part["spacing_mm"], image.GetSpacing(), atol=1e-6)
        np.testing.assert_allclose((LPS @ np.array(part["affine"]))[:3, 3], image.GetOrigin(), atol=1e-6)


def test_real_enhanced__as_pydicom(shared_data: Path) -> None:
    import pydicom

    path = shared_data / "dicom_multiframe" / "mr_brain_sagittal_8frames.dcm"
    ds = pydicom.dcmread(path)
    ours = frame_headers(path)
    assert len(ours) == 8
    for header, groups in zip(ours, ds.PerFrameFunctionalGroupsSequence):
        positions = groups.get("PlanePositionSequence")
        expected = [float(v) for v in positions[0].ImagePositionPatient] if positions else None
        assert header.get("position") == expected


def test_damaged_headers__one_error_and_no_other(tmp_path: Path) -> None:
    path = write_enhanced(
        tmp_path / "e.dcm",
        np.zeros((6, 2, 3), np.uint16),
        oblique_affine(),
        range(6),
        undefined=True,
        extra=lambda w, k: times(w, k, 6),
    )
    data = path.read_bytes()
    end = frame_headers(path)[0]["pixel_offset"]
    rng = np.random.default_rng(5)
    reasons = []
    for trial in range(300):
        broken = bytearray(data)
        if trial % 3 == 0:
            broken = broken[: int(rng.integers(140, end))]
        for _ in range(int(rng.integers(1, 6))):
            broken[int(rng.integers(132, len(broken)))] = int(rng.integers(0, 256))
        path.write_bytes(bytes(broken))
        try:
            describe_multiframe(path)
        except ImageError as err:
            reasons.append(err.reason)
    assert len(reasons) > 50 and set(reasons) <= {"unreadable", "truncated"}


@pytest.mark.parametrize("compressed", [False, True])
def test_more_frames_than_the_file_has_room_for__are_not_made(tmp_path: Path, compressed: bool) -> None:
    """A slip in NumberOfFrames would become hundreds of thousands of headers, each a volume of its own."""
    frames = np.zeros((4, 6, 7), np.uint16)
    fragments = b"\xfe\xff\0\xe0\0\0\0\0" * 5 + b"\xfe\xff\xdd\xe0\0\0\0\0"
    options: dict[str, Any] = {"syntax": "1.2.840.10008.1.2.5", "pixel_data": fragments} if compressed else {}
    path = write_enhanced(tmp_path / "e.dcm", frames, oblique_affine(), range(4), **options)
    assert len(frame_headers(path)) == 4
    data = path.read_bytes()
    place = data.index(b"\x28\0\x08\0IS\x02\x004 ")
    path.write_bytes(data[: place + 6] + b"\x06\x00999999" + data[place + 10 :])
    with pytest.raises(ImageError, match="999999 frames") as caught:
        describe_multiframe(path)
    assert caught.value.reason == "truncated"
