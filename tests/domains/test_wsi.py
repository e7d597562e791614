"""The domain wsi: regions at an exact scale, against OpenSlide and the drawn truth; scale by the order of trust; refusals."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl.archive.headers.slide_headers import slide_header
from medssl.archive.reasons import FLAGS, IMAGE_REASONS
from medssl.domains.base import Domain
from medssl.domains.slides.handles import HANDLES, Handles
from medssl.domains.slides.slide import Slide, open_slide, read_mpp_table
from medssl.domains.wsi import WSI
from medssl.errors import ImageError, RequestError
from medssl.registry import lookup
from tests import synthetic_slides as slides

openslide = pytest.importorskip("openslide", reason="extra wsi")
tifffile = pytest.importorskip("tifffile", reason="extra wsi")

ID = "ab" * 16
BIG = 19999
SQUARE = (8003.0, 9001.0, 400.0)
"""100 um at 0.25 um/px, at a place that is a multiple of nothing."""


@pytest.fixture(scope="session")
def big_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    left, top, side = SQUARE
    return slides.write_pyramid(
        tmp_path_factory.mktemp("wsi") / "big.tif",
        slides.square(*SQUARE),
        size=(BIG, BIG),
        factors=(1.0, 3.9998, 15.9992),
        tile=512,
        box=(left, top, left + side, top + side),
    )


@pytest.fixture(scope="session")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slides.write_pyramid(tmp_path_factory.mktemp("wsi") / "pyramid.tif")


@pytest.fixture
def cmu(shared_data: Path) -> Path:
    return shared_data / "wsi" / "CMU-1-Small-Region.svs"


# --- info --------------------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_cmu__info_is_the_cards(cmu: Path) -> None:
    info = open_slide(cmu).info
    assert (info.width, info.height, info.level_dimensions) == (2220, 2967, ((2220, 2967),))
    assert (info.mpp_x, info.mpp_y, info.mpp_source, info.objective) == (0.499, 0.499, "header", 20.0)
    assert (info.vendor, info.backend, info.icc) == ("aperio", "openslide", None)
    assert set(info.associated) == {"label", "overview", "thumbnail"}


def test_auto__takes_the_reader_that_sees_the_pyramid(tmp_path: Path, pyramid: Path) -> None:
    assert open_slide(pyramid).info.backend == "openslide"
    ome = open_slide(slides.write_ome(tmp_path / "slide.ome.tif")).info
    assert (ome.backend, len(ome.level_dimensions), ome.mpp) == ("tifffile", 3, pytest.approx(0.25))


def test_dicom_slide__reads_what_was_painted(tmp_path: Path) -> None:
    sample = WSI(mpp=0.5).read([slides.write_dicom_wsi(tmp_path / "slide.dcm")], series_id=ID)
    truth = slides.whole(slides.texture, (384, 256))
    assert np.abs(sample.image.transpose(1, 2, 0).astype(int) - truth).mean() < 1.0  # JPEG


def test_dicom_slide__any_file_opens_all_levels(tmp_path: Path) -> None:
    fine = slides.write_dicom_wsi(tmp_path / "fine.dcm")
    coarse = slides.write_dicom_wsi(tmp_path / "coarse.dcm", size=(96, 64), mpp=2.0, factor=4.0)
    for path in (fine, coarse):
        info = open_slide(path).info
        assert (info.level_dimensions, info.mpp) == (((384, 256), (96, 64)), pytest.approx(0.5))


# --- exact scale -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("backend", ["openslide", "tifffile"])
def test_square__has_its_size_and_place_at_every_scale(big_slide: Path, backend: str, mpp: float) -> None:
    slide = open_slide(big_slide, backend=backend)
    assert slide.info.level_downsamples == pytest.approx((1.0, 3.9998, 15.9992))
    left, top, side = SQUARE
    x, y = 7777, 8888
    n = round(900 * 0.25 / mpp)
    region = slide.read(x, y, (n, n), mpp)
    ink = 1 - region.image[..., 0].astype(np.float64) / 255
    expected = 100.0 / mpp
    row, column = ink[int((top + side / 2 - y) * 0.25 / mpp)], ink[:, int((left + side / 2 - x) * 0.25 / mpp)]
    # The card asks for one pixel; what is left here is rounding of grey levels.
    assert row.sum() == pytest.approx(expected, abs=0.1)
    assert column.sum() == pytest.approx(expected, abs=0.1)
    centre = ((np.arange(n) + 0.5) * row).sum() / row.sum()
    assert centre == pytest.approx((left + side / 2 - x) * 0.25 / mpp, abs=0.1)


@pytest.mark.parametrize(
    ("mpp", "level"), [(0.25, 0), (0.5, 0), (0.97, 0), (0.981, 1), (1.0, 1), (3.9, 1), (3.93, 2), (4.0, 2), (9, 2)]
)
def test_level__is_the_coarsest_within_two_percent(big_slide: Path, mpp: float, level: int) -> None:
    assert open_slide(big_slide).level_for(mpp) == level


@pytest.mark.data
def test_native_region__is_openslides(cmu: Path) -> None:
    ours = open_slide(cmu).read(300, 411, (256, 200), 0.499)
    with openslide.OpenSlide(str(cmu)) as slide:
        theirs = np.asarray(slide.read_region((300, 411), 0, (256, 200)).convert("RGB"))
    assert ours.native and ours.valid is None
    np.testing.assert_array_equal(ours.image, theirs)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_native_level__is_not_resampled(pyramid: Path, level: int) -> None:
    region = open_slide(pyramid).read(16 * 16, 32 * 16, (40, 30), 0.25 * 4**level)
    factor = 4.0**level
    truth = slides.texture((256 / factor + np.arange(41)) * factor, (512 / factor + np.arange(31)) * factor)
    assert region.native
    np.testing.assert_array_equal(region.image, truth)


def test_resampled_region__equals_the_mean_of_its_pixels(pyramid: Path) -> None:
    """Two level-0 pixels per pixel, from level 0: the smooth picture changes by less than a grey level under any sane filter."""
    slide = open_slide(pyramid)
    region = slide.read(101, 203, (120, 90), 0.5)
    fine = slide.read(101, 203, (240, 180), 0.25).image.astype(np.float64)
    blocks = fine.reshape(90, 2, 120, 2, 3).mean(axis=(1, 3))
    assert not region.native
    assert np.abs(region.image - blocks).max() <= 1.0


def test_neighbouring_regions__meet_without_a_seam(pyramid: Path) -> None:
    """A region in one piece and in four, at a scale that fits nothing: equal but for rounding."""
    slide = open_slide(pyramid)
    scale = 0.37 / 0.25
    whole = slide.read(0, 0, (512, 256), 0.37).image.astype(int)
    parts = [[slide.read(x * 256 * scale, y * 128 * scale, (256, 128), 0.37).image for x in range(2)] for y in range(2)]
    assert np.abs(np.block([[[part] for part in row] for row in parts]).reshape(whole.shape) - whole).max() <= 1


def test_large_region__in_blocks_equals_one_read(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(pyramid, backend="tifffile")
    one = slide.read(-50, -50, (700, 500), 0.8)
    monkeypatch.setattr("medssl.domains.slides.slide.BLOCK", 300)
    blocks = slide.read(-50, -50, (700, 500), 0.8)
    assert np.abs(one.image.astype(int) - blocks.image).max() <= 1
    assert one.valid is not None and blocks.valid is not None
    assert (one.valid != blocks.valid).mean() < 0.005


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 0.6])
def test_beyond_the_slide__is_white_and_not_valid(pyramid: Path, mpp: float) -> None:
    s = mpp / 0.25
    region = open_slide(pyramid).read(2048 - 40 * s, 1536 - 30 * s, (100, 90), mpp)
    assert region.valid is not None
    truth = np.zeros((90, 100), dtype=bool)
    truth[:30, :40] = True
    assert (region.valid != truth).sum() <= 70  # half a pixel along two edges
    assert (region.image[35:, 45:] == 255).all()
    outside = open_slide(pyramid).read(-1000, 0, (10, 10), mpp)
    assert outside.valid is not None and not outside.valid.any() and (outside.image == 255).all()


def test_border__is_not_mixed_with_white(pyramid: Path) -> None:
    """A tile that ends exactly at the slide's edge keeps its colours there."""
    region = open_slide(pyramid).read(0, 0, (1024, 768), 0.5)
    fine = slides.whole(slides.texture, (2048, 1536)).astype(np.float64)
    truth = fine.reshape(768, 2, 1024, 2, 3).mean(axis=(1, 3))
    assert region.valid is None
    assert np.abs(region.image - truth).max() <= 2


