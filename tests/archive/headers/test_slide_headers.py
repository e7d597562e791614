"""Headers of slides: told by content, text of the file never returned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl.archive.headers.file_headers import HEAD_BYTES
from medssl.archive.headers.slide_headers import companions, mpp_of, slide_header, tiff_slide
from medssl.archive.reasons import FLAGS, PRIVACY_FLAGS
from medssl.errors import ImageError
from tests import synthetic_slides as slides

openslide = pytest.importorskip("openslide", reason="extra wsi")
tifffile = pytest.importorskip("tifffile", reason="extra wsi")


def header(path: Path) -> dict[str, Any]:
    found = slide_header(path, path.read_bytes()[:HEAD_BYTES])
    assert found is not None
    assert json.loads(json.dumps(found)) == found
    assert set(found["flags"]) <= set(FLAGS) and set(found["privacy_flags"]) <= set(PRIVACY_FLAGS)
    return found


@pytest.mark.data
def test_cmu_region__as_openslide_and_the_card_say(shared_data: Path) -> None:
    found = header(shared_data / "wsi" / "CMU-1-Small-Region.svs")
    assert (found["shape"], found["mpp"], found["mpp_source"], found["objective"]) == ([2967, 2220], 0.499, "header", 20.0)
    assert (found["format"], found["vendor"], found["lossy"]) == ("aperio", "aperio", True)
    assert found["level_dimensions"] == [[2220, 2967]] and found["level_downsamples"] == [1.0]
    assert found["spacing_mm"] == pytest.approx([0.000499, 0.000499])
    assert found["flags"] == ["single_level"] and found["privacy_flags"] == ["label_image"]
    sizes = {picture["role"]: picture["shape"] for picture in found["associated"]}
    with tifffile.TiffFile(shared_data / "wsi" / "CMU-1-Small-Region.svs") as tif:
        assert sizes == dict(zip(("thumbnail", "label", "overview"), [list(page.shape[:2]) for page in tif.pages[1:]]))


@pytest.mark.parametrize("write", [slides.write_pyramid, slides.write_ome])
def test_pyramids__levels_of_all_containers(tmp_path: Path, write: Any) -> None:
    found = header(write(tmp_path / "slide"))
    assert found["level_dimensions"] == [[2048, 1536], [512, 384], [128, 96]]
    assert found["level_downsamples"] == [1.0, 4.0, 16.0]
    assert found["mpp"] == pytest.approx(0.25)
    assert found["format"] == ("ome-tiff" if write is slides.write_ome else "generic-tiff")
    assert found["flags"] == []


def test_openslide_alone__sees_one_level_of_an_ome_tiff(tmp_path: Path) -> None:
    """Why tifffile comes second: this is the trap that makes thumbnails of OME-TIFF read everything."""
    with openslide.OpenSlide(str(slides.write_ome(tmp_path / "slide.ome.tif"))) as slide:
        assert slide.level_count == 1


def test_dicom_slide(tmp_path: Path) -> None:
    found = header(slides.write_dicom_wsi(tmp_path / "slide.dcm"))
    assert (found["format"], found["shape"], found["mpp"], found["objective"]) == ("dicom", [256, 384], pytest.approx(0.5), 20.0)


def test_text_of_the_file__is_never_returned(tmp_path: Path) -> None:
    for path in (slides.write_svs(tmp_path / "doe_jane.svs"), slides.write_dicom_wsi(tmp_path / "doe_jane.dcm")):
        text = json.dumps(header(path)).lower()
        assert not any(word in text for word in ("doe", "jane", "12/29", "12345", "scanscope"))


def test_aperio_like__associated_images_have_roles(tmp_path: Path) -> None:
    found = header(slides.write_svs(tmp_path / "slide.svs"))
    assert {picture["role"] for picture in found["associated"]} == {"label", "overview", "thumbnail"}
    assert found["privacy_flags"] == ["label_image"]
    assert (found["mpp"], found["level_dimensions"]) == (0.252, [[1024, 768], [512, 384]])


def test_associated_image_with_a_word_of_the_file__is_other(tmp_path: Path) -> None:
    """Descriptions name associated images: whatever word stands there, and it may be a patient's."""
    path = slides.write_svs(tmp_path / "slide.svs")
    path.write_bytes(path.read_bytes().replace(b"\nlabel 50x60", b"\nDoeJn 50x60"))
    with tifffile.TiffFile(path) as tif:
        found = tiff_slide(tif)
    assert found is not None
    assert found.associated == [("thumbnail", (128, 96)), ("other", (50, 60)), ("macro", (90, 40))]
    assert "DoeJn" not in json.dumps(header(path))


