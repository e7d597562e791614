"""Telling files apart, and headers of damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.archive.dicom_header import read_header
from medssl.archive.file_headers import HEAD_BYTES, read_volume_header, sniff
from medssl.archive.ids import IdKey, is_placeholder, normalise
from medssl.archive.scan import scan_file
from medssl.errors import RequestError
from tests.synthetic import SYNTAXES, oblique_volume, plain_affine, write_dicom_series, write_itk, write_nifti


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
