"""Tissue, grids and tiles of slides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medssl.domains.slides.grid import make_grid, positions, tissue_share
from medssl.domains.slides.slide import open_slide
from medssl.domains.slides.tiles import Tiles, tile_loader
from medssl.domains.slides.tissue import (
    PRESETS,
    TissueMask,
    TissueParams,
    find_tissue,
    geojson_of,
    grey_of,
    keep_pieces,
    mask_from_geojson,
    otsu_with_border,
    saturation_of,
    save_tissue,
    tissue_of,
    tissue_params,
)
from medssl.domains.wsi import WSI
from medssl.errors import ImageError, RequestError
from tests import synthetic_slides as slides

openslide = pytest.importorskip("openslide", reason="extra wsi")

ID = "cd" * 16


@pytest.fixture
def cmu(shared_data: Path) -> Path:
    return shared_data / "wsi" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="session")
def stained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two discs, one with a hole, and a speck, at 1 um/px."""
    paint = slides.blobs((1500, 1200, 900), (3200, 2000, 500), (3600, 300, 40))
    return slides.write_pyramid(
        tmp_path_factory.mktemp("wsi") / "stained.tif", paint, size=(4000, 2800), factors=(1.0, 4.0), mpp=1.0
    )


# --- tissue ------------------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_cmu__tissue_shares_of_the_card(cmu: Path) -> None:
    """Card, experiment 3b: thumbnail of 140 x 187, no morphology."""
    with openslide.OpenSlide(str(cmu)) as slide:
        image = np.asarray(slide.get_thumbnail((140, 187)).convert("RGB"))
    assert image.shape == (187, 140, 3)
    from skimage.filters import threshold_otsu

    grey, saturation = grey_of(image), saturation_of(image)
    shares = [(saturation > 8).mean(), (saturation > 15).mean(), (grey <= threshold_otsu(grey)).mean()]
    assert shares == pytest.approx([0.384, 0.373, 0.340], abs=0.002)
    assert (grey <= otsu_with_border(grey)).mean() == pytest.approx(0.340, abs=0.01)


@pytest.mark.data
def test_cmu__methods_agree_within_the_cards_bound(cmu: Path) -> None:
    slide = open_slide(cmu)
    plain = {"median": 1, "close": 1, "close_um": 0.0, "min_area": 0.0, "min_hole": 0.0, "max_holes": 10**6}
    shares = [find_tissue(slide, {"preset": name, **plain}).share for name in ("tcga", "biopsy", "otsu")]
    assert max(shares) - min(shares) < 0.05
    assert all(0.33 < share < 0.40 for share in shares)


