"""Damaged LZW streams, on which imagecodecs may end the process."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from medssl.domains.lzw import lzw_intact
from medssl.domains.microscopy import Microscopy
from medssl.errors import ImageError


def ramp(shape: tuple[int, int] = (60, 80), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values: np.ndarray = (np.add.outer(np.arange(shape[0]), np.arange(shape[1])) // 3 + rng.integers(0, 3, shape)).astype(np.uint8)
    return values


@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257, 511, 4000, 60_000])
@pytest.mark.parametrize("values", [2, 17, 256])
def test_streams_of_the_encoder__are_intact(n: int, values: int) -> None:
    raw = np.random.default_rng(n).integers(0, values, n).astype(np.uint8).tobytes()
    assert lzw_intact(imagecodecs.lzw_encode(raw))


def test_streams_of_libtiff__are_intact(tmp_path: Path) -> None:
    path = tmp_path / "l.tif"
    Image.fromarray(ramp((300, 400))).save(path, compression="tiff_lzw")
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        for place, count in zip(page.dataoffsets, page.databytecounts):
            tif.filehandle.seek(place)
            assert lzw_intact(tif.filehandle.read(count))
    sample = Microscopy().read([path], series_id="0" * 32)
    np.testing.assert_array_equal(sample.image[0], ramp((300, 400)))


def test_damaged_streams__as_the_decoder_judges_them() -> None:
    """What the decoder calls corrupt is found before it is given to it; what it decodes passes.

    One in a thousand may differ: the decoder stops at the last byte that is wanted.
    """
    raw = ramp().tobytes()
    stream = imagecodecs.lzw_encode(raw)
    agree = damaged = 0
    for seed in range(1000):
        rng = random.Random(seed)
        data = bytearray(stream)
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        ours = lzw_intact(bytes(data))
        if not ours:
            damaged += 1
            continue  # not given to the decoder: that is the point
        with contextlib.suppress(RuntimeError):
            imagecodecs.lzw_decode(bytes(data), out=len(raw))
            agree += 1
    assert damaged > 100 and agree >= 1000 - damaged - 3


def test_damaged_picture__has_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "l.tif"
    tifffile.imwrite(path, ramp(), compression="lzw")
    with tifffile.TiffFile(path) as tif:
        place = tif.pages.first.dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[place + 40 : place + 44] = b"\xff" * 4
    path.write_bytes(bytes(data))
    with pytest.raises(ImageError, match="LZW stream is damaged") as caught:
        Microscopy().read([path], series_id="0" * 32)
    assert caught.value.reason == "unreadable"
