"""Radiographs: bright means dense, all bits kept, borders marked; against pydicom and Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.domains.dicom_planar import voi_window
from medssl.domains.xray import XRay, exposed_box
from medssl.errors import ImageError
from medssl.types import Sample
from tests.synthetic_planar import radiograph, write_planar_dicom

SERIES = "ab" * 16


def read(path: Path, **args: Any) -> Sample:
    return XRay(**args).read([path], series_id=SERIES)


@pytest.mark.parametrize(("dtype", "bits", "offset"), [("uint16", 12, 0), ("uint16", 16, 0), ("uint8", 8, 0), ("int16", 12, -2048)])
@pytest.mark.parametrize("rescale", [(1, 0), (2, -100), (0.5, 3)])
def test_monochrome1__equals_its_monochrome2_twin(
    tmp_path: Path, dtype: str, bits: int, offset: int, rescale: tuple[float, float]
) -> None:
    words = (radiograph(bits=bits).astype(np.int32) + offset).astype(dtype)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype == "int16" else (0, (1 << bits) - 1)
    twin = (high + low - words.astype(np.int32)).astype(dtype)
    extra = {"RescaleSlope": rescale[0], "RescaleIntercept": rescale[1], "WindowCenter": 900, "WindowWidth": 700}
    two = read(write_planar_dicom(tmp_path / "2.dcm", words, bits_stored=bits, **extra))
    turned = {**extra, "WindowCenter": rescale[0] * (high + low) + 2 * rescale[1] - 900 + 1}
    one = read(write_planar_dicom(tmp_path / "1.dcm", twin, bits_stored=bits, photometric="MONOCHROME1", **turned))
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_allclose(two.image[0], words.astype(np.float64) * rescale[0] + rescale[1], rtol=1e-6)
    assert (two.meta.facts["inverted"], one.meta.facts["inverted"]) == (False, True)
    assert one.meta.stats == two.meta.stats
    for side in ("window_low", "window_high"):
        assert one.meta.facts[side] == pytest.approx(two.meta.facts[side])


@pytest.mark.parametrize(("sign", "inverted"), [(1, True), (-1, False)])
def test_raw_detector_image__runs_as_its_intensity_sign_says(tmp_path: Path, sign: int, inverted: bool) -> None:
    words = radiograph()
    extra = {"PresentationIntentType": "FOR PROCESSING", "PixelIntensityRelationshipSign": sign}
    sample = read(write_planar_dicom(tmp_path / "x.dcm", words, bits_stored=12, **extra))
    np.testing.assert_array_equal(sample.image[0], 4095 - words if inverted else words)


@pytest.mark.parametrize("bits", [10, 12])
def test_unused_bits_and_overlays__are_not_pixels(tmp_path: Path, bits: int) -> None:
    words = radiograph(bits=bits)
    overlay = np.zeros_like(words)
    overlay[5:20, 5:20] = 1 << 15
    extra = {"OverlayRows": 60, "OverlayColumns": 48, "OverlayBitPosition": 15, "OverlayType": "G"}
    path = write_planar_dicom(tmp_path / "x.dcm", words | overlay, bits_stored=bits)
    import pydicom

    ds = pydicom.dcmread(path)
    for k, value in enumerate(extra.values()):
        tag = (0x6000, (0x0010, 0x0011, 0x0102, 0x0040)[k])
        ds.add_new(tag, "CS" if isinstance(value, str) else "US", value)
    ds.save_as(path)
    np.testing.assert_array_equal(read(path).image[0], words)


def test_high_bit__elsewhere_is_honoured(tmp_path: Path) -> None:
    words = radiograph(bits=10)
    path = write_planar_dicom(tmp_path / "x.dcm", words << 6, bits_stored=10, HighBit=15)
    np.testing.assert_array_equal(read(path, crop=False).image[0], words)


@pytest.mark.parametrize("syntax", ["explicit", "big", "rle"])
def test_transfer_syntax__same_pixels(tmp_path: Path, syntax: str) -> None:
    words = radiograph(bits=16)
    sample = read(write_planar_dicom(tmp_path / "x.dcm", words, syntax=syntax))
    np.testing.assert_array_equal(sample.image[0], words)
    assert sample.image.dtype == np.uint16


def test_padding__not_valid_and_out_of_the_statistics(tmp_path: Path) -> None:
    words = radiograph() | 1
    words[:, :9] = 4000
    path = write_planar_dicom(tmp_path / "x.dcm", words, bits_stored=12, PixelPaddingValue=3990, PixelPaddingRangeLimit=4010)
    sample = read(path, crop=False)
    assert sample.valid is not None and "padding" in sample.meta.flags
    outside = (words >= 3990) & (words <= 4010)
    np.testing.assert_array_equal(sample.valid, ~outside)
    assert sample.meta.stats["max"] == words[~outside].max()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("slope", [1, 2])
def test_voi__equals_pydicom(tmp_path: Path, function: str, slope: int) -> None:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    extra = {"WindowCenter": [1000, 5], "WindowWidth": [900, 6], "VOILUTFunction": function, "RescaleSlope": slope}
    path = write_planar_dicom(tmp_path / "x.dcm", radiograph(), bits_stored=12, RescaleIntercept=-7, **extra)
    ds = pydicom.dcmread(path)
    expected = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    sample = read(path, voi=True)
    assert sample.image.dtype == np.float32
    np.testing.assert_allclose(sample.image[0], expected, rtol=1e-6)
    plain = read(path)
    np.testing.assert_array_equal(plain.image[0], radiograph().astype(int) * slope - 7)
    if function == "LINEAR":  # the reported window: where pydicom's ramp reaches both ends
        low, high = plain.meta.facts["window_low"], plain.meta.facts["window_high"]
        ramp = (expected > expected.min()) & (expected < expected.max())
        inside = (plain.image[0] > low) & (plain.image[0] < high)
        np.testing.assert_array_equal(ramp, inside)


def test_voi_lut_sequence__equals_pydicom_and_is_turned_for_monochrome1(tmp_path: Path) -> None:
    import pydicom
    from pydicom.pixels import apply_voi_lut

    table = pydicom.Dataset()
    table.LUTDescriptor = [3000, 500, 14]
    table.add_new(0x00283006, "OW", (np.linspace(0, 1, 3000) ** 2 * 16383).astype("<u2").tobytes())
    path = write_planar_dicom(tmp_path / "x.dcm", radiograph(), bits_stored=12, VOILUTSequence=[table])
    ds = pydicom.dcmread(path)
    expected = apply_voi_lut(ds.pixel_array, ds)
    np.testing.assert_array_equal(read(path, voi=True).image[0], expected)
    assert voi_window(ds) == (500, 3499)
    ds.PhotometricInterpretation = "MONOCHROME1"
    ds.save_as(path)
    np.testing.assert_array_equal(read(path, voi=True).image[0], 16383 - expected.astype(int))


def test_modality_lut__equals_pydicom(tmp_path: Path) -> None:
    import pydicom
    from pydicom.pixels import apply_modality_lut

    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
    table.add_new(0x00283006, "OW", np.linspace(65535, 100, 4096).astype("<u2").tobytes())
    path = write_planar_dicom(tmp_path / "x.dcm", radiograph(), bits_stored=12, ModalityLUTSequence=[table])
    ds = pydicom.dcmread(path)
    np.testing.assert_array_equal(read(path).image[0], apply_modality_lut(ds.pixel_array, ds))


@pytest.mark.parametrize(
    ("extra", "spacing", "source"),
    [
        ({}, None, "unknown"),
        ({"PixelSpacing": [0.2, 0.3], "ImagerPixelSpacing": [0.1, 0.1]}, (0.2, 0.3), "calibration"),
        ({"PixelSpacing": [0.2, 0.3]}, (0.2, 0.3), "header"),
        ({"PixelSpacing": [0.1, 0.1], "ImagerPixelSpacing": [0.1, 0.1]}, (0.1, 0.1), "detector"),
        ({"PixelSpacing": [0.2, 0.3], "PixelSpacingCalibrationType": "FIDUCIAL"}, (0.2, 0.3), "calibration"),
        ({"ImagerPixelSpacing": [0.15, 0.15]}, (0.15, 0.15), "detector"),
        ({"ImagerPixelSpacing": [0.15, 0.3], "EstimatedRadiographicMagnificationFactor": 1.5}, (0.1, 0.2), "magnification"),
        ({"PixelSpacing": [0, 0]}, None, "unknown"),
    ],
)
def test_spacing__from_the_header_or_none(tmp_path: Path, extra: dict[str, Any], spacing: Any, source: str) -> None:
    sample = read(write_planar_dicom(tmp_path / "x.dcm", radiograph(), bits_stored=12, **extra))
    assert sample.spacing_mm == (None if spacing is None else pytest.approx(spacing))
    assert sample.meta.facts["spacing_source"] == source


@pytest.mark.parametrize(
    ("position", "view"),
    [("AP", "ap"), ("LL", "lateral"), ("LLD", "other"), ("RAO", "oblique"), ("SMITH", "other"), ("", "unknown")],
)
def test_view_and_laterality__closed_vocabulary(tmp_path: Path, position: str, view: str) -> None:
    path = write_planar_dicom(tmp_path / "x.dcm", radiograph(), bits_stored=12, ViewPosition=position, ImageLaterality="L")
    facts = read(path).meta.facts
    assert (facts["view"], facts["laterality"]) == (view, "left")


@pytest.mark.parametrize("outside", [0, 1500, 4095])
@pytest.mark.parametrize("box", [(30, 250, 20, 180), (0, 300, 45, 200), (11, 289, 0, 170)])
def test_exposed_box__found_within_two_pixels(outside: int, box: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    image = radiograph((300, 200)).astype(np.float64) * 0.7 + 600
    collimated = outside + rng.normal(0, 15, image.shape)
    top, bottom, left, right = box
    collimated[top:bottom, left:right] = image[top:bottom, left:right]
    collimated[4:9, 2:6] = 2500  # a speck of a marker in the shade
    found = exposed_box(np.clip(collimated, 0, 4095).astype(np.uint16))
    assert np.abs(np.subtract(found, box)).max() <= 2


def test_exposed_box__whole_image_without_a_border_or_when_implausible() -> None:
    image = radiograph((300, 200))
    assert exposed_box(image) == (0, 300, 0, 200)
    nearly_flat = np.zeros((300, 200), np.uint16)
    nearly_flat[100:140, 100:140] = image[100:140, 100:140]
    assert exposed_box(nearly_flat) == (0, 300, 0, 200)


def test_crop__marks_and_removes_nothing(tmp_path: Path) -> None:
    words = radiograph((120, 100))
    words[:20] = 0
    path = write_planar_dicom(tmp_path / "x.dcm", words, bits_stored=12)
    sample = read(path)
    np.testing.assert_array_equal(sample.image[0], words)
    assert sample.valid is not None and not sample.valid[:20].any() and sample.valid[22:].all()
    assert read(path, crop=False).valid is None


def test_faults__named_with_their_reason(tmp_path: Path) -> None:
    words = radiograph()
    cases: list[tuple[str, Path]] = [
        ("no_domain", write_planar_dicom(tmp_path / "a", words, Modality="MG")),
        ("multiframe", write_planar_dicom(tmp_path / "b", np.stack([words, words]))),
        ("not_scalar", write_planar_dicom(tmp_path / "c", np.stack([words, words // 2, words], -1))),
        ("constant", write_planar_dicom(tmp_path / "d", np.full((20, 20), 7, np.uint16))),
        ("photometric", write_planar_dicom(tmp_path / "e", words, PhotometricInterpretation="HSV")),
        ("not_image", write_planar_dicom(tmp_path / "f", words, PixelData=None)),
        ("no_decoder", write_planar_dicom(tmp_path / "g", words)),
        ("truncated", write_planar_dicom(tmp_path / "h", words)),
        ("vanished", tmp_path / "absent"),
    ]
    (tmp_path / "g").write_bytes((tmp_path / "g").read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    (tmp_path / "h").write_bytes((tmp_path / "h").read_bytes()[:-500])
    for reason, path in cases:
        with pytest.raises(ImageError, match=f"^series {SERIES}: ") as caught:
            read(path)
        assert caught.value.reason == reason
        assert not any(word in str(caught.value) for word in ("P0007", "Phantom", str(tmp_path), "MG", "HSV"))


def test_part__one_frame_of_a_multi_frame_file(tmp_path: Path) -> None:
    words = np.stack([radiograph(seed=k) for k in range(3)])
    path = write_planar_dicom(tmp_path / "x.dcm", words, bits_stored=12)
    sample = XRay().read([path], series_id=SERIES, part={"frames": [[1, 2]]})
    np.testing.assert_array_equal(sample.image[0], words[1])
    with pytest.raises(ImageError, match="frames outside the 3 of the file"):
        XRay().read([path], series_id=SERIES, part={"frames": [[2, 4]]})


def test_pictures__grey_kept_colour_refused(tmp_path: Path) -> None:
    from PIL import Image

    grey = (radiograph() // 16).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "g.png")
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(radiograph(bits=16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read(tmp_path / "g.png").image[0], grey)
    np.testing.assert_array_equal(read(tmp_path / "rgb.png").image[0], grey)
    deep = read(tmp_path / "deep.png")
    assert deep.image.dtype == np.uint16 and deep.spacing_mm is None
    np.testing.assert_array_equal(deep.image[0], radiograph(bits=16))
    Image.fromarray(np.stack([grey, grey // 2, grey], -1)).save(tmp_path / "colour.png")
    with pytest.raises(ImageError, match="set colour=true") as caught:
        read(tmp_path / "colour.png")
    assert caught.value.reason == "not_scalar"
    expected = np.rint(0.299 * grey + 0.587 * (grey // 2) + 0.114 * grey)
    np.testing.assert_allclose(read(tmp_path / "colour.png", colour=True).image[0], expected, atol=1)


def test_real_radiographs__equal_pillow(shared_data: Path) -> None:
    from PIL import Image

    paths = sorted((shared_data / "cxr_hannover" / "images").glob("*.png"))
    assert len(paths) == 34
    for path in paths[::4]:
        sample = read(path)
        np.testing.assert_array_equal(sample.image[0], np.asarray(Image.open(path)))
        assert sample.spacing_mm is None and sample.meta.kind == "image"


def test_real_cr__equals_pydicom_turned_round(shared_data: Path) -> None:
    """A 10-bit MONOCHROME1 leg, JPEG 2000: the field between two bright, unexposed margins is found."""
    import pydicom

    path = shared_data / "dicom_odd" / "pydicom-data" / "RG3_J2KI.dcm"
    expected = 1023 - pydicom.dcmread(path).pixel_array.astype(int)
    sample = read(path)
    np.testing.assert_array_equal(sample.image[0], expected)
    assert (sample.image.dtype, sample.spacing_mm, sample.meta.modality) == (np.uint16, None, "CR")
    assert (sample.meta.facts["view"], sample.meta.facts["laterality"]) == ("ap", "right")
    # WindowCenter 550, WindowWidth 1024: PS3.3 C.11.2.1 gives 38 to 1061, turned round -38 to 985.
    assert (sample.meta.facts["window_low"], sample.meta.facts["window_high"]) == (-38, 985)
    assert "lossy" in sample.meta.flags
    assert sample.valid is not None
    outside = ~sample.valid.any(axis=0)
    assert 0.2 < outside.mean() < 0.6
    assert expected.mean(axis=0)[outside].min() > 0.9 * 1023  # unexposed: bright
    exposed = expected.min(axis=0) < 200  # air beside the leg is black
    assert exposed.sum() > 500 and not (exposed & outside).any()