def test_transparent_pixels__become_white_and_not_valid(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MIRAX pads with transparent black."""
    slide = open_slide(pyramid, backend="openslide")
    handle: Any = HANDLES.get(slide.path, slide.backend)
    read = handle.read

    def holes(*place: int) -> Any:
        pixels, corner = read(*place)
        pixels = pixels.copy()
        pixels[:10] = 0
        return pixels, corner

    monkeypatch.setattr(handle, "read", holes)
    region = slide.read(0, 0, (20, 20), 0.25)
    assert (region.image[:10] == 255).all() and (region.image[10:] < 255).any()
    assert region.valid is not None and not region.valid[:10].any() and region.valid[10:].all()


def gamma_one_profile() -> bytes:
    """The sRGB profile with its three tone curves replaced by straight lines."""
    from PIL import ImageCms

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for k in range(int.from_bytes(data[128:132], "big")):
        entry = 132 + 12 * k
        if data[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            start = int.from_bytes(data[entry + 4 : entry + 8], "big")
            data[start : start + 12] = b"curv" + bytes(8)  # a curve of no points is the identity
            data[entry + 8 : entry + 12] = (12).to_bytes(4, "big")
    return bytes(data)


def test_icc__is_kept_and_converted_to_srgb_on_request(tmp_path: Path) -> None:
    profile = gamma_one_profile()
    image = slides.whole(slides.texture, (64, 48))
    Image.fromarray(image).save(tmp_path / "roi.png", icc_profile=profile)
    plain = open_slide(tmp_path / "roi.png", mpp=0.5)
    assert plain.info.icc == profile
    np.testing.assert_array_equal(plain.read(0, 0, (64, 48), 0.5).image, image)
    converted = open_slide(tmp_path / "roi.png", mpp=0.5, icc=True).read(0, 0, (64, 48), 0.5).image
    # IEC 61966-2-1: linear light to sRGB.
    light = image / 255.0
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(converted - expected).max() <= 2


def test_overview__has_the_size_of_the_slide(pyramid: Path) -> None:
    image = open_slide(pyramid).overview(3.0)
    assert image.shape == (128, 171, 3)  # 1536 / 12, 2048 / 12 rounded up
    truth = slides.whole(slides.texture, (170, 128), 12.0)
    assert np.abs(image[:, :170].astype(int) - truth).mean() < 1.5


# --- two readers -------------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("mpp", [0.499, 1.0])
def test_backends__agree_within_a_grey_level_on_cmu(cmu: Path, mpp: float) -> None:
    one, two = open_slide(cmu, backend="openslide"), open_slide(cmu, backend="tifffile")
    assert one.info.mpp == two.info.mpp
    for x, y in ((0, 0), (500, 700), (1111, 2222), (1900, 2700)):
        a, b = (slide.read(x, y, (256, 256), mpp).image.astype(int) for slide in (one, two))
        assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("mpp", [0.25, 0.4, 1.0, 2.3, 4.0])
def test_backends__agree_within_a_grey_level_on_a_pyramid(pyramid: Path, mpp: float) -> None:
    one, two = open_slide(pyramid, backend="openslide"), open_slide(pyramid, backend="tifffile")
    assert one.info.level_downsamples == two.info.level_downsamples
    for x, y in ((0, 0), (333, 77), (1500, 1003)):
        a, b = (slide.read(x, y, (100, 80), mpp).image.astype(int) for slide in (one, two))
        assert np.abs(a - b).max() <= 1


# --- micrometres per pixel ---------------------------------------------------------------------------------------------------


def test_missing_mpp__names_the_option_and_an_override_runs(tmp_path: Path) -> None:
    """As the TCGA slide of the card: Aperio without MPP and without objective."""
    path = slides.write_svs(tmp_path / "tcga.svs", properties="")
    with pytest.raises(ImageError, match=rf"series {ID}: .*micrometres per pixel.*mpp_csv=FILE") as caught:
        WSI(mpp=0.5).read([path], series_id=ID)
    assert caught.value.reason == "no_spacing"
    assert "tcga.svs" not in str(caught.value)
    table = tmp_path / "mpp.csv"
    table.write_text(f"slide,mpp\n{ID},0.25\n")
    sample = WSI(mpp=0.5, mpp_csv=table).read([path], series_id=ID)
    assert sample.image.shape == (3, 384, 512)
    assert "mpp_user" in sample.meta.flags and sample.meta.facts["mpp_source"] == "user_table"


def test_mpp__table_over_argument_over_file(tmp_path: Path) -> None:
    path = slides.write_svs(tmp_path / "slide.svs")
    table = {ID: 0.3, "slide.svs": 0.4}
    assert open_slide(path).info.mpp == 0.252
    assert open_slide(path, mpp=0.5).info.mpp == 0.5
    assert open_slide(path, mpp=0.5, mpp_table=table, slide_id=ID).info.mpp == 0.3
    assert open_slide(path, mpp=0.5, mpp_table=table).info.mpp == 0.4
    assert open_slide(path, mpp=0.5, mpp_table={"other": 0.4}).info.mpp == 0.5


def test_objective_alone__is_an_estimate_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = slides.write_svs(tmp_path / "slide.svs", properties="|AppMag = 20")
    with caplog.at_level(logging.WARNING):
        sample = WSI(mpp=0.5).read([path], series_id=ID)
    assert "estimated as 10 / objective" in caplog.text and "slide.svs" not in caplog.text
    assert "mpp_estimated" in sample.meta.flags


@pytest.mark.parametrize("value", [0.05, 0.0, -1, 20.5, float("nan")])
def test_mpp__that_no_microscope_has_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(RequestError, match=r"above 0\.05 up to 20"):
        Slide(tmp_path / "any", mpp=value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name,mpp\na,0.5\n", "columns slide and mpp"),
        ("slide,mpp\na,fine\n", "line 2: nan"),
        ("slide,mpp\na,0.5\na,0.25\n", "line 3: a slide has two values"),
    ],
)
def test_mpp_table__says_what_is_wrong(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "mpp.csv").write_text(text)
    with pytest.raises(RequestError, match=match):
        read_mpp_table(tmp_path / "mpp.csv")


@pytest.mark.data
def test_region_of_interest__opens_only_with_an_mpp(shared_data: Path) -> None:
    path = shared_data / "wsi_multistain" / "Izd2-29-041-w35_HE.jpg"
    with pytest.raises(ImageError, match="does not state micrometres per pixel"):
        WSI(mpp=8.0).read([path], series_id=ID)
    sample = WSI(mpp=8.0, slide_mpp=4.0, tissue="none").read([path], series_id=ID)
    with Image.open(path) as picture:
        truth = np.asarray(picture.convert("RGB"))
    assert sample.image.shape == (3, round(truth.shape[0] / 2), round(truth.shape[1] / 2))
    assert sample.meta.facts["backend"] == "pillow"
    full = WSI(mpp=4.0, slide_mpp=4.0).read([path], series_id=ID)
    np.testing.assert_array_equal(full.image.transpose(1, 2, 0), truth)


def test_resolution_of_a_plain_picture__is_not_believed(tmp_path: Path) -> None:
    picture = Image.fromarray(slides.whole(slides.texture, (64, 48)))
    for name in ("roi.png", "roi.tif"):
        picture.save(tmp_path / name, dpi=(50800, 50800))
        with pytest.raises(ImageError, match="does not state"):
            open_slide(tmp_path / name)
        np.testing.assert_array_equal(open_slide(tmp_path / name, mpp=0.5).read(0, 0, (64, 48), 0.5).image, np.asarray(picture))


# --- the domain --------------------------------------------------------------------------------------------------------------


def test_domain__keeps_the_contract(pyramid: Path) -> None:
    domain = lookup("domain", "wsi")(mpp=1.0)
    assert isinstance(domain, Domain)
    sample = domain.read([pyramid], series_id=ID)
    assert sample.image.shape == (3, 384, 512) and sample.image.dtype == np.uint8
    assert sample.spacing_mm == (0.001, 0.001) and sample.affine is None and sample.valid is None
    assert (sample.meta.kind, sample.meta.modality, sample.meta.domain) == ("image", "SM", "wsi")
    assert {"mean", "std", "p00_5", "p99_5", "mean_0", "mean_2", "foreground_fraction"} <= set(sample.meta.stats)
    assert set(sample.meta.flags) <= set(FLAGS)
    mask = domain.foreground(sample)
    assert mask.shape == (384, 512) and mask.dtype == bool
    assert sample.meta.stats["mean_1"] == pytest.approx(sample.image[1][mask].mean(), rel=1e-4)
    np.testing.assert_array_equal(domain.read([pyramid], series_id=ID).image, sample.image)
    params = domain.params()
    assert json.loads(json.dumps(params)) == params
    assert WSI(**params).params() == params


def test_box__is_what_the_slide_has_there(pyramid: Path) -> None:
    sample = WSI(mpp=0.25).read([pyramid], series_id=ID, part={"box": [128, 256, 64, 32]})
    truth = slides.texture(128 + np.arange(65.0), 256 + np.arange(33.0))
    np.testing.assert_array_equal(sample.image.transpose(1, 2, 0), truth)
    assert WSI(mpp=0.5).read([pyramid], series_id=ID, part={"box": [128, 256, 64, 32]}).image.shape == (3, 16, 32)


@pytest.mark.parametrize(
    ("part", "reason", "match"),
    [
        (None, "too_large", "read tiles .WSI.grid and WSI.tiles"),
        ({"member": "label"}, "unsupported_format", "label and overview images may show a name"),
        ({"box": [5000, 0, 10, 10]}, "geometry", "outside the slide"),
        ({"box": [0, 0, 0, 10]}, "geometry", "outside the slide"),
    ],
)
def test_part__refusals(pyramid: Path, part: Any, reason: str, match: str) -> None:
    assert reason in IMAGE_REASONS
    with pytest.raises(ImageError, match=match) as caught:
        WSI(mpp=0.25, max_pixels=1_000_000).read([pyramid], series_id=ID, part=part)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"series {ID}") and "pyramid" not in str(caught.value)


def test_broken_files__end_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"II*\0" + bytes(997))
    (tmp_path / "empty.svs").write_bytes(b"")
    (tmp_path / "text.svs").write_bytes(b"some text that is no slide at all")
    reasons = {}
    for name in ("broken.svs", "empty.svs", "text.svs", "missing.svs"):
        with pytest.raises(ImageError) as caught:
            WSI(slide_mpp=0.5).read([tmp_path / name], series_id=ID)
        reasons[name] = caught.value.reason
        assert name not in str(caught.value)
    assert reasons == {
        "broken.svs": "unreadable",
        "empty.svs": "empty",
        "text.svs": "unsupported_format",
        "missing.svs": "vanished",
    }


def test_odd_files__libraries_do_not_name_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """tifffile logs `<tifffile.TiffFile 'doe_jane.ome.tif'> ...`; libraries in C write to stderr."""
    path = slides.write_ome(tmp_path / "doe_jane.ome.tif")
    path.write_bytes(path.read_bytes().replace(b"<Pixels", b"<Pix<ls"))
    with caplog.at_level(logging.DEBUG):
        with tifffile.TiffFile(path) as tif:
            logging.getLogger("tifffile").setLevel(logging.NOTSET)
            _ = tif.series
        assert "doe_jane" in caplog.text  # so this file is one that it would name
        caplog.clear()
        cut = tmp_path / "doe_cut.svs"
        cut.write_bytes(slides.write_svs(tmp_path / "slide.svs").read_bytes()[:3000])
        for each in (path, cut):
            with contextlib.suppress(ImageError):
                slide_header(each, each.read_bytes()[:4096])
            for backend in ("auto", "openslide", "tifffile", "pillow"):
                with contextlib.suppress(ImageError):
                    open_slide(each, mpp=0.5, backend=backend).read(0, 0, (64, 64), 0.5)
    assert "doe" not in caplog.text + "".join(capfd.readouterr())


def test_table_of_file_names__is_refused_by_the_domain() -> None:
    with pytest.raises(RequestError, match="no series ids"):
        WSI(mpp_csv={"doe_jane.svs": 0.5})


def test_missing_extra__is_one_sentence(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    with pytest.raises(RequestError, match=r'pip install "medssl\[wsi\]"'):
        Handles().get(pyramid, "openslide")


# --- handles -----------------------------------------------------------------------------------------------------------------


def test_slide__is_picklable_after_use(pyramid: Path) -> None:
    slide = open_slide(pyramid)
    before = slide.read(0, 0, (64, 64), 0.25).image
    again = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(again.read(0, 0, (64, 64), 0.25).image, before)


def test_handles__keep_the_latest_and_share_one_cache(tmp_path: Path) -> None:
    handles = Handles(limit=2)
    paths = [slides.write_pyramid(tmp_path / f"{k}.tif", size=(256, 256), factors=(1.0, 2.0)) for k in range(3)]
    first = handles.get(paths[0], "auto")
    handles.get(paths[1], "auto")
    assert handles.get(paths[0], "auto") is first
    handles.get(paths[2], "auto")
    assert len(handles) == 2
    assert handles.get(paths[0], "auto") is first  # the second was used longest ago


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_handles__a_forked_child_opens_its_own(pyramid: Path) -> None:
    parent = HANDLES.get(pyramid, "openslide")
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        os._exit(0 if HANDLES.get(pyramid, "openslide") is not parent else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert HANDLES.get(pyramid, "openslide") is parent
