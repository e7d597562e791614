"""Telling files apart, and headers of damaged ones."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medssl.archive.headers import file_headers
from medssl.archive.headers.dicom_header import read_header
from medssl.archive.headers.file_headers import HEAD_BYTES, read_volume_header, sniff
from medssl.archive.ids import IdKey, is_placeholder, normalise
from medssl.archive.scanning.scan import scan_file
from medssl.domains.mri import MRI
from medssl.errors import ImageError, RequestError
from tests.synthetic import SYNTAXES, oblique_volume, plain_affine, write_dicom_series, write_itk, write_nifti
from tests.synthetic_multiframe import Writer, meta_group
from tests.synthetic_slides import write_dicom_wsi


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v.nii", "nifti"),
        ("v.nii.gz", "nifti_gz"),
        ("v.nrrd", "nrrd"),
        ("v.nhdr", "nrrd"),
        ("v.mha", "metaimage"),
        ("v.mhd", "metaimage"),
    ],
)
def test_headers__agree_with_what_was_written(tmp_path: Path, name: str, kind: str) -> None:
    array, affine = oblique_volume()
    path = (write_nifti if ".nii" in name else write_itk)(tmp_path / name, array, affine)
    head = path.read_bytes()[:HEAD_BYTES]
    assert sniff(head) == kind
    header = read_volume_header(path, kind, head)
    assert (header.shape, header.dtype, header.reason, header.flags) == (array.shape, "int16", None, ())
    assert header.affine is not None
    np.testing.assert_allclose(header.affine, affine, atol=1e-5)
    assert bool(header.data_files) == (name in ("v.nhdr", "v.mhd"))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"", "empty"),
        (b"hello", "other"),
        (b"\x89PNG\r\n", "png"),
        (b"\x1f\x8b\x08\0junk", "gzip"),
        (b"\0" * 128 + b"DICM", "dicom"),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "dicom"),
        (b"\x08\0\0\0\x04\0\0\0\x10\0\0\0", "dicom"),
        (b"\x5c\x01\0\0" + b"\0" * 400, "other"),
    ],
)
def test_sniff__by_first_bytes(head: bytes, kind: str) -> None:
    assert sniff(head) == kind


@pytest.mark.parametrize("syntax", sorted(SYNTAXES))
def test_dicom_header__finds_the_pixels(tmp_path: Path, syntax: str) -> None:
    array, affine = oblique_volume()
    path = write_dicom_series(tmp_path, array, affine, syntax=syntax)[3]
    header = read_header(path)
    assert (header["rows"], header["columns"], header["instance_number"], header["modality"]) == (26, 20, 4, "MR")
    assert header["syntax"] == SYNTAXES[syntax]
    if syntax in ("implicit", "explicit", "big"):
        assert header["pixel_length"] == 20 * 26 * 2
        data = path.read_bytes()[header["pixel_offset"] :][: header["pixel_length"]]
        pixels = np.frombuffer(data, ">i2" if syntax == "big" else "<i2").reshape(26, 20)
        np.testing.assert_array_equal(pixels.T, array[:, :, 3])
    else:
        assert header["pixel_length"] is None


def test_dicom_header__malformed_values_are_absent(tmp_path: Path) -> None:
    import pydicom

    path = write_dicom_series(tmp_path, *oblique_volume())[0]
    ds = pydicom.dcmread(path)
    ds.file_meta  # noqa: B018
    raw = path.read_bytes()
    spacing = "\\".join(
        ds.PixelSpacing.original_string if hasattr(ds.PixelSpacing, "original_string") else map(str, ds.PixelSpacing)
    )
    assert spacing.encode() in raw
    path.write_bytes(raw.replace(spacing.encode(), b"x" * len(spacing)))
    header = read_header(path)
    assert "pixel_spacing" not in header and header["rows"] == 26


@pytest.mark.parametrize("cut", [1, 4, 100, 130, 140, 200, 400, 700])
def test_scan_of_cut_files__a_reason_never_an_exception(tmp_path: Path, cut: int) -> None:
    array, affine = oblique_volume()
    paths = [write_dicom_series(tmp_path / "d", array, affine)[0]]
    paths += [write_nifti(tmp_path / name, array, affine) for name in ("v.nii", "v.nii.gz")]
    paths += [write_itk(tmp_path / name, array, affine) for name in ("w.nrrd", "w.mha")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:cut])
        assert scan_file(str(path))[-1]["reason"] in ("not_image", "truncated", "unreadable", "unsupported_format")


def test_scan_of_random_bytes__a_reason_never_an_exception(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array, affine = oblique_volume((6, 7, 5))
    sources = [write_nifti(tmp_path / "v.nii", array, affine), write_itk(tmp_path / "w.nrrd", array, affine)]
    sources += [write_itk(tmp_path / "w.mha", array, affine), write_dicom_series(tmp_path / "d", array, affine)[0]]
    path = tmp_path / "mutant"
    for source in sources:
        data = np.frombuffer(source.read_bytes(), np.uint8)
        for _ in range(60):
            mutant = data.copy()
            places = rng.integers(0, min(len(data), 900), 8)
            mutant[places] = rng.integers(0, 256, 8)
            path.write_bytes(mutant.tobytes())
            row = scan_file(str(path))[0]
            assert isinstance(row["header"], str)


def test_nifti__size_claims_beyond_the_file_are_truncation(tmp_path: Path) -> None:
    data = bytearray(write_nifti(tmp_path / "v.nii", np.zeros((4, 4, 4), np.int16), plain_affine()).read_bytes())
    data[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "v.nii").write_bytes(bytes(data))
    assert scan_file(str(tmp_path / "v.nii"))[0]["reason"] == "truncated"


def test_nrrd__long_faulty_lines_never_reach_itk(tmp_path: Path) -> None:
    """ITK ends the process on them: 1,000 characters are enough in `dimension` and in unknown fields, 1,037 in the others."""
    array, affine = oblique_volume()
    data = write_itk(tmp_path / "v.nrrd", array, affine).read_bytes()
    path = tmp_path / "w.nrrd"
    for line in (b"kinds: " + b"9" * 5000, b"foo: " + b"x" * 600, b"1 " * 20000):
        path.write_bytes(data.replace(b"type: short", line + b"\ntype: short"))
        assert scan_file(str(path))[0]["reason"] == "unreadable"
        with pytest.raises(ImageError, match="line of more than 512 characters"):
            MRI().read([path], series_id="0" * 32)
    long = b"# " + b"c" * 3000 + b"\ncontent: " + b"x" * 3000 + b"\nkey:=" + b"y" * 3000 + b"\ntype: short"
    path.write_bytes(data.replace(b"type: short", long))
    assert scan_file(str(path))[0]["reason"] is None
    np.testing.assert_array_equal(
        MRI().read([path], series_id="0" * 32).image, MRI().read([tmp_path / "v.nrrd"], series_id="0" * 32).image
    )


def test_gzip_whose_length_is_in_doubt__is_inflated_so_far_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, affine = oblique_volume()
    data = write_nifti(tmp_path / "v.nii.gz", array, affine).read_bytes()
    two = tmp_path / "two.nii.gz"  # two members, as bgzip writes them: the trailer tells the length of the last one only
    plain = gzip.decompress(data)
    two.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    assert scan_file(str(two))[0]["reason"] is None
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(plain[:-4000]))
    assert scan_file(str(tmp_path / "cut.nii.gz"))[0]["reason"] == "truncated"
    monkeypatch.setattr(file_headers, "MAX_INFLATED_BYTES", 3000)
    assert scan_file(str(two))[0]["reason"] is None


def test_dicomdir__is_a_row_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "DICOMDIR"
    w = Writer()
    path.write_bytes(
        meta_group("1.2.840.10008.1.2.1", "1.2.840.10008.1.3.10") + w.sequence(0x00041220, [w.element(0x00041430, "CS", "PATIENT")])
    )
    (row,) = scan_file(str(path))
    assert (row["kind"], row["reason"], row["header"]) == ("other", "not_image", "{}")


def test_dicom_slide__is_told_from_other_dicom(tmp_path: Path) -> None:
    path = write_dicom_wsi(tmp_path / "slide.dcm")
    assert sniff(path.read_bytes()[:HEAD_BYTES]) == "dicom_wsi"
    slide = json.loads(scan_file(str(path))[0]["header"])["slide"]
    assert (slide["shape"], slide["mpp"], slide["format"]) == ([256, 384], 0.5, "dicom")


@pytest.mark.data
def test_real_dicomdir__is_a_row_with_a_reason(shared_data: Path) -> None:
    paths = sorted((shared_data / "dicom_odd").rglob("DICOMDIR*"))
    assert paths
    for path in paths:
        (row,) = scan_file(str(path))
        assert (row["kind"], row["reason"]) == ("other", "not_image")


@pytest.mark.data
def test_odd_dicom__every_file_a_row_or_a_reason(shared_data: Path) -> None:
    paths = [path for path in (shared_data / "dicom_odd").rglob("*") if path.is_file()]
    rows = [scan_file(str(path)) for path in paths]
    assert len(paths) == 125 and all(len(found) == 1 for found in rows)
    reasons = Counter(found[0]["reason"] for found in rows)
    assert set(reasons) <= {None, "not_image", "truncated"} and reasons[None] > 80


def test_affines_without_lengths__are_no_affines(tmp_path: Path) -> None:
    data = bytearray(write_nifti(tmp_path / "v.nii", np.zeros((4, 5, 6), np.int16), plain_affine()).read_bytes())
    data[280:284] = np.array([3e38], "<f4").tobytes()
    (tmp_path / "v.nii").write_bytes(bytes(data))
    assert json.loads(scan_file(str(tmp_path / "v.nii"))[0]["header"])["affine"] is not None  # odd, but a number
    text = write_itk(tmp_path / "w.mha", np.zeros((4, 5, 6), np.int16), plain_affine()).read_bytes()
    (tmp_path / "w.mha").write_bytes(text.replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 1e300 1 1"))
    assert scan_file(str(tmp_path / "w.mha"))[0]["reason"] is None
    assert json.loads(scan_file(str(tmp_path / "w.mha"))[0]["header"])["reason"] == "no_spacing"


def test_ids__depend_on_key_field_issuer_and_normalised_value() -> None:
    key = IdKey(b"k" * 16)
    base = key.make("patient", "A", "12 34")
    assert len(base) == 32 and base == key.make("patient", "A", "  12  34\0 ")
    others = [key.make("study", "A", "12 34"), key.make("patient", "B", "12 34"), key.make("patient", "A", "1234")]
    assert len({base, *others, IdKey(b"l" * 16).make("patient", "A", "12 34")}) == 5
    # Fields are separated: no shifting of text between them.
    assert key.make("patient", "A", "B") != key.make("patient", "", "AB")
    with pytest.raises(RequestError, match="16 or more"):
        IdKey(b"short")


@pytest.mark.parametrize("value", ["", "  ", "0000", "NOID", "dev", "Anonymous", "XXXX", "-", "unknown "])
def test_placeholders__name_nobody(value: str) -> None:
    assert is_placeholder(value)


@pytest.mark.parametrize("value", ["P002", "02", "QMNx85rKkkg", "12345", "DEVON"])
def test_real_ids__are_no_placeholders(value: str) -> None:
    assert not is_placeholder(value) and normalise(f" {value} ") == value
