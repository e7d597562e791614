"""Decoding of every transfer syntax, pixel by pixel against another decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.archive.headers import decoders as decoders_module
from medssl.archive.headers.decoders import decoders, find_decoder
from medssl.archive.headers.dicom_header import Header, read_header
from medssl.domains import dicom_pixels
from medssl.domains.dicom_pixels import frame_spans, load_slice, stored_values
from medssl.domains.volume_files import read_volume
from medssl.errors import ImageError
from tests.synthetic import oblique_volume, reorient
from tests.synthetic_multiframe import write_enhanced

ODD = (
    "pydicom/693_J2KI", "pydicom/J2K_pixelrep_mismatch", "pydicom/JPEG-lossy", "pydicom/JPEG2000", "pydicom/JPEGLSNearLossless_08",
    "pydicom/JPEGLSNearLossless_16", "pydicom/JPGExtended", "pydicom/MR_small_RLE", "pydicom/MR_small_jp2klossless",
    "pydicom/MR_small_jpeg_ls_lossless", "pydicom-data/JPEG-LL", "pydicom-data/bad_sequence",
    "pydicom-data/explicit_VR-UN", "pydicom-data/emri_small_RLE", "pydicom-data/emri_small_jpeg_ls_lossless",
)  # fmt: skip
"""Compressed grey images that SimpleITK's GDCM decodes."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_real_files__as_simpleitk(shared_data: Path, name: str) -> None:
    import SimpleITK as sitk

    path = shared_data / "dicom_odd" / f"{name}.dcm"
    header = read_header(path)
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0]
    for decoder in decoders(header["syntax"]):
        if decoder == "pydicom" and header["syntax"].endswith(".51"):
            continue  # Pillow refuses 12 bits
        ours, _ = load_with(decoder, path, header)
        np.testing.assert_array_equal(ours, theirs, err_msg=decoder)


def test_inverted_grey__all_decoders_agree_and_gdcm_is_kept_out(shared_data: Path) -> None:
    """MONOCHROME1: SimpleITK's GDCM inverts the values, which are wanted as stored."""
    import pydicom

    path = shared_data / "dicom_odd" / "pydicom-data" / "RG3_J2KI.dcm"
    header = read_header(path)
    theirs = pydicom.dcmread(path).pixel_array
    for decoder in decoders(header["syntax"]):
        if decoder == "itk":
            with pytest.raises(ImageError, match="GDCM inverts"):
                load_with(decoder, path, header)
        else:
            np.testing.assert_array_equal(load_with(decoder, path, header)[0], theirs, err_msg=decoder)


