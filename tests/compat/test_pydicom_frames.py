"""pydicom's frames of uncompressed YBR_FULL_422."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.pixels import convert_color_space, get_decoder

from medssl._compat.pydicom_frames import decoded_frames
from tests.synthetic_planar import us_loop, write_planar_dicom

FRAMES, SIZE = 6, (48, 64)


def halved(path: Path) -> tuple[Any, np.ndarray]:
    """Write a cine of two bytes a pixel; return the data set and its frames by hand."""
    colour = np.repeat(us_loop(FRAMES, SIZE)[..., None], 3, axis=-1)
    write_planar_dicom(path, colour, modality="US", photometric="YBR_FULL_422", FrameTime=40)
    data = pydicom.dcmread(path)
    data.PixelData = data.PixelData[: FRAMES * SIZE[0] * SIZE[1] * 2]
    data.save_as(path)
    raw = np.frombuffer(data.PixelData, np.uint8).reshape(FRAMES, SIZE[0], SIZE[1] // 2, 4)
    light = np.stack([raw[..., 0], raw[..., 1]], axis=-1).reshape(FRAMES, *SIZE)
    blue, red = (np.repeat(raw[..., k], 2, axis=-1) for k in (2, 3))
    return pydicom.dcmread(path), convert_color_space(np.stack([light, blue, red], axis=-1), "YBR_FULL", "RGB")


def test_frames__are_those_of_the_file(tmp_path: Path) -> None:
    data, wanted = halved(tmp_path / "a.dcm")
    decoder = get_decoder(data.file_meta.TransferSyntaxUID)
    found = list(decoded_frames(decoder, data, [0, 2, 5]))
    np.testing.assert_array_equal(found, wanted[[0, 2, 5]])


def test_pydicom__still_reads_later_frames_at_wrong_places(tmp_path: Path) -> None:
    """When this fails, `_compat/pydicom_frames.py` can go."""
    data, wanted = halved(tmp_path / "a.dcm")
    frames = get_decoder(data.file_meta.TransferSyntaxUID).iter_array(data, indices=[0, 1])
    np.testing.assert_array_equal(next(frames)[0], wanted[0])
    with pytest.raises((AssertionError, ValueError)):
        np.testing.assert_array_equal(next(frames)[0], wanted[1])