def test_missing_mpp__is_none_and_flagged(tmp_path: Path) -> None:
    found = header(slides.write_svs(tmp_path / "tcga.svs", properties=""))
    assert (found["mpp"], found["spacing_mm"], found["mpp_source"], found["objective"]) == (None, None, None, None)
    assert "mpp_missing" in found["flags"]


def test_objective_alone__is_an_estimate_with_a_flag(tmp_path: Path) -> None:
    found = header(slides.write_svs(tmp_path / "slide.svs", properties="|AppMag = 40"))
    assert (found["mpp"], found["mpp_source"]) == (0.25, "objective")
    assert "mpp_estimated" in found["flags"]


@pytest.mark.parametrize(
    ("properties", "value", "source"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26", "aperio.MPP": "0.5"}, 0.255, "header"),
        ({"aperio.MPP": "0.5", "tiff.XResolution": "40000", "tiff.YResolution": "40000"}, 0.5, "vendor"),
        ({"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}, 0.25, "resolution"),
        ({"tiff.XResolution": "50800", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"}, 0.5, "resolution"),
        # 96 dots per inch is a screen; the objective is believed before it.
        (
            {"tiff.XResolution": "96", "tiff.YResolution": "96", "tiff.ResolutionUnit": "inch", "openslide.objective-power": "20"},
            0.5,
            "objective",
        ),
        ({"openslide.mpp-x": "0.05", "openslide.mpp-y": "0.05"}, None, None),
        ({"openslide.mpp-x": "20.1", "openslide.mpp-y": "20.1"}, None, None),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "inf", "aperio.MPP": "-1", "openslide.objective-power": "0"}, None, None),
    ],
)
def test_mpp__order_of_trust(properties: dict[str, str], value: float | None, source: str | None) -> None:
    found = mpp_of(properties)
    assert (None if found is None else found.mean) == (None if value is None else pytest.approx(value))
    assert (None if found is None else found.source) == source


def test_no_slide__is_none(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    for name in ("a.png", "a.jpg", "a.tif"):
        picture.save(tmp_path / name)
    tifffile.imwrite(tmp_path / "tiled.tif", np.zeros((256, 256, 3), np.uint8), tile=(64, 64), photometric="rgb")
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 64, 64), np.uint16))
    tifffile.imwrite(
        tmp_path / "cells.ome.tif", np.zeros((3, 64, 64), np.uint8), metadata={"axes": "CYX"}, photometric="minisblack"
    )
    (tmp_path / "broken.svs").write_bytes(b"II*\0" + bytes(997))
    (tmp_path / "text.svs").write_bytes(b"hello")
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 8
    assert [path.name for path in paths if slide_header(path, path.read_bytes()[:HEAD_BYTES]) is not None] == []


def test_cut_slide__is_truncated(tmp_path: Path) -> None:
    """The directories of this file come first, so that OpenSlide opens it although half of its tiles are gone."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, slides.whole(slides.texture, (2048, 1536)), tile=(256, 256), photometric="rgb", metadata=None)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with tifffile.TiffWriter(tmp_path / "half.tif") as tif:
        for size in ((1024, 768), (512, 384)):
            tif.write(
                slides.whole(slides.texture, size),
                tile=(256, 256),
                photometric="rgb",
                metadata=None,
                subfiletype=int(size[0] == 512),
            )
    whole = (tmp_path / "half.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "half.tif") as tif:
        last = max(page.offset for page in tif.pages)
        first_level = tif.pages[0].dataoffsets
    assert header(tmp_path / "half.tif")["level_dimensions"] == [[1024, 768], [512, 384]]
    # Point one tile of the finest level beyond the end.
    offset = whole.find(np.array(first_level, dtype="<u4").tobytes())
    assert offset > 0 and last < len(whole)
    (tmp_path / "half.tif").write_bytes(whole[:offset] + np.uint32(len(whole) + 1).tobytes() + whole[offset + 4 :])
    with pytest.raises(ImageError, match="ends before its last tile") as caught:
        header(tmp_path / "half.tif")
    assert caught.value.reason == "truncated"


def test_mirax__its_folder_belongs_to_it(tmp_path: Path) -> None:
    (tmp_path / "slide.mrxs").write_bytes(b"\xff\xd8\xff")
    assert companions(tmp_path / "slide.mrxs") == []
    (tmp_path / "slide").mkdir()
    for name in ("Slidedat.ini", "Data0000.dat"):
        (tmp_path / "slide" / name).write_bytes(b"")
    assert [path.name for path in companions(tmp_path / "slide.mrxs")] == ["Data0000.dat", "Slidedat.ini"]
    shutil.copy(tmp_path / "slide.mrxs", tmp_path / "slide.jpg")
    assert companions(tmp_path / "slide.jpg") == []
