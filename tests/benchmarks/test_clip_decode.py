"""The clip benchmark and the contact sheet run at toy size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import clip_decode, sector_sheet
from tests.benchmarks.test_benchmarks import play
from tests.synthetic_planar import us_loop, write_video


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    return write_video(tmp_path / "c.avi", np.repeat(us_loop(8)[..., None], 3, axis=-1))


def test_clip_decode__three_rows_and_a_ratio(tmp_path: Path, clip: Path) -> None:
    content = play(clip_decode.main, ["--clips", str(clip), "--size", "32", "--frames", "4"], tmp_path / "out")
    assert [row["what"] for row in content["rows"]] == [clip_decode.OURS, clip_decode.STORE, clip_decode.BARE]
    assert content["rows"][0]["frames"] == "8x120x160" and content["checks"][0]["target"] == ">= 0.9"


def test_sector_sheet__marks_what_is_kept(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "broken.avi").write_bytes(clip.read_bytes()[:300])
    files = sector_sheet.clip_files(tmp_path)
    assert [path.name for path in files] == ["broken.avi", "c.avi"] and sector_sheet.clip_files(clip) == [clip]
    page = sector_sheet.sheet(files, columns=2)
    assert page.shape == (sector_sheet.CELL + 14, 2 * sector_sheet.CELL, 3)
    left, right = page[20:, : sector_sheet.CELL], page[20:, sector_sheet.CELL :]
    outline = (right[..., 0] > 200) & (right[..., 2] < 90)
    assert outline.sum() > 100 and not left.any()
