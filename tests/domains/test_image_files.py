"""PNG, JPEG, TIFF, BMP: values and dtypes against Pillow, imagecodecs and tifffile."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.domains.image_files import ome_channels, ome_spacing, read_image_file
from medssl.domains.planar import narrow
from medssl.errors import ImageError

RNG = np.random.default_rng(0)


def deep(*shape: int) -> np.ndarray:
    return RNG.integers(0, 65536, shape).astype(np.uint16)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3), (20, 30, 4), (20, 30, 2)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png__all_bits_and_alpha_as_valid(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    array = deep(*shape).astype(dtype)
    if array.dtype == np.uint16 and shape[2:] == (2,):
        (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(array))
        with pytest.raises(ImageError, match="export it without alpha"):
            read_image_file(tmp_path / "x.png")
        return
    alpha = len(shape) == 3 and shape[2] in (2, 4)
    if alpha:
        array[:5, :, -1] = 0
        array[5:, :, -1] |= 1
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(array))
    raw = read_image_file(tmp_path / "x.png")
    colours = array[..., :-1] if alpha else array
    expected = colours[None] if colours.ndim == 2 else np.moveaxis(colours, -1, 0)
    np.testing.assert_array_equal(raw.array, expected)
    assert raw.array.dtype == dtype and raw.spacing_mm is None
    assert (raw.valid is not None) == alpha
    if raw.valid is not None:
        assert not raw.valid[:5].any() and raw.valid[5:].all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_png_and_bmp__equal_pillow(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    picture = Image.fromarray(deep(20, 30, 3).astype(np.uint8)).convert(mode)
    for suffix in ("png", "bmp"):
        picture.save(tmp_path / f"x.{suffix}", dpi=(72, 72))
        expected = np.asarray(picture.convert("L" if mode in ("1", "L") else "RGB"))
        raw = read_image_file(tmp_path / f"x.{suffix}")
        np.testing.assert_array_equal(raw.array, expected[None] if expected.ndim == 2 else np.moveaxis(expected, -1, 0))
        assert raw.spacing_mm is None  # dots per inch are no spacing


PILLOW_MODES = ("uint8", "uint16", "int16", "float32")


@pytest.mark.parametrize(
    ("dtype", "with_tifffile"),
    [(dtype, True) for dtype in (*PILLOW_MODES, "float64", "uint32", "int8")] + [(dtype, False) for dtype in PILLOW_MODES],
)
def test_tiff__values_and_narrowest_dtype(tmp_path: Path, dtype: str, with_tifffile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = (deep(20, 30) // 2).astype(dtype)
    if array.dtype.kind != "u":
        array[:9] = -array[:9]
    tifffile.imwrite(tmp_path / "x.tif", array)
    if not with_tifffile:
        monkeypatch.setitem(sys.modules, "tifffile", None)
    raw = read_image_file(tmp_path / "x.tif")
    np.testing.assert_array_equal(raw.array[0], array)
    narrowest = {"float64": "float32", "uint32": "uint16", "int8": "int16"}
    assert raw.array.dtype == narrowest.get(dtype, dtype)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "jpeg"])
def test_tiff__compressed(tmp_path: Path, compression: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    array = np.repeat(np.arange(64, dtype=np.uint8)[:, None], 64, axis=1)
    tifffile.imwrite(tmp_path / "x.tif", array, compression=compression)
    raw = read_image_file(tmp_path / "x.tif")
    np.testing.assert_array_equal(raw.array[0], tifffile.imread(tmp_path / "x.tif"))
    assert ("lossy" in raw.flags) == (compression == "jpeg")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_tiff__white_is_zero_is_turned_round(tmp_path: Path, dtype: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = deep(20, 30).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="miniswhite")
    np.testing.assert_array_equal(read_image_file(tmp_path / "x.tif").array[0], np.iinfo(dtype).max - array)


def test_tiff__palette_equals_pillow(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(deep(20, 30, 3).astype(np.uint8)).convert("P")
    picture.save(tmp_path / "x.tif")
    np.testing.assert_array_equal(np.moveaxis(read_image_file(tmp_path / "x.tif").array, 0, -1), np.asarray(picture.convert("RGB")))


def test_tiff__colour_alpha_and_planes(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    colours = deep(20, 30, 4).astype(np.uint8)
    colours[:4, :, 3], colours[4:, :, 3] = 0, 255
    tifffile.imwrite(tmp_path / "x.tif", colours, photometric="rgb", extrasamples=["unassalpha"])
    raw = read_image_file(tmp_path / "x.tif")
    np.testing.assert_array_equal(raw.array, np.moveaxis(colours[..., :3], -1, 0))
    assert raw.valid is not None and not raw.valid[:4].any() and raw.valid[4:].all()
    tifffile.imwrite(tmp_path / "p.tif", np.moveaxis(colours[..., :3], -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image_file(tmp_path / "p.tif").array, raw.array)


def test_ome__channels_and_physical_size(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = deep(3, 20, 30)
    meta = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 400, "PhysicalSizeYUnit": "nm"}
    tifffile.imwrite(tmp_path / "x.ome.tif", array, metadata={**meta, "Channel": {"Name": ["DAPI", "GFP", "x"]}})
    raw = read_image_file(tmp_path / "x.ome.tif")
    np.testing.assert_array_equal(raw.array, array)
    assert raw.channels == ("DAPI", "GFP", "x") and raw.spacing_mm == pytest.approx((4e-4, 5e-4))
    assert ome_spacing("<OME><Pixels PhysicalSizeX='1' PhysicalSizeY='2'/></OME>") == pytest.approx((2e-3, 1e-3))
    for text in (
        None,
        "",
        "<OME",
        "<OME/>",
        "<OME><Pixels PhysicalSizeX='0' PhysicalSizeY='2'/></OME>",
        "<OME><Pixels PhysicalSizeX='1'/></OME>",
    ):
        assert ome_spacing(text) is None and ome_channels(text, 1) == ()
    entities = "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><OME><Pixels PhysicalSizeX='1' PhysicalSizeY='2'/></OME>"
    assert ome_spacing(entities) is None


def test_imagej__unit_gives_spacing(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = deep(2, 20, 30)
    tifffile.imwrite(tmp_path / "x.tif", array, imagej=True, resolution=(2.0, 4.0), metadata={"unit": "um", "axes": "CYX"})
    raw = read_image_file(tmp_path / "x.tif")
    np.testing.assert_array_equal(raw.array, array)
    assert raw.spacing_mm == pytest.approx((1 / 4 * 1e-3, 1 / 2 * 1e-3))


def test_stacks__refused_and_unnamed_pages_flagged(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "z.tif", deep(5, 20, 30), metadata={"axes": "ZYX"}, ome=True)
    with pytest.raises(ImageError, match="5 along Z") as caught:
        read_image_file(tmp_path / "z.tif")
    assert caught.value.reason == "unsupported_pixels"
    pages = deep(2, 20, 30)
    tifffile.imwrite(tmp_path / "i.tif", pages, metadata=None)
    raw = read_image_file(tmp_path / "i.tif")
    np.testing.assert_array_equal(raw.array, pages)
    assert "channels_assumed" in raw.flags


def test_nan__not_valid(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = deep(20, 30).astype(np.float32)
    array[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "x.tif", array)
    raw = read_image_file(tmp_path / "x.tif")
    assert raw.valid is not None and not raw.valid[3, 4] and raw.valid.sum() == 599 and raw.array[0, 3, 4] == 0
    assert raw.flags == ["nan_voxels"]


@pytest.mark.parametrize(
    ("values", "dtype", "flags"),
    [
        (np.array([-5, 40000]), "float32", ()),
        (np.array([-5, 300]), "int16", ()),
        (np.array([0, 300]), "uint16", ()),
        (np.array([2**24 + 1]), "float32", ("float32_rounded",)),
        (np.array([0.1]), "float32", ("float32_rounded",)),
        (np.array([0.5]), "float32", ()),
        (np.array([1.5], dtype=np.float16), "float32", ()),
        (np.array([True]), "uint8", ()),
    ],
)
def test_narrow__lossless_or_flagged(values: np.ndarray, dtype: str, flags: tuple[str, ...]) -> None:
    array, flagged = narrow(values)
    assert array.dtype == dtype and flagged == flags
    if not flags:
        np.testing.assert_array_equal(array, values)


def fault_of(path: Path, data: bytes) -> ImageError | None:
    path.write_bytes(data)
    try:
        read_image_file(path)
    except ImageError as err:
        return err
    return None


def test_damage__one_reason_without_the_files_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image

    picture = Image.fromarray(deep(64, 64, 3).astype(np.uint8))
    cases: list[tuple[str, bytes]] = []
    for suffix in ("png", "jpg", "tif", "bmp"):
        picture.save(tmp_path / f"x.{suffix}")
        whole = (tmp_path / f"x.{suffix}").read_bytes()
        cases += [(suffix, whole[: len(whole) // 2]), (suffix, whole[:30]), (suffix, whole[:20] + b"\xff" * 40 + whole[60:])]
    errors = [fault_of(tmp_path / f"secret{k}.{suffix}", data) for k, (suffix, data) in enumerate(cases)]
    found = [error for error in errors if error is not None]
    assert len(found) > 8
    assert {error.reason for error in found} <= {"unreadable", "truncated", "unsupported_pixels"}
    assert not any("secret" in str(error) for error in found)
    assert capfd.readouterr() == ("", "") and caplog.text == ""


def test_huge_header__refused_before_memory_is_taken(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(deep(8, 8).astype(np.uint8)).save(tmp_path / "x.png")
    huge = bytearray((tmp_path / "x.png").read_bytes())
    huge[16:24] = b"\0\x10\0\0\0\x10\0\0"
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(huge)
    with pytest.raises(ImageError, match="100 megapixels"):
        read_image_file(tmp_path / "x.png")


def test_real_jpeg_and_tiff__equal_pillow(shared_data: Path) -> None:
    from PIL import Image

    paths: list[Any] = sorted((shared_data / "bccd" / "JPEGImages").glob("*.jpg"))[:3]
    paths += sorted((shared_data / "fluorescence_ht29").glob("*.tif"))
    assert len(paths) == 6
    for path in paths:
        expected = np.asarray(Image.open(path))
        raw = read_image_file(path)
        np.testing.assert_array_equal(raw.array, expected[None] if expected.ndim == 2 else np.moveaxis(expected, -1, 0))
