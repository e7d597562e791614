"""Microscopy: files as channels, closed channel names, spacing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.domains.microscopy import Microscopy, channel_name
from medssl.errors import ImageError, RequestError

SERIES = "ab" * 16


def test_real_field__three_files_are_three_channels(shared_data: Path) -> None:
    from PIL import Image

    files = sorted((shared_data / "fluorescence_ht29").glob("*.tif"))
    sample = Microscopy(channels=["dna", "ph3", "cell"]).read(files, series_id=SERIES)
    np.testing.assert_array_equal(sample.image, np.stack([np.asarray(Image.open(path)) for path in files]))
    assert (sample.image.dtype, sample.meta.channels, sample.spacing_mm) == (np.uint8, ("dna", "ph3", "cell"), None)
    for k, path in enumerate(files):
        values = np.asarray(Image.open(path)).astype(np.float64)
        assert sample.meta.stats[f"mean_{k}"] == pytest.approx(values.mean(), rel=1e-8)
        assert sample.meta.stats[f"p99_5_{k}"] == pytest.approx(np.quantile(values, 0.995), rel=1e-8)
    assert Microscopy().read(files, series_id=SERIES).meta.channels == ()


def test_real_smear__rgb(shared_data: Path) -> None:
    from PIL import Image

    path = shared_data / "bccd" / "JPEGImages" / "BloodImage_00000.jpg"
    sample = Microscopy().read([path], series_id=SERIES)
    np.testing.assert_array_equal(sample.image, np.moveaxis(np.asarray(Image.open(path)), -1, 0))
    assert sample.meta.channels == ("red", "green", "blue")
    assert sample.image.shape == (3, 480, 640)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("DAPI", "dapi"),
        ("Hoechst 33342", "dapi"),
        ("Alexa Fluor 488", "other"),
        ("Alexa-488", "fitc"),
        ("EGFP", "gfp"),
        ("Phase Contrast", "phase_contrast"),
        ("Mr. Jones, ward 3", "other"),
        ("", "other"),
    ],
)
def test_channel_name__closed_list(label: str, name: str) -> None:
    assert channel_name(label) == name


def test_ome_names__mapped_and_never_quoted(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = np.random.default_rng(0).integers(0, 4000, (3, 20, 30)).astype(np.uint16)
    names = {"Channel": {"Name": ["DAPI", "Jones, Peter", "mCherry"]}}
    tifffile.imwrite(tmp_path / "x.ome.tif", array, metadata={"axes": "CYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, **names})
    sample = Microscopy().read([tmp_path / "x.ome.tif"], series_id=SERIES)
    np.testing.assert_array_equal(sample.image, array)
    assert sample.meta.channels == ("dapi", "other", "rfp")
    assert sample.spacing_mm == pytest.approx((2.5e-4, 2.5e-4))
    assert "Jones" not in repr(sample.meta)


def test_join__widest_dtype_and_faults(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    shallow, deep = rng.integers(0, 255, (20, 30)).astype(np.uint8), rng.integers(0, 65535, (20, 30)).astype(np.uint16)
    Image.fromarray(shallow).save(tmp_path / "a.png")
    Image.fromarray(deep).save(tmp_path / "b.png")
    Image.fromarray(deep[:-1]).save(tmp_path / "c.png")
    sample = Microscopy().read([tmp_path / "a.png", tmp_path / "b.png"], series_id=SERIES)
    assert sample.image.dtype == np.uint16
    np.testing.assert_array_equal(sample.image, np.stack([shallow, deep]))
    with pytest.raises(ImageError, match=f"^series {SERIES}: 2 files of different size"):
        Microscopy().read([tmp_path / "a.png", tmp_path / "c.png"], series_id=SERIES)
    with pytest.raises(ImageError, match="1 channels for 2 names"):
        Microscopy(channels=["a", "b"]).read([tmp_path / "a.png"], series_id=SERIES)
    with pytest.raises(RequestError, match="holds a name twice"):
        Microscopy(channels=["a", "a"])