def test_saturation__equals_pillows() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 60, 3)).astype(np.uint8)
    theirs = np.asarray(Image.fromarray(image).convert("HSV"))[..., 1].astype(int)
    assert np.abs(saturation_of(image).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("preset", ["tcga", "biopsy", "otsu"])
def test_stained_discs__are_found_with_their_area(stained: Path, preset: str) -> None:
    found = find_tissue(open_slide(stained), {"preset": preset, "close_um": 0.0, "min_area": 1.0})
    area = found.mask.sum() * found.scale[0] * found.scale[1]
    # The speck is below one square of 512. A mask pixel at the edge counts when a little of it is stained: at most one pixel more.
    discs, edge = math.pi * (900**2 + 500**2), 2 * math.pi * (900 + 500)
    assert 0.995 * discs < area < discs + edge * found.scale[0]
    assert found.used == ("otsu" if preset == "otsu" else "hsv")


def test_small_pieces_and_holes__by_plain_counting() -> None:
    mask = np.zeros((60, 80), dtype=bool)
    mask[5:35, 5:45] = True  # 1200
    mask[10:16, 10:16] = False  # hole of 36
    mask[20:23, 20:23] = False  # hole of 9
    mask[25:29, 30:34] = False  # hole of 16
    mask[50:55, 60:65] = True  # piece of 25
    params = TissueParams(min_area=30, min_hole=10, max_holes=1)
    kept = keep_pieces(mask, 1.0, params)
    assert kept[50:55, 60:65].sum() == 0
    assert kept.sum() == 1200 - 36  # the largest hole stays, the others are filled
    assert keep_pieces(mask, 1.0, TissueParams(min_area=30, min_hole=10, max_holes=8)).sum() == 1200 - 36 - 16
    assert keep_pieces(mask, 1.0, TissueParams(min_area=20, min_hole=10, max_holes=8)).sum() == 1200 - 36 - 16 + 25


def test_fallbacks__lower_threshold_then_otsu_then_empty() -> None:
    params = PRESETS["tcga"]
    glass = np.full((100, 120, 3), 240, dtype=np.uint8)
    scale = (8.0, 8.0)

    def used(colour: tuple[int, int, int]) -> str:
        image = glass.copy()
        image[20:80, 20:100] = colour
        return tissue_of(image, scale, params).used

    assert used((240, 200, 230)) == "hsv"
    assert used((240, 234, 240)) == "hsv_lower"  # saturation 6
    assert used((120, 120, 120)) == "otsu"  # grey: no saturation at all
    noise = np.random.default_rng(0).integers(-2, 3, (100, 120, 1))
    for image in (glass, (glass + noise).astype(np.uint8)):
        found = tissue_of(image, scale, params)
        assert (found.used, found.status, found.share) == ("empty", "empty_tissue", 0.0)


def test_otsu__a_region_full_of_tissue_is_tissue() -> None:
    """histolab issue 357: without a border of glass, Otsu splits the tissue itself."""
    image = (np.random.default_rng(0).normal(0, 12, (100, 100, 1)) + np.array((170, 90, 150))).astype(np.uint8)
    assert tissue_of(image, (8.0, 8.0), PRESETS["otsu"]).share > 0.99


def test_none__takes_everything(stained: Path) -> None:
    found = find_tissue(open_slide(stained), "none")
    assert found.share == 1.0 and found.mask.shape == (350, 500)


def test_presets__unknown_names_and_keys() -> None:
    with pytest.raises(RequestError, match="known: tcga, biopsy"):
        tissue_params("tgca")
    with pytest.raises(RequestError, match="unknown key among sthresh; known: preset, method"):
        tissue_params({"sthresh": 8})
    with pytest.raises(RequestError, match="known: hsv, otsu, none"):
        tissue_params({"method": "unet"})


def test_geojson__round_trip_and_area(stained: Path, tmp_path: Path) -> None:
    slide = open_slide(stained)
    mask = np.zeros((350, 500), dtype=bool)
    mask[20:120, 30:200] = True
    mask[40:60, 50:90] = False
    mask[300:350, 450:500] = True  # in the corner
    found = TissueMask(mask, (8.0, 8.0), TissueParams(), "user")
    geojson = geojson_of(found)
    assert [len(feature["geometry"]["coordinates"]) for feature in geojson["features"]] == [2, 1]
    outline = np.array(geojson["features"][0]["geometry"]["coordinates"][0])
    assert (outline[0] == outline[-1]).all()
    # Rings run no further than half a mask pixel from the edges of the pixels: x from 30 * 8 to 200 * 8.
    assert outline.min(axis=0) == pytest.approx([30 * 8, 20 * 8], abs=4.01) and outline.max(axis=0) == pytest.approx(
        [1600, 960], abs=4.01
    )
    again = mask_from_geojson(json.loads(json.dumps(geojson)), slide, mpp=8.0)
    np.testing.assert_array_equal(again.mask, mask)
    files = save_tissue(found, tmp_path, slide)
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(geojson))
    with Image.open(files[1]) as picture:
        assert picture.size == (500, 350)
    with pytest.raises(RequestError, match="polygons and multipolygons"):
        mask_from_geojson({"type": "Point", "coordinates": [1, 2]}, slide)


def test_geojson__a_square_drawn_by_hand(stained: Path) -> None:
    square = [[800, 800], [1600, 800], [1600, 1600], [800, 1600], [800, 800]]
    found = mask_from_geojson({"type": "Polygon", "coordinates": [square]}, open_slide(stained))
    assert found.mask.sum() == 100 * 100 and found.mask[100:200, 100:200].all()


