"""The walk over raw elements, against pydicom."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive.headers import dicom_raw
from medssl.archive.headers.dicom_header import parse_header, read_header
from medssl.archive.headers.dicom_raw import BoundedFile, parse_raw, parse_stream, read_raw
from medssl.archive.headers.file_headers import HEAD_BYTES, sniff
from medssl.archive.scanning.scan import scan_file
from medssl.errors import ImageError
from tests.synthetic import SYNTAXES, oblique_affine, oblique_volume, write_dicom_series
from tests.synthetic_multiframe import Writer, meta_group, write_enhanced

ROWS, MODALITY, POSITION, PLANE = 0x00280010, 0x00080060, 0x00200032, 0x00209113
PER_FRAME = 0x52009230
EXPLICIT, IMPLICIT = SYNTAXES["explicit"], SYNTAXES["implicit"]
NUMBERS = {"rows": "Rows", "columns": "Columns", "bits_allocated": "BitsAllocated", "samples_per_pixel": "SamplesPerPixel"}
TEXTS = {"modality": "Modality", "sop_instance_uid": "SOPInstanceUID", "photometric": "PhotometricInterpretation"}


def real_dicom(folder: Path) -> list[Path]:
    """Every DICOM file of the real data, one per folder of those with many."""
    paths = sorted((folder / "dicom_odd").rglob("*.dcm")) + sorted((folder / "dicom_multiframe").glob("*.dcm"))
    for series in ("mr_dicom_nih", "ct_covid_ct_md", "ct_ge_gantry_tilt", "cine_mr_sunnybrook"):
        paths += sorted(path for path in (folder / series).rglob("*") if path.is_file())[::15]
    return [path for path in paths if sniff(path.read_bytes()[:HEAD_BYTES]) == "dicom"]


@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_real_headers__as_pydicom_reads_them(shared_data: Path) -> None:
    import pydicom

    compared = placed = 0
    for path in real_dicom(shared_data):
        ds = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        ours = read_header(path)
        for name, keyword in NUMBERS.items():
            assert ours.get(name) == ds.get(keyword), (path.name, name)
        for name, keyword in TEXTS.items():
            assert ours.get(name) == (str(ds.get(keyword) or "") or None), (path.name, name)
        for name, keyword in (("position", "ImagePositionPatient"), ("pixel_spacing", "PixelSpacing")):
            theirs = ds.get(keyword)
            assert ours.get(name) == (None if not theirs else [float(value) for value in theirs]), (path.name, name)
        compared += 1
        if ours["pixel_length"] is not None and path.stat().st_size >= ours["pixel_offset"] + ours["pixel_length"]:
            pixels = pydicom.dcmread(path, force=True).PixelData
            data = path.read_bytes()[ours["pixel_offset"] :][: ours["pixel_length"]]
            assert data == pixels, path.name
            placed += 1
    assert compared > 130 and placed > 50


@pytest.mark.parametrize("syntax", sorted(SYNTAXES))
def test_beginning_of_a_file__the_same_header_or_none(tmp_path: Path, syntax: str) -> None:
    array, affine = oblique_volume((40, 30, 2))
    path = write_dicom_series(tmp_path, array, affine, syntax=syntax)[0]
    data = path.read_bytes()
    whole = read_header(path)
    assert parse_header(io.BytesIO(data[:HEAD_BYTES]), len(data), partial=True) == whole
    end = whole["pixel_offset"] or 400
    for cut in (140, 300, end - 9):
        assert parse_header(io.BytesIO(data[:cut]), len(data), partial=True) is None
        assert parse_raw(data[:cut], (ROWS,)) is None


def test_unknown_sequences__are_implicit_inside(tmp_path: Path) -> None:
    """CP-246: the items of an element UN of undefined length are implicit, whatever the file is."""
    w, plain = Writer(), Writer(implicit=True)
    item = plain.element(0x00091001, "LO", "inside") + plain.element(ROWS, "US", 7)
    mark = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + item + struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    unknown = w.head(0x00091010, "UN", 0xFFFFFFFF) + mark
    nested = w.sequence(PLANE, [unknown + w.element(POSITION, "DS", "1\\2\\3")])
    explicit_inside = Writer(undefined=True).sequence(0x00091020, [w.element(ROWS, "US", 9)]).replace(b"SQ", b"UN", 1)
    body = w.element(MODALITY, "CS", "MR") + unknown + explicit_inside + nested + w.element(ROWS, "US", 5)
    path = tmp_path / "un.dcm"
    path.write_bytes(meta_group(EXPLICIT, "1.2.3") + body)
    raw = read_raw(path, (ROWS, MODALITY, POSITION), inside=(PLANE,))
    assert (raw.get(ROWS, "US"), raw.get(MODALITY, "CS"), raw.get(POSITION, "DS*")) == (5, "MR", [1.0, 2.0, 3.0])


def test_last_of_two_elements__counts_as_in_pydicom(tmp_path: Path) -> None:
    import pydicom

    w = Writer()
    path = tmp_path / "twice.dcm"
    path.write_bytes(meta_group(EXPLICIT, "1.2.3") + w.element(ROWS, "US", 5) + w.element(ROWS, "US", 6))
    assert read_header(path)["rows"] == pydicom.dcmread(path).Rows == 6


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_many_items__of_several_forms_as_one_by_one(tmp_path: Path, syntax: str, undefined: bool) -> None:
    """Items are compared with forms of earlier ones; values must be those of their own item."""
    n = 700

    def extra(w: Writer, k: int) -> bytes:
        private = w.element(0x00091010, "LO", "x" * (k % 40)) if k % 3 else b""
        return private + w.sequence(0x00189114, [w.element(0x00189082, "FD", [0.5 * k])] if k % 5 else [])

    path = write_enhanced(
        tmp_path / "e.dcm",
        np.zeros((n, 1, 1), np.uint16),
        oblique_affine(),
        [k * k % 977 for k in range(n)],
        syntax=syntax,
        undefined=undefined,
        extra=extra,
    )
    import pydicom

    wanted: dict[str, Any] = {"leaves": {POSITION, 0x00189082}, "inside": {PLANE, 0x00189114}, "each": {PER_FRAME: dict}}
    items = read_raw(path, **wanted).items[PER_FRAME]
    for k, group in enumerate(pydicom.dcmread(path).PerFrameFunctionalGroupsSequence):
        position = [float(text) for text in items[k][POSITION][1].decode().split("\\")]
        assert position == [float(value) for value in group.PlanePositionSequence[0].ImagePositionPatient]
        echo = items[k].get(0x00189082)
        assert (echo is None) == (k % 5 == 0) and (echo is None or struct.unpack("<d", echo[1]) == (0.5 * k,))


def test_nesting__may_be_as_deep_as_it_likes(tmp_path: Path) -> None:
    w = Writer()
    for vr in (b"SQ\0\0", b"UN\0\0"):
        depth = 50_000
        opened = struct.pack("<HH", 0x0008, 0x1140) + vr + b"\xff" * 4 + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        closed = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
        path = tmp_path / "deep.dcm"
        path.write_bytes(meta_group(EXPLICIT, "1.2.3") + opened * depth + closed * depth + w.element(ROWS, "US", 5))
        assert read_header(path)["rows"] == 5
        path.write_bytes(meta_group(EXPLICIT, "1.2.3") + opened * depth)
        with pytest.raises(ImageError, match="ends inside an element"):
            read_raw(path, (ROWS,))
        assert scan_file(str(path))[0]["reason"] == "not_image"


def test_lengths_beyond_the_file__nothing_is_allocated(tmp_path: Path) -> None:
    w = Writer()
    path = tmp_path / "long.dcm"
    data = meta_group(EXPLICIT, "1.2.3") + w.element(MODALITY, "CS", "MR") + w.head(0x00091010, "OB", 0xFFFFFFF0) + b"abc"
    path.write_bytes(data)
    assert read_header(path)["modality"] == "MR" and read_header(path)["pixel_offset"] is None
    with pytest.raises(ImageError, match="ends inside an element"):
        read_raw(path, (MODALITY,))
    asked: list[int] = []

    class Handle(io.BytesIO):
        def read(self, n: int | None = -1, /) -> bytes:
            asked.append(-1 if n is None else n)
            return super().read(n)

    assert parse_stream(Handle(data), len(data), (MODALITY,)).cut
    assert 0 < max(asked) <= dicom_raw.FIRST_BYTES and min(asked) > 0
    with BoundedFile(path) as handle:
        assert handle.read(1 << 62) == data and handle.read(1 << 62) == b""


def test_large_elements_of_no_interest__are_not_read(tmp_path: Path) -> None:
    w = Writer()
    path = tmp_path / "gap.dcm"
    head = meta_group(EXPLICIT, "1.2.3") + w.element(MODALITY, "CS", "MR") + w.head(0x00091010, "OB", 3 << 30)
    tail = w.element(ROWS, "US", 5) + w.element(0x7FE00010, "OW", b"\1\2")
    with open(path, "wb") as handle:  # a sparse file
        handle.write(head)
        handle.seek(3 << 30, 1)
        handle.write(tail)
    start = time.process_time()
    header = read_header(path)
    assert time.process_time() - start < 0.5
    assert (header["rows"], header["pixel_length"]) == (5, 2)
    assert header["pixel_offset"] == len(head) + (3 << 30) + len(tail) - 2


def test_deflated_bomb__ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = Writer()
    meta = meta_group(SYNTAXES["deflated"], "1.2.3")
    body = w.element(MODALITY, "CS", "MR") + w.head(0x00091010, "OB", 20 << 20) + bytes(20 << 20) + w.element(ROWS, "US", 5)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    path = tmp_path / "bomb.dcm"
    path.write_bytes(meta + packer.compress(body) + packer.flush())
    assert read_header(path)["rows"] == 5
    monkeypatch.setattr(dicom_raw, "MAX_INFLATED_BYTES", 10 << 20)
    header = read_header(path)
    assert header["modality"] == "MR" and "rows" not in header
    path.write_bytes(meta + b"no deflate stream at all")
    with pytest.raises(ImageError, match="cannot be parsed"):
        read_header(path)


def test_float_pixels__are_no_pixel_data(tmp_path: Path) -> None:
    w = Writer()
    path = tmp_path / "float.dcm"
    path.write_bytes(meta_group(EXPLICIT, "1.2.3") + w.element(ROWS, "US", 5) + w.element(0x7FE00008, "OF", bytes(8)))
    assert read_header(path)["pixel_offset"] is None and read_raw(path, ()).pixel_offset is None
