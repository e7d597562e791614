"""Sectors of real clips against outlines drawn by hand on the brightest value of each pixel over time.

The outlines are polygons of (row, column), checked by eye on `python -m benchmarks.sector_sheet`. A sector may be dark at its rims, where no
motion tells it from the screen: what is kept must lie inside, and most of the inside must be kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl.domains.ultrasound import Ultrasound

OUTLINES: dict[str, list[tuple[int, int]]] = {
    "dicom_odd/pydicom/examples_ybr_color.dcm": [
        (22, 163), (140, 43), (158, 43), (175, 60), (192, 100), (201, 145), (201, 187), (193, 230), (177, 269), (159, 293), (141, 293),
        (25, 182),
    ],
    "dicom_multiframe/us_echo_10frames_palette_rle.dcm": [
        (3, 303), (276, 72), (301, 107), (322, 146), (340, 193), (352, 247), (356, 303), (352, 359), (340, 413), (322, 460), (301, 499),
        (276, 528),
    ],
    "us_lung_video/cc-by-nc/Pneu_northumbria_0409_set1_vid1.avi": [
        (0, 145), (290, 0), (470, 0), (500, 60), (516, 160), (516, 350), (505, 440), (478, 516), (290, 516), (0, 367),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "least"), list(zip(OUTLINES, (0.9, 0.85, 0.9))))
def test_sector__agrees_with_an_outline_by_hand(shared_data: Path, name: str, least: float) -> None:
    """The corners of the palette loop's sector are black throughout, so that nothing can tell them from the screen."""
    from skimage.draw import polygon2mask

    pytest.importorskip("av")
    sample = Ultrasound(doppler="keep").read([shared_data / name], series_id="0" * 32)
    assert sample.valid is not None
    outline = polygon2mask(sample.valid.shape, np.array(OUTLINES[name], dtype=np.float64))
    both = (sample.valid & outline).sum()
    found = {"iou": both / (sample.valid | outline).sum(), "inside": both / sample.valid.sum()}
    assert found["iou"] > least and found["inside"] > 0.95, found