# --- grid --------------------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(("mpp", "columns", "rows"), [(0.499, 8, 11), (1.0, 4, 5)])
def test_cmu__number_of_full_tiles(cmu: Path, mpp: float, columns: int, rows: int) -> None:
    """Card, experiment 1: 88 and 20 tiles."""
    grid = make_grid(open_slide(cmu), mpp=mpp)
    assert len(grid) == columns * rows
    assert len(np.unique(grid.coords[:, 0])) == columns and len(np.unique(grid.coords[:, 1])) == rows
    assert grid.field0[0] == pytest.approx(256 * mpp / 0.499)
    assert grid.coords.dtype == np.int64
    order = grid.coords[:, 1] * 10**6 + grid.coords[:, 0]
    assert (np.diff(order) > 0).all()  # row by row


def test_positions__do_not_drift() -> None:
    """256 px at 1.0 um/px on 0.499: after 200 tiles, a step cut to whole pixels is off by five pixels."""
    step = 256 / 0.499
    places = positions(200_000, step, step, "drop")
    assert len(places) == int(200_000 / step)
    assert np.abs(places - np.arange(len(places)) * step).max() <= 0.5
    assert abs(places[200] - 200 * step) <= 0.5 < abs(200 * int(step) - 200 * step)


@pytest.mark.parametrize(
    ("length", "span", "step", "edge", "expected"),
    [
        (1000, 100.0, 100.0, "drop", 10),
        (999, 100.0, 100.0, "drop", 9),
        (999, 100.0, 100.0, "pad", 10),
        (1000, 100.0, 100.0, "pad", 10),
        (50, 100.0, 100.0, "drop", 0),
        (50, 100.0, 100.0, "pad", 1),
        (1000, 100.0, 50.0, "drop", 19),
        (1000, 100.0, 50.0, "pad", 19),
        (1010, 100.0, 50.0, "pad", 20),
    ],
)
def test_positions__counts(length: int, span: float, step: float, edge: str, expected: int) -> None:
    assert len(positions(length, span, step, edge)) == expected


def test_tissue_share__equals_counting_fine_pixels() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((30, 40)) < 0.4
    tissue = TissueMask(mask, (4.0, 4.0), TissueParams(), "user")
    coords = rng.integers(0, 100, (50, 2))
    fine = np.zeros((200, 260), dtype=bool)
    fine[:120, :160] = np.kron(mask, np.ones((4, 4), dtype=bool))
    expected = [fine[y : y + 50, x : x + 50].mean() for x, y in coords]
    np.testing.assert_allclose(tissue_share(tissue, coords, (50.0, 50.0)), expected, atol=1e-6)


def test_min_tissue__keeps_what_it_says(stained: Path) -> None:
    slide = open_slide(stained)
    tissue = find_tissue(slide)
    everything = make_grid(slide, mpp=2.0, tile_px=64)
    share = tissue_share(tissue, everything.coords, everything.field0)
    for minimum in (0.0, 0.25, 1.0):
        grid = make_grid(slide, mpp=2.0, tile_px=64, tissue=tissue, min_tissue=minimum)
        keep = share > 0 if minimum == 0 else share >= minimum
        np.testing.assert_array_equal(grid.coords, everything.coords[keep])
        assert 0 < len(grid) < len(everything)
    assert json.loads(json.dumps(grid.tissue_params))["used"] == "hsv"


@pytest.mark.parametrize("bad", [{"tile_px": 0}, {"overlap_px": 256}, {"min_tissue": 1.5}, {"edge": "wrap"}, {"mpp": 0.0}])
def test_grid__refuses_numbers_out_of_range(stained: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="are accepted"):
        make_grid(open_slide(stained), **{"mpp": 1.0, **bad})


def test_wsi_grid__lies_on_tissue(stained: Path) -> None:
    grid = WSI(mpp=2.0, tile_px=64).grid([stained], series_id=ID)
    centres = grid.coords + np.array(grid.field0) / 2
    inside = [np.hypot(*(centres - place).T) < radius + 64 for place, radius in (((1500, 1200), 900), ((3200, 2000), 500))]
    assert (inside[0] | inside[1]).all()
    area = len(grid) * grid.field0[0] ** 2
    assert area == pytest.approx(math.pi * (900**2 + 500**2), rel=0.15)


# --- tiles -------------------------------------------------------------------------------------------------------------------