def load_with(decoder: str, path: Path, header: Header) -> tuple[np.ndarray, Any]:
    """Decode with one decoder only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom_pixels, "decoders", lambda syntax: (decoder,))
        return load_slice(path, header, (header["rows"], header["columns"]))


@pytest.mark.filterwarnings("ignore")
def test_uncompressed__as_pydicom(shared_data: Path) -> None:
    import pydicom

    names = ("MR_small", "MR_small_bigendian", "MR_small_implicit", "MR_small_expb", "MR_small_padded", "CT_small", "image_dfl")
    names += ("rtdose_1frame", "rtdose_expb_1frame", "ExplVR_BigEndNoMeta")
    for name in names[:-1]:
        path = shared_data / "dicom_odd" / "pydicom" / f"{name}.dcm"
        ours, scaled = stored_values(path, read_header(path))
        assert not scaled
        np.testing.assert_array_equal(ours, pydicom.dcmread(path).pixel_array, err_msg=name)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.203", "1.2.840.10008.1.2.4.90"])
def test_wavelets__every_decoder_gives_back_what_was_encoded(tmp_path: Path, syntax: str) -> None:
    """HTJ2K has no plug-in in pydicom; encoded by imagecodecs (OpenJPH), decoded by what is there."""
    imagecodecs = pytest.importorskip("imagecodecs")
    from pydicom.encaps import encapsulate

    array, affine = reorient(*oblique_volume(), "LPS")
    frames = np.ascontiguousarray(array.transpose(2, 1, 0)).astype(np.uint16)
    if syntax.endswith("90"):
        encoded = [imagecodecs.jpeg2k_encode(frame, codecformat="j2k", reversible=True) for frame in frames]
    else:
        encoded = [imagecodecs.htj2k_encode(frame, reversible=True) for frame in frames]
    path = write_enhanced(
        tmp_path / "ht.dcm",
        frames,
        affine,
        range(len(frames)),
        syntax=syntax,
        pixel_data=encapsulate(encoded) + b"\xfe\xff\xdd\xe0\0\0\0\0",
    )
    names = decoders(syntax)
    assert {"openjpeg", "imagecodecs"} <= set(names)
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dicom_pixels, "decoders", lambda syntax, name=name: (name,))
            np.testing.assert_array_equal(read_volume([path]).array, oblique_volume()[0], err_msg=name)


def test_no_plugin__one_sentence_naming_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders.cache_clear()
    monkeypatch.setattr(decoders_module, "find_spec", lambda name: None)
    monkeypatch.setattr(decoders_module, "_pydicom", lambda syntax: False)
    assert find_decoder("1.2.840.10008.1.2.4.201") == "none"
    assert find_decoder("1.2.840.10008.1.2.4.70") == "itk"
    with pytest.raises(ImageError, match=r'no decoder for htj2k_lossless pixels; .*pip install "medssl\[dicom\]"') as info:
        stored_values(tmp_path / "none.dcm", {"syntax": "1.2.840.10008.1.2.4.201"})
    assert info.value.reason == "no_decoder"
    decoders.cache_clear()


def test_unknown_syntax__no_decoder() -> None:
    assert find_decoder("1.2.3.4") == "none" and find_decoder("1.2.840.10008.1.2.1") == "pydicom"


@pytest.mark.filterwarnings("ignore")
def test_damaged_stream__one_reason(shared_data: Path) -> None:
    for name in ("JPEG2000-embedded-sequence-delimiter", "MR_truncated"):
        path = shared_data / "dicom_odd" / "pydicom" / f"{name}.dcm"
        with pytest.raises(ImageError) as info:
            stored_values(path, read_header(path))
        assert info.value.reason in ("unreadable", "truncated") and name not in str(info.value)


def test_padding__honoured_by_every_decoder(tmp_path: Path, shared_data: Path) -> None:
    """SimpleITK hands out rescaled values: padding must be found among those too."""
    path = sorted((shared_data / "ct_covid_ct_md" / "P002").iterdir())[0]
    header = {**read_header(path), "padding": 0}
    masks = {}
    for decoder in decoders(header["syntax"]):
        values, invalid = load_with(decoder, path, header)
        assert invalid is not None
        masks[decoder] = invalid
        np.testing.assert_array_equal(invalid, values == -1024)
    assert set(masks) >= {"imagecodecs", "itk"} and masks["itk"].any()
    np.testing.assert_array_equal(masks["itk"], masks["imagecodecs"])


@pytest.mark.parametrize("has_bot", [True, False])
def test_frame_spans__as_pydicom_splits_them(tmp_path: Path, has_bot: bool) -> None:
    """Frames of several fragments each, told apart by the offset table or by the JPEG end marks."""
    from pydicom.encaps import encapsulate, generate_frames

    rng = np.random.default_rng(0)
    frames = [bytes(rng.integers(0, 255, int(n)).astype(np.uint8).tobytes()) + b"\xff\xd9" for n in rng.integers(60, 200, 5)]
    data = encapsulate(frames, fragments_per_frame=3, has_bot=has_bot)
    path = tmp_path / "f.bin"
    path.write_bytes(b"head" + data)
    spans = frame_spans(path, {"pixel_offset": 4}, 5)
    whole = path.read_bytes()
    ours = [b"".join(whole[offset : offset + length] for offset, length in span) for span in spans]
    assert all(len(span) == 3 for span in spans)
    assert ours == list(generate_frames(data, number_of_frames=5))
    with pytest.raises(ImageError, match=r"cannot be told apart|misses frames"):
        frame_spans(path, {"pixel_offset": 4}, 4)
    path.write_bytes(whole[:-30])
    with pytest.raises(ImageError, match="end early"):
        frame_spans(path, {"pixel_offset": 4}, 5)