def test_tiles__are_the_regions_of_the_grid(stained: Path) -> None:
    domain = WSI(mpp=2.0, tile_px=64, overlap_px=8, tissue="none", edge="pad")
    grid = domain.grid([stained], series_id=ID)
    tiles = domain.tiles([stained], grid, series_id=ID)
    slide = open_slide(stained)
    for tile in (tiles.tile(0), tiles.tile(len(tiles) - 1)):
        truth = slide.read(*tile.coords, (64, 64), 2.0).image
        np.testing.assert_array_equal(tile.image.transpose(1, 2, 0), truth)
    assert [tile.index for tile in tiles] == list(range(len(grid)))
    with pytest.raises(IndexError):
        tiles[len(tiles)]


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["tiff", "ome"])
def test_workers__same_tiles_in_the_same_order(tmp_path: Path, form: str, workers: int, context: str) -> None:
    path = slides.write_pyramid(tmp_path / "a.tif") if form == "tiff" else slides.write_ome(tmp_path / "a.ome.tif")
    slide = open_slide(path)
    tiles = Tiles(slide, make_grid(slide, mpp=0.4, tile_px=128))
    assert len(tiles) > 60
    slide.read(0, 0, (64, 64), 0.4)  # the parent has an open handle, which must not be used by a forked child
    alone = list(tile_loader(tiles, batch=16))
    many = list(tile_loader(tiles, batch=16, workers=workers, context=context))
    assert len(alone) == len(many) > 3
    for one, two in zip(alone, many):
        assert one["index"].tolist() == two["index"].tolist()
        assert (one["coords"] == two["coords"]).all() and (one["image"] == two["image"]).all() and one["ok"].all()


def test_damaged_fine_tile__a_coarse_one_comes_from_level_0(tmp_path: Path) -> None:
    path = slides.write_pyramid(tmp_path / "slide.tif")
    good = open_slide(path).read(0, 0, (256, 256), 1.0)
    assert good.native
    other = tmp_path / "other.tif"
    other.write_bytes(path.read_bytes())
    slides.damage(other, page=1, tiles=[0])
    for backend in ("openslide", "tifffile"):
        rescued = open_slide(other, backend=backend).read(0, 0, (256, 256), 1.0)
        assert not rescued.native
        # Level 1 of these pyramids samples the painting, level 0 averages it: a grey level apart.
        assert np.abs(rescued.image.astype(int) - good.image).max() <= 2


@pytest.mark.parametrize("backend", ["openslide", "tifffile"])
def test_damaged_tiles__white_and_counted_then_the_slide_fails(
    tmp_path: Path, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    size = (256 * 12, 256 * 10)
    path = slides.damage(slides.write_pyramid(tmp_path / "one_bad.tif", size=size, factors=(1.0,)), page=0, tiles=[17])
    slide = open_slide(path, backend=backend, slide_id=ID)
    tiles = Tiles(slide, make_grid(slide, mpp=0.25))
    read = list(tiles)
    assert len(read) == 120
    assert [tile.index for tile in read if not tile.ok] == [17]
    assert (read[17].image == 255).all() and (read[18].image < 255).any()
    assert "tile 17 cannot be decoded" in caplog.text and "one_bad" not in caplog.text
    slides.damage(path, page=0, tiles=[3, 5, 8])
    slide.close()
    with pytest.raises(ImageError, match=r"2 of 120 tiles cannot be decoded; at most 1% are accepted") as caught:
        list(Tiles(slide, tiles.grid))
    assert caught.value.reason == "unreadable"


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # from MONAI's own reader
def test_monai__patches_of_our_reader_are_those_of_openslide(tmp_path: Path) -> None:
    from monai.data import PatchWSIDataset

    from medssl.domains.slides.monai_reader import SlideReader

    path = slides.write_svs(tmp_path / "slide.svs")
    for level in (0, 1):
        data = [{"image": str(path), "location": [300, 400]}, {"image": str(path), "location": [512, 256]}]
        found = [
            PatchWSIDataset(data, patch_size=(96, 64), patch_level=level, reader=reader, include_label=False)
            for reader in (SlideReader(level=level), "openslide")
        ]
        for ours, theirs in zip(*found):
            assert ours["image"].shape == (3, 96, 64)
            np.testing.assert_array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
    reader = SlideReader()
    assert reader.get_mpp(reader.read(path), 1) == pytest.approx((0.504, 0.504))
    assert reader.get_power(reader.read(path), 1) == pytest.approx(20.0)
